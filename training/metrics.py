"""The record of a run: `metrics.jsonl`, one JSON object a line; wandb and TensorBoard are views that cannot stop a run.

A view is a process of its own that reads the record as it grows: wandb's threads, its waiting for a dead network and
its 40 s at exit stay outside the process that trains. `python -m training.metrics replay RUN_DIRECTORY` sends a
finished or interrupted record to wandb as one run, for nodes without a network; with `view=tensorboard` it writes the
event file of a run that was made without one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from runtime.config import read_yaml
from runtime.files import write_atomically
from runtime.logging_setup import set_up_logging
from runtime.preemption import ignore_preemption_signals
from runtime.program import EXIT_DONE, EXIT_FAULT, UserError, run_program
from runtime.record import RECORD_NAME, read_record
from runtime.usage import asks_for_help
from training.config import LoggingConfig
from training.event_files import EventFile

logger = logging.getLogger("training.metrics")  # also where this file is the program

ViewName = Literal["wandb", "tensorboard"]
WANDB_ID_NAME = "wandb_id"
WANDB_SENT_NAME = "wandb_sent"  # the newest step of which wandb has confirmed that it has everything up to it
_POLL_S = 1.0
_INIT_TIMEOUT_S = 60  # of wandb's first answer; the training process does not wait for it


class MetricsRecord:
    """Appends to `metrics.jsonl` of a run directory; only rank 0 makes one. Not collective.

    Args:
        run_dir: the run directory.
        resume_step: updates done at the start; lines of later steps, written by an interrupted run after its last
            checkpoint, are dropped so that every step stands in the record once. At 0 a former record is put aside.
        resume_bytes: length of the record at that checkpoint; what follows is dropped without a look at its steps.

    Raises:
        UserError: the record cannot be read or written.
    """

    def __init__(self, run_dir: Path, *, resume_step: int, resume_bytes: int | None = None) -> None:
        self.path = run_dir / RECORD_NAME
        try:
            if self.path.exists():
                self._cut(resume_step, resume_bytes)
            # Without a buffer of Python's own: what a full disk has not taken stays in `_unwritten`, nowhere else.
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be opened ({error.strerror}); expected a file that this user may write; mend its "
                "permissions, or set run.output_dir"
            ) from error
        self._unwritten = b""

    def _cut(self, resume_step: int, resume_bytes: int | None) -> None:
        """Drops the lines after the checkpoint; where there is none, puts the record aside whole.

        A run without a checkpoint begins anew, whatever became of those that it had: what it once measured is not
        this program's to delete.
        """
        lines = read_record(self.path.parent)
        last = max((line["step"] for line in lines), default=0)
        if resume_step == 0 and last > 0:
            written = time.localtime(self.path.stat().st_mtime)
            aside = self.path.with_name(f"metrics-{time.strftime('%Y%m%d-%H%M%S', written)}.jsonl")
            self.path.rename(aside)
            logger.warning(
                "the last start came to step %d or later and no checkpoint is left of it: beginning anew; its record "
                "is kept as %s",
                last,
                aside,
            )
            return
        content = self.path.read_bytes()
        # A record that was lost or replaced is shorter, or has no end of a line there.
        if resume_bytes and content[resume_bytes - 1 : resume_bytes] == b"\n":
            write_atomically(self.path, content[:resume_bytes])
        else:
            kept = [line for line in lines if line["step"] <= resume_step and resume_step > 0]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if last > resume_step:
            logger.warning(
                "the last start ended at step %d or later without saving it: going on from step %d, steps after it "
                "are done again",
                last,
                resume_step,
            )

    def write(self, step: int, samples_seen: int, values: Mapping[str, float]) -> dict[str, Any]:
        """Appends one line and returns it. Non-finite values become null: JSON has no word for them.

        A line that the disk does not take is kept and written before the next one: a full disk must not end a run.
        """
        line: dict[str, Any] = {"step": step, "samples_seen": samples_seen}
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append(json.dumps(line).encode() + b"\n")
        return line

    def _append(self, content: bytes) -> None:
        was_behind = bool(self._unwritten)
        self._unwritten += content
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not was_behind:
                logger.error("%s cannot be written: %s; lines are kept in memory meanwhile", self.path, error)

    @property
    def num_bytes(self) -> int:
        """Length of the record so far, with what the disk has not taken yet."""
        return self._file.tell() + len(self._unwritten)

    def close(self) -> None:
        """Closes the file, after a last try to write what is left; says how much is lost."""
        if self._file.closed:
            return
        self._append(b"")
        if self._unwritten:
            logger.error("%s lacks its last %d lines", self.path, self._unwritten.count(b"\n"))
        self._file.close()


def wandb_id(run_dir: Path) -> str:
    """Returns the run's wandb id, made at its first start and kept in the run directory across requeues."""
    path = run_dir / WANDB_ID_NAME
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()


def keep_wandb_id(run_dir: Path, saved: str) -> None:
    """Puts the id that a checkpoint remembers back where the run directory has lost its own."""
    path = run_dir / WANDB_ID_NAME
    if not path.exists():
        write_atomically(path, saved + "\n")


class RecordView:
    """A process that shows the record elsewhere while it grows; nothing in this process waits for it. Not collective.

    Args:
        run_dir: the run directory, with `metrics.jsonl` open; the view's files go into its `wandb/` or `tensorboard/`.
        view: `wandb` or `tensorboard`.
        settings: of wandb: `mode` (`online` or `offline`), `project`, and `facts`, plain values that stand beside the
            run's configuration.
    """

    def __init__(self, run_dir: Path, view: ViewName, **settings: Any) -> None:
        self._run_dir = run_dir.absolute()
        self._view = view
        self._follower = subprocess.Popen(
            [sys.executable, "-m", "training.metrics", "follow", str(self._run_dir)],
            cwd=Path(__file__).resolve().parent.parent,
            env={**os.environ, "WANDB_SILENT": "true"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # so that it can be ended with whatever it has started
        )
        self._tell({"view": view, **settings})
        if settings.get("mode") == "offline":
            logger.info("wandb is offline: `python -m training.metrics replay %s` sends the record", run_dir)

    def close(self, timeout_s: float = 20.0) -> None:
        """Waits at most `timeout_s` for what has not been sent, then ends the view."""
        self._tell({"end": True})
        try:
            code = self._follower.wait(timeout_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._follower.pid, signal.SIGKILL)
            self._follower.wait()
            code = None
        if code != EXIT_DONE:
            why = f"did not finish within {timeout_s:.0f} s" if code is None else "stopped before the end"
            logger.warning(
                "%s %s; nothing is lost: `python -m training.metrics replay %s%s` sends the record later",
                self._view,
                why,
                self._run_dir,
                "" if self._view == "wandb" else f" view={self._view}",
            )

    def _tell(self, message: Mapping[str, Any]) -> None:
        pipe = self._follower.stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.write(json.dumps(message).encode() + b"\n")
            pipe.flush()


def require_views(settings: LoggingConfig) -> None:
    """Checks that the packages of the views that a run asks for are there; imports nothing.

    Raises:
        UserError: one is not.
    """
    if settings.tensorboard:
        _require_package("tensorboard", "logging.tensorboard is true", "set logging.tensorboard=false")
    if settings.wandb_mode != "disabled":
        asked = f"logging.wandb_mode is {settings.wandb_mode!r}"
        _require_package("wandb", asked, "set logging.wandb_mode=disabled")


def _require_package(name: str, asked: str, remedy: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"{asked} and the package {name} is not installed; expected it; pip install {name}, or {remedy}"
        )


def open_views(run_dir: Path, settings: LoggingConfig, facts: Mapping[str, Any]) -> list[RecordView]:
    """Starts the views that a run asks for. Rank 0 only."""
    views = [RecordView(run_dir, "tensorboard")] if settings.tensorboard else []
    if settings.wandb_mode != "disabled":
        options = {"mode": settings.wandb_mode, "project": settings.wandb_project, "facts": dict(facts)}
        views.append(RecordView(run_dir, "wandb", **options))
    return views


def follow(run_dir: Path, settings: Mapping[str, Any], ended: Callable[[], bool]) -> int:
    """Sends a growing record to a view until `ended`, and what is left then; returns the lines sent.

    With wandb online a start begins behind the last step that wandb has confirmed, so that lines of a start without a
    network follow with the next one. Otherwise every start writes the whole record: of the files of one run, the last
    is complete.
    """
    sent_path = run_dir / WANDB_SENT_NAME
    is_online = settings.get("mode") == "online"
    sent = int(sent_path.read_text()) if is_online and sent_path.exists() else -1
    run = _start_view(run_dir, settings)
    count, newest = 0, sent
    for line in _growing_record(run_dir / RECORD_NAME, ended):
        if line["step"] > sent:
            run.log(line)
            count, newest = count + 1, line["step"]
    run.finish()
    if is_online and count:
        write_atomically(sent_path, f"{newest}\n")
    return count


def replay(run_dir: Path, settings: Mapping[str, Any]) -> int:
    """Sends a run's whole record to a view, to wandb as the one run that its `wandb_id` names; returns the lines sent.

    Raises:
        UserError: the directory holds no record.
    """
    if not (run_dir / RECORD_NAME).is_file():
        raise UserError(f"{run_dir} has no {RECORD_NAME}; expected a run directory; pass outputs/RUN")
    _require_package(settings["view"], f"view is {settings['view']}", "replay elsewhere")
    lines = read_record(run_dir)
    run = _start_view(run_dir, {**settings, "facts": {}})
    for line in lines:
        run.log(line)
    run.finish()
    return len(lines)


def _growing_record(path: Path, ended: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Yields the lines of a record as they are written; a line that is still being written comes with the next look."""
    with path.open() as file:
        rest = ""
        while True:
            last_look = ended()
            *whole, rest = (rest + file.read()).split("\n")
            yield from (json.loads(text) for text in whole if text)
            if last_look:
                return


def _start_view(run_dir: Path, settings: Mapping[str, Any]) -> Any:
    """Returns what takes lines by `log` and ends by `finish`."""
    if settings["view"] == "tensorboard":
        return EventFile(run_dir)
    import wandb

    config_path = run_dir / "config.yaml"
    config = read_yaml(str(config_path)) if config_path.is_file() else {}
    run = wandb.init(
        id=wandb_id(run_dir),
        name=run_dir.name,
        dir=str(run_dir),
        mode=settings["mode"],
        project=settings["project"],
        config={**config, **settings["facts"]},
        resume="allow",
        settings=wandb.Settings(init_timeout=_INIT_TIMEOUT_S, silent=True, disable_git=True, console="off"),
    )
    # Our own axis: after a resume from an older checkpoint wandb's internal step is ahead and would drop lines.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _follow_for_parent(run_dir: Path) -> int:
    """What `RecordView` starts: settings come as the first line of standard input, and the end as a second one."""
    # A scheduler warns every process of a step; the parent says when to end.
    ignore_preemption_signals()
    set_up_logging(0)
    stream = sys.stdin.fileno()
    # Unbuffered: what a buffer has taken, select does not see.
    with os.fdopen(stream, "rb", buffering=0, closefd=False) as pipe:
        settings = json.loads(pipe.readline())

    def ended() -> bool:
        return bool(select.select([stream], [], [], _POLL_S)[0])  # a line, or the parent's death

    try:
        follow(run_dir, settings, ended)
    except Exception as error:  # wandb's failures are of many types, and none may reach the run
        logger.warning("%s stopped (%s: %.200s)", settings["view"], type(error).__name__, error)
        return EXIT_FAULT
    return EXIT_DONE


def main(arguments: list[str]) -> int:
    """Runs `python -m training.metrics replay RUN_DIRECTORY [view=tensorboard] [mode=offline] [project=NAME]`."""
    if len(arguments) == 2 and arguments[0] == "follow":
        return _follow_for_parent(Path(arguments[1]))
    if asks_for_help(arguments):
        print(f"{inspect.cleandoc(__doc__)}\n\n{inspect.cleandoc(main.__doc__ or '')}")
        return EXIT_DONE
    if len(arguments) < 2 or arguments[0] != "replay":
        raise UserError(
            f"arguments are {' '.join(arguments) or 'missing'}; expected replay RUN_DIRECTORY [view=wandb|tensorboard] "
            "[mode=online|offline] [project=NAME]; pass them"
        )
    options = {"view": "wandb", "mode": "online", "project": "decoupled-prototypes"}
    choices = {"view": ("wandb", "tensorboard"), "mode": ("online", "offline")}
    for argument in arguments[2:]:
        key, _, value = argument.partition("=")
        if key not in options or not value or value not in choices.get(key, (value,)):
            raise UserError(
                f"argument is {argument!r}; expected view=wandb|tensorboard, mode=online|offline or project=NAME; mend "
                "it"
            )
        options[key] = value
    count = replay(Path(arguments[1]), options)
    print(f"replayed {count} lines of {arguments[1]}/{RECORD_NAME}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
