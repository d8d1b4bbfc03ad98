"""The hang watchdog reports who is silent, where, and with whose stacks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.watchdog import HangWatchdog, describe_silence


def leave_sign(directory: Path, rank: int, beat_at: float, awake_at: float, where: str) -> None:
    path = directory / f"rank-{rank:05d}.json"
    path.write_text(json.dumps({"beat_at": beat_at, "awake_at": awake_at, "where": where}))


def test_a_rank_that_does_not_run_is_named_before_one_that_waits(tmp_path: Path) -> None:
    leave_sign(tmp_path, 0, 100.0, 110.0, "step 5 backward")
    leave_sign(tmp_path, 1, 101.0, 101.0, "step 5 forward")
    text = describe_silence(tmp_path, 2, now=110.0, asleep_after_s=5.0)
    assert text.startswith("silent rank 1 (not running)") and "step 5 forward" in text


def test_among_running_ranks_the_one_behind_is_named(tmp_path: Path) -> None:
    leave_sign(tmp_path, 0, 105.0, 110.0, "step 6 backward")
    leave_sign(tmp_path, 1, 100.0, 110.0, "step 5 data")
    text = describe_silence(tmp_path, 2, now=110.0, asleep_after_s=5.0)
    assert text.startswith("silent rank 1 (running but behind)") and "10.0 s ago at step 5 data" in text


def test_a_rank_without_a_sign_of_life_is_named(tmp_path: Path) -> None:
    leave_sign(tmp_path, 0, 105.0, 110.0, "step 6")
    assert describe_silence(tmp_path, 2, 110.0, 5.0) == "rank 1 left no sign of life"


def test_beats_keep_it_quiet_and_silence_is_reported_in_time(tmp_path: Path) -> None:
    reports: list[str] = []
    watchdog = HangWatchdog(tmp_path, 0, 1, timeout_s=1.0, on_hang=reports.append)
    watchdog.start()
    for index in range(8):
        time.sleep(0.2)
        watchdog.beat(f"step {index}")
    assert reports == []
    silent_since = time.time()
    while not reports and time.time() - silent_since < 5:
        time.sleep(0.01)
    assert time.time() - silent_since <= 2.0
    assert "step 7" in reports[0]
    assert "test_beats_keep_it_quiet" in (tmp_path / "stacks-rank-0.txt").read_text()
    watchdog.stop()


def test_zero_leaves_it_out(tmp_path: Path) -> None:
    watchdog = HangWatchdog(tmp_path / "absent", 0, 1, timeout_s=0)
    watchdog.start()
    watchdog.stop()
    assert not (tmp_path / "absent").exists()


RANK = """
import sys, time
from pathlib import Path
from runtime.watchdog import HangWatchdog
directory, rank, peer = Path(sys.argv[1]), int(sys.argv[2]), 1 - int(sys.argv[2])
watchdog = HangWatchdog(directory, rank, 2, timeout_s=2.0)
watchdog.start()
step = 0
while True:  # a lock step through files: stands in for a collective
    watchdog.beat(f"step {step}")
    (directory / f"at-{rank}-{step}").touch()
    while not (directory / f"at-{peer}-{step}").exists():
        time.sleep(0.005)
    step += 1
    time.sleep(0.05)
"""


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named_by_its_peer_which_ends(tmp_path: Path, stopped: int) -> None:
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True, cwd=Path.cwd())
        for rank in range(2)
    ]
    try:
        deadline = time.time() + 30
        while not (tmp_path / "at-0-10").exists() and time.time() < deadline:
            time.sleep(0.01)
        os.kill(ranks[stopped].pid, signal.SIGSTOP)
        stopped_at = time.time()
        _, errors = ranks[1 - stopped].communicate(timeout=20)
        assert time.time() - stopped_at <= 3.5  # timeout 2 s, at most 1 s late, and the interpreter's end
        assert ranks[1 - stopped].returncode == 1
        assert f"silent rank {stopped} (not running)" in errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
