"""Starts of our programs without the five seconds of CPU that each spends on importing torch, timm and DeepSpeed.

A process that has imported them, one for each process of pytest, forks for every start. The child has its own pid,
environment, output and signals, runs the module as `python -m` does, and leaves by its exit handlers. It shares with
its siblings what a process decides while it imports, such as the seed of hashes: what must be seen to hold between
processes of their own, a launcher or an interpreter's first second, is started with `subprocess` all the same.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
_LARGEST_MESSAGE = 1 << 17
# What libraries read while they are imported: a start with other values needs an interpreter of its own.
_READ_AT_IMPORT = (
    "OMP_NUM_THREADS",
    "DS_ACCELERATOR",
    "CUDA_VISIBLE_DEVICES",
    "PYTHONPATH",
    "ATEN_CPU_CAPABILITY",
)


class Started:
    """A started program, with those methods of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, parent: _Parent) -> None:
        self.pid, self._parent = pid, parent

    @property
    def returncode(self) -> int | None:
        return self._parent.codes.get(self.pid)

    def poll(self) -> int | None:
        self._parent.receive(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self._parent.receive(min(1.0, max(0.0, deadline - time.monotonic())))
        return self.returncode  # type: ignore[return-value]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Parent:
    """The process that forks, seen from the tests' side."""

    def __init__(self) -> None:
        self.codes: dict[int, int] = {}
        self._pids: list[int] = []
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A pool of inductor's would be threads and processes that a fork cuts in two.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.starts", str(theirs.fileno())],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def fork(self, request: Mapping[str, Any], outputs: Sequence[int]) -> int:
        socket.send_fds(self._ours, [json.dumps(request).encode()], list(outputs))
        while not self._pids:
            self.receive(1.0)
        return self._pids.pop()

    def receive(self, timeout_s: float) -> None:
        """Takes in what the process has said; waits for something so long."""
        while select.select([self._ours], [], [], timeout_s)[0]:
            message = self._ours.recv(_LARGEST_MESSAGE)
            assert message, "the process that starts programs has ended"
            said = json.loads(message)
            if "code" in said:
                self.codes[said["pid"]] = said["code"]
            else:
                self._pids.append(said["pid"])
                self.codes.pop(said["pid"], None)  # of an earlier process with this number
            timeout_s = 0


@functools.cache
def _parent() -> _Parent:
    return _Parent()


def start(
    module: str,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    stdout: IO[Any] | None = None,
    stderr: IO[Any] | None = None,
) -> Started:
    """Starts `python -m module arguments` in the checkout, under this environment and those values."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    for name in _READ_AT_IMPORT:
        assert variables.get(name) == {**os.environ, "OMP_NUM_THREADS": "1"}.get(name), (
            f"{name} is read at import"
        )
    with Path(os.devnull).open("w") as nowhere:
        outputs = [(file or nowhere).fileno() for file in (stdout, stderr)]
        request = {"module": module, "arguments": list(arguments), "environment": variables}
        return Started(_parent().fork(request, outputs), _parent())


def run(
    module: str,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module arguments` to its end; returns its exit code and what it said."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = start(module, arguments, environment=environment, stdout=stdout, stderr=stderr)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        said = [(file.seek(0), file.read())[1] for file in (stdout, stderr)]
    return subprocess.CompletedProcess([module, *arguments], code, *said)


def _serve(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Forks as it is asked to; returns what to become in each child, and None when the tests have ended."""
    noticed, notice = os.pipe()
    os.set_blocking(notice, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(notice)
    while True:
        ready = select.select([connection, noticed], [], [])[0]
        if noticed in ready:
            os.read(noticed, 4096)
            for pid, status in iter(_reap, None):
                code = os.waitstatus_to_exitcode(status)
                connection.send(json.dumps({"pid": pid, "code": code}).encode())
        if connection in ready:
            message, outputs, _, _ = socket.recv_fds(connection, _LARGEST_MESSAGE, 2)
            if not message:
                return None
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for descriptor in (noticed, notice, connection.detach()):
                    os.close(descriptor)
                return json.loads(message), outputs
            for descriptor in outputs:
                os.close(descriptor)
            connection.send(json.dumps({"pid": pid}).encode())


def _reap() -> tuple[int, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def _become(request: dict[str, Any], outputs: list[int]) -> None:
    """Runs the module that is asked for, as `python -m` does, and ends the process."""
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for place, descriptor in enumerate(outputs, start=1):
        os.dup2(descriptor, place)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [request["module"], *request["arguments"]]
    code: Any = 0
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ending:
        code = ending.code
    except BaseException as error:
        traceback.print_exc()
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    _leave(code)


def _leave(code: Any) -> None:
    """Ends this process as an interpreter does, but for taking five thousand modules apart, which takes a second."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code or 0)


if __name__ == "__main__":
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    import training.build
    import training.dry_run
    import training.engines.deepspeed
    import training.engines.fsdp  # noqa: F401

    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()
    asked = _serve(socket.socket(fileno=int(sys.argv[1])))
    if asked is not None:
        _become(*asked)
