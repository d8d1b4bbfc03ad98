"""Exit codes, and a failing rank that waits for nobody."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from evaluation.tensor_files import save_tensors
from runtime.files import write_atomically
from runtime.program import EXIT_DONE, EXIT_FAULT, EXIT_USER_MISTAKE, UserError, faults_unless, run_program

ROOT = Path(__file__).resolve().parents[3]


def raising(error: Exception):
    def main(arguments: list[str]) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("batch is 3;\n expected 4"), EXIT_USER_MISTAKE, "error: batch is 3; expected 4\n"),
        (RuntimeError("a bug"), EXIT_FAULT, "Traceback"),
    ],
)
def test_a_mistake_is_one_line_and_a_fault_a_traceback(error, code, text, capsys, monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("logging.root.handlers", [])
    assert run_program(raising(error), []) == code
    assert text in capsys.readouterr().err
    assert run_program(lambda arguments: EXIT_DONE, []) == EXIT_DONE


def test_inside_training_a_value_error_is_a_fault() -> None:
    with pytest.raises(RuntimeError, match="fault: x"), faults_unless():
        raise ValueError("x")
    with pytest.raises(UserError), faults_unless():
        raise UserError("x")


@contextmanager
def small_files(size: int):
    """Inside this block no file can grow larger, as on a disk that is full."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def fill_bytes(path: Path) -> None:
    write_atomically(path, b"0" * 100_000)


def fill_tensors(path: Path) -> None:
    save_tensors({"x": torch.zeros(100_000)}, path, {})


@pytest.mark.parametrize("fill", [fill_bytes, fill_tensors])
def test_a_full_disk_is_one_line_with_the_file_and_leaves_nothing(fill, tmp_path, capsys) -> None:
    path = tmp_path / "out"
    with small_files(50_000):
        code = run_program(lambda arguments: fill(path), [])
    rule = "expected room and rights there; make room, or set another place"
    assert code == EXIT_USER_MISTAKE and list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == f"error: {path} cannot be read or written (File too large); {rule}\n"
    with small_files(50_000), pytest.raises(RuntimeError, match=r"fault: .*out"), faults_unless():
        fill(path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_what_a_disk_refuses_is_one_line_and_what_it_fails_at_a_traceback(number, capsys) -> None:
    assert run_program(raising(OSError(number, "no", "/x")), []) == EXIT_USER_MISTAKE
    assert capsys.readouterr().err.startswith("error: /x cannot be read or written (no); expected ")
    assert run_program(raising(OSError(errno.EIO, "no", "/x")), []) == EXIT_FAULT


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_failing_rank_ends_at_once(world_size: int) -> None:
    program = (
        "import sys, threading, time\n"
        "from runtime.program import run_program\n"
        "def main(arguments):\n"
        "    threading.Thread(target=time.sleep, args=(3,)).start()\n"
        "    raise RuntimeError('a bug')\n"
        "sys.exit(run_program(main, []))\n"
    )
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "WORLD_SIZE": str(world_size)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == EXIT_FAULT and "a bug" in result.stderr
    # Alone it may take its time: nobody waits for it.
    assert (time.monotonic() - started < 3) == (world_size == 2)
