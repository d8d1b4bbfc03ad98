"""A lock names its holder, keeps everybody else out, and does not outlive it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.directory_lock import LOCK_NAME, DirectoryHeldError, DirectoryLock, describe_self

HOLDER = """
import sys, time
from pathlib import Path
from runtime.directory_lock import DirectoryLock
assert DirectoryLock(Path(sys.argv[1])).try_acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def rewrite(directory: Path, **changes: object) -> None:
    """Changes facts in a lock, as if another process had written it."""
    path = directory / LOCK_NAME
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(content))


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_living_holder_is_named(tmp_path: Path, holder: subprocess.Popen) -> None:
    with pytest.raises(DirectoryHeldError, match=rf"held by process {holder.pid} on host \S+ since 20\d\d-"):
        DirectoryLock(tmp_path).try_acquire()
    holder.send_signal(signal.SIGSTOP)  # a pause is no death
    with pytest.raises(DirectoryHeldError):
        DirectoryLock(tmp_path).try_acquire()


def test_a_killed_holder_is_dead_at_once_even_as_a_zombie(tmp_path: Path, holder: subprocess.Popen) -> None:
    holder.kill()  # and nobody has waited for it yet
    wait_for(lambda: Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    lock = DirectoryLock(tmp_path)
    assert lock.try_acquire()
    lock.release()
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_reused_process_number_is_no_holder(tmp_path: Path, holder: subprocess.Popen) -> None:
    rewrite(tmp_path, process_start="12345")
    lock = DirectoryLock(tmp_path)
    assert lock.try_acquire()
    lock.release()


def test_an_earlier_start_of_the_same_slurm_job_is_dead_and_another_job_is_not(
    tmp_path: Path, holder: subprocess.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(tmp_path, job="cluster:77", restarts="0", host="another")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "cluster")
    for job, restarts in (("77", "0"), ("78", "1")):  # a second step of that job; another job
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        assert not DirectoryLock(tmp_path).try_acquire()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lock = DirectoryLock(tmp_path)
    assert lock.try_acquire()
    lock.release()


def test_a_holder_elsewhere_is_judged_by_its_signs_of_life(tmp_path: Path, holder: subprocess.Popen) -> None:
    rewrite(tmp_path, host="another")
    newcomer = DirectoryLock(tmp_path, silent_after_s=30)
    assert not newcomer.try_acquire()
    assert f"process {holder.pid} on host another" in newcomer.waits_for
    assert not newcomer.try_acquire()
    os.utime(tmp_path / LOCK_NAME)
    with pytest.raises(DirectoryHeldError, match="host another"):
        newcomer.try_acquire()
    patient = DirectoryLock(tmp_path, silent_after_s=0.2)
    assert not patient.try_acquire()
    time.sleep(0.3)
    assert patient.try_acquire()
    patient.release()


def test_a_holder_gives_signs_of_life(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path, beat_s=0.02)
    assert lock.try_acquire()
    path = tmp_path / LOCK_NAME
    first = path.stat().st_mtime_ns
    wait_for(lambda: path.stat().st_mtime_ns != first)
    rewrite(tmp_path, host="another")
    newcomer = DirectoryLock(tmp_path, silent_after_s=30)

    def is_refused() -> bool:
        try:
            return newcomer.try_acquire()
        except DirectoryHeldError:
            return True

    wait_for(is_refused)
    assert json.loads(path.read_text())["host"] == "another", "it was refused, not taken over"
    lock.release()


def test_a_copied_directory_is_free(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    original = DirectoryLock(tmp_path / "run")
    assert original.try_acquire()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copy = DirectoryLock(tmp_path / "copy")
    assert copy.try_acquire()
    copy.release()
    original.confirm()
    original.release()


def test_a_holder_that_was_taken_over_notices_and_leaves_the_other_alone(tmp_path: Path) -> None:
    paused = DirectoryLock(tmp_path)
    assert paused.try_acquire()
    rewrite(tmp_path, token="another's")
    with pytest.raises(DirectoryHeldError, match="was taken over by process"):
        paused.confirm()
    paused.release()
    assert (tmp_path / LOCK_NAME).exists()


def test_a_deleted_lock_is_written_again(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    assert lock.try_acquire()
    (tmp_path / LOCK_NAME).unlink()
    lock.confirm()
    with pytest.raises(DirectoryHeldError):
        DirectoryLock(tmp_path).try_acquire()
    lock.release()
    assert not (tmp_path / LOCK_NAME).exists()


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", '{"pid": 1}', "\x00", "[" * 5000])
def test_a_lock_without_a_name_is_judged_by_its_signs_of_life(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_NAME).write_text(content)
    lock = DirectoryLock(tmp_path, silent_after_s=0.05)
    assert not lock.try_acquire() and lock.waits_for == "a job that left no name"
    time.sleep(0.06)
    assert lock.try_acquire()
    lock.release()


def test_wrongly_typed_facts_are_no_name(tmp_path: Path) -> None:
    facts = {**vars(describe_self("t", 0)), "pid": "1"}
    (tmp_path / LOCK_NAME).write_text(json.dumps(facts))
    lock = DirectoryLock(tmp_path)
    assert not lock.try_acquire() and lock.waits_for == "a job that left no name"


def test_of_many_that_find_a_dead_holder_one_takes_over(tmp_path: Path, holder: subprocess.Popen) -> None:
    """Several processes at once, again and again: exactly one holds the directory."""
    holder.kill()
    holder.wait()
    racer = (
        "import sys, time\nfrom pathlib import Path\nfrom runtime.directory_lock import *\n"
        "lock = DirectoryLock(Path(sys.argv[1]))\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "try: print(lock.try_acquire(), flush=True)\n"
        "except DirectoryHeldError: print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    start_at = time.time() + 1.5
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", racer, str(tmp_path), str(start_at)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        for _ in range(4)
    ]
    answers = [process.stdout.readline().strip() for process in racers if process.stdout]
    for process in racers:
        process.communicate(timeout=20)
    assert sorted(answers) == ["True", "held", "held", "held"]
