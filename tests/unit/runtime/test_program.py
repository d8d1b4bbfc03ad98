"""Exit codes, and a failing rank that waits for nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
