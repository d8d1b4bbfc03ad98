"""A watchdog for hangs: where every rank stands, whose stacks to read, and an end.

A rank that waits in a collective cannot be asked anything by a collective. Each rank therefore leaves its last
sign of life in a small file; a thread that needs neither the device nor a process group reads all of them.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

EXIT_HUNG = 1


class HangWatchdog:
    """Ends the process when this rank shows no sign of life for `timeout_s` seconds.

    On a timeout every rank writes the stacks of all its threads to `stacks-rank-N.txt` and logs which rank was
    silent the longest and where it was last seen; then the process exits without a collective and without
    waiting for anybody, so that the launcher can restart the run from its last checkpoint.

    A stopped process (SIGSTOP, a frozen node) cannot report itself: its peers hang in the next collective and
    name it. A rank whose last beat is older than the others' is the culprit; the others are its victims.

    Args:
        directory: of the signs of life, shared by all ranks (inside the run directory).
        rank: this process.
        world_size: number of ranks.
        timeout_s: seconds of silence; 0 leaves the watchdog out. Longer than the slowest legitimate pause
            (first compilation, a checkpoint, an evaluation).
        on_hang: what to do after reporting; None ends the process with exit code 1.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        world_size: int,
        timeout_s: float,
        on_hang: Callable[[str], None] | None = None,
    ) -> None:
        self._directory = directory
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._on_hang = on_hang or _end_process
        self._interval_s = min(0.5, timeout_s / 8)
        # Rare enough for a thousand ranks on one file system.
        self._publish_every_s = timeout_s / 10
        self._last_beat = (time.time(), "start")
        self._last_published = 0.0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread and leaves the first sign of life. Not collective."""
        if self._timeout_s <= 0:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        self.beat("start")
        self._publish(time.time())
        self._thread = threading.Thread(target=self._watch, name="hang-watchdog", daemon=True)
        self._thread.start()

    def beat(self, where: str) -> None:
        """Notes that this rank is alive at `where`, e.g. `step 12 backward`; costs no system call on the device.

        The note in memory is what the timeout counts from; the watching thread writes it for the other ranks.
        """
        self._last_beat = (time.time(), where)

    def stop(self) -> None:
        """Ends the watching; the run is over. Not collective."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=5 * self._interval_s)
            _beat_path(self._directory, self._rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        # The thread notices its own process's pause: after SIGSTOP the clock has jumped, but this rank is awake
        # again and deserves a full timeout before it is called hung.
        previous = time.time()
        while not self._stopped.wait(self._interval_s):
            now = time.time()
            if now - previous > max(4 * self._interval_s, 1.0) + self._interval_s:
                self._last_beat = (now, self._last_beat[1])
            previous = now
            hung = now - self._last_beat[0] > self._timeout_s
            if hung or now - self._last_published > self._publish_every_s:
                self._publish(now)
            if hung:
                self._report(now)
                return

    def _publish(self, now: float) -> None:
        beat_at, where = self._last_beat
        self._last_published = now
        try:
            content = json.dumps({"beat_at": beat_at, "where": where, "awake_at": now})
            path = _beat_path(self._directory, self._rank)
            # Whole or absent: a half written sign would make its rank look dead to a reader.
            path.with_suffix(".tmp").write_text(content)
            path.with_suffix(".tmp").replace(path)
        except OSError as error:
            logger.warning("cannot leave a sign of life: %s", error)

    def _report(self, now: float) -> None:
        silence = describe_silence(self._directory, self._world_size, now, self._timeout_s / 2)
        message = f"rank {self._rank} hangs: {silence}"
        stacks = self._directory / f"stacks-rank-{self._rank}.txt"
        try:
            with stacks.open("w") as file:
                _dump_stacks(file)
            message += f"; stacks: {stacks}"
        except OSError:
            _dump_stacks(sys.stderr)
        logger.critical(message)
        self._on_hang(message)


def describe_silence(directory: Path, world_size: int, now: float, asleep_after_s: float) -> str:
    """Returns who is to blame, from the signs of life of all ranks.

    A rank whose watching thread sleeps (process stopped, dead or its node gone) is the first suspect; among
    awake ranks it is the one that is behind the others.

    Args:
        directory: of the signs of life.
        world_size: how many there must be.
        now: seconds since the epoch.
        asleep_after_s: age in seconds of a sign of life after which its process counts as not running.
    """
    beats: dict[int, dict] = {}
    for rank in range(world_size):
        try:
            beats[rank] = json.loads(_beat_path(directory, rank).read_text())
        except (OSError, ValueError):
            return f"rank {rank} left no sign of life"
    asleep = {rank: beat for rank, beat in beats.items() if now - beat["awake_at"] > asleep_after_s}
    suspects = asleep or beats
    culprit = min(suspects, key=lambda rank: suspects[rank]["beat_at"])
    silent_s = now - beats[culprit]["beat_at"]
    state = "not running" if asleep else "running but behind"
    others = ", ".join(f"rank {rank} at {beat['where']}" for rank, beat in beats.items() if rank != culprit)
    return (
        f"silent rank {culprit} ({state}) was last seen {silent_s:.1f} s ago at {beats[culprit]['where']}"
        + (f"; {others}" if others else "")
    )


def _beat_path(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank:05d}.json"


def _dump_stacks(file: IO[str]) -> None:
    faulthandler.dump_traceback(file=file, all_threads=True)


def _end_process(message: str) -> None:
    print(f"fatal: {message}", file=sys.stderr, flush=True)
    os._exit(EXIT_HUNG)
