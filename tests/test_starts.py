"""What tests start by a fork behaves as what a shell starts: output, exit codes, environment, signals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import starts


def test_output_exit_code_and_arguments_are_those_of_an_interpreter(tmp_path):
    (tmp_path / "right.json").write_text('{"a": [1, 2]}')
    (tmp_path / "wrong.json").write_text("{")
    for arguments in ([str(tmp_path / "right.json")], [str(tmp_path / "wrong.json")], ["--no-such-option"]):
        own = subprocess.run(
            [sys.executable, "-m", "json.tool", *arguments], capture_output=True, text=True, check=False
        )
        forked = starts.run("json.tool", arguments)
        assert (forked.returncode, forked.stdout, forked.stderr) == (own.returncode, own.stdout, own.stderr)
    lost = starts.run("tests.helpers.two_ranks", [])
    assert lost.returncode == 1 and "IndexError" in lost.stderr
    assert json.loads(starts.run("json.tool", [str(tmp_path / "right.json")]).stdout) == {"a": [1, 2]}


def test_a_start_has_its_own_environment_and_process():
    program = ["-n1", "-r1", "import os; print(os.environ.get('PLANNED'), os.getpid(), os.getcwd())"]
    first, second = (
        starts.run("timeit", program, environment={"PLANNED": name}).stdout.split() for name in "ab"
    )
    assert (first[0], second[0]) == ("a", "b") and first[1] != second[1]
    assert first[2] == second[2] == str(starts.ROOT)
    assert starts.run("timeit", program).stdout.split()[0] == "None"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_start_and_is_its_exit_code(tmp_path, number):
    begun = tmp_path / "begun"
    process = starts.start(
        "timeit", ["-n1", "-r1", f"open({str(begun)!r}, 'w'); import time; time.sleep(60)"]
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    deadline = time.monotonic() + 30
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, 0)
    process.send_signal(number)
    # `timeit` says the traceback of a KeyboardInterrupt and ends with 1.
    assert process.wait(20) == (1 if number == signal.SIGINT else -number) == process.poll()


def test_what_is_read_at_import_needs_an_interpreter_of_its_own():
    with pytest.raises(AssertionError, match="OMP_NUM_THREADS is read at import"):
        starts.start("json.tool", [], environment={"OMP_NUM_THREADS": "3"})
