"""Fair timing: one child process per contestant, taking turns in ABBA order, compared by ratio.

In one process the thread pools of two libraries fight for the cores, and the clock of a busy machine drifts: a
contestant lives in a process of its own and sleeps while another runs, and orders alternate so that a drift
falls on all alike. Trust ratios, not milliseconds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_REPETITIONS_PER_TURN = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant over all its turns, and the memory that its first turn added.

    Attributes:
        minimum: fastest repetition.
        median: middle repetition.
        spread: (third quartile - first quartile) / median.
        extra_bytes: peak memory of the process above what it held after set-up.
    """

    minimum: float
    median: float
    spread: float
    extra_bytes: int


class Contestant:
    """A child process that times its own repetitions when asked."""

    def __init__(
        self,
        module: str,
        name: str,
        arguments: Sequence[str],
        num_threads: int,
        checkout: tuple[Path, str] | None = None,
    ) -> None:
        directory, own_name = checkout or (None, name)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(num_threads),
            "OPENBLAS_NUM_THREADS": str(num_threads),
        }
        self.name = name
        self.seconds: list[float] = []
        self.extra_bytes = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--contestant", own_name],
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def take_turn(self, repetitions: int) -> None:
        """Runs repetitions in the child and keeps their times."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{repetitions}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                answer = json.loads(line)
                self.seconds += answer["seconds"]
                self.extra_bytes = answer["extra_bytes"]
                return
        raise RuntimeError(f"contestant {self.name} ended with exit code {self._process.wait()}")

    def close(self) -> None:
        """Ends the child."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def timing(self) -> Timing:
        """Returns what the turns measured."""
        quartiles = statistics.quantiles(self.seconds, n=4)
        median = statistics.median(self.seconds)
        return Timing(min(self.seconds), median, (quartiles[2] - quartiles[0]) / median, self.extra_bytes)


def compare(
    module: str,
    names: Sequence[str],
    arguments: Sequence[str],
    *,
    num_rounds: int = 3,
    num_threads: int | None = None,
    checkouts: Mapping[str, tuple[Path, str]] | None = None,
) -> dict[str, Timing]:
    """Returns the timings of contestants that took turns forwards and backwards, `num_rounds` times.

    Args:
        module: module that calls `serve` when it is given `--contestant`.
        names: contestants.
        arguments: command line that every child gets.
        num_rounds: rounds of the order and its reverse.
        num_threads: threads of each child; None is the number of cores.
        checkouts: contestants that run in another checkout: its folder, and their names there.
    """
    threads = num_threads or os.cpu_count() or 1
    contestants = [
        Contestant(module, name, arguments, threads, (checkouts or {}).get(name)) for name in names
    ]
    try:
        for contestant in contestants:
            contestant.take_turn(1)
            contestant.seconds.clear()
        for _ in range(num_rounds):
            for contestant in [*contestants, *reversed(contestants)]:
                contestant.take_turn(_REPETITIONS_PER_TURN)
        return {contestant.name: contestant.timing() for contestant in contestants}
    finally:
        for contestant in contestants:
            contestant.close()


def serve(run: Callable[[], object], device: str = "cpu") -> None:
    """Child side: times `run` as often as each line of standard input asks; set up before calling.

    On a GPU a repetition ends when the device is done, and memory is what torch has allocated there.
    """
    meter = _Meter() if device == "cpu" else _GpuMeter()
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            run()
            meter.synchronize()
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds, "extra_bytes": meter.extra_bytes()}), flush=True)


class _Meter:
    """Peak memory of this process above what it holds now."""

    def __init__(self) -> None:
        self._before = _reset_peak()

    def synchronize(self) -> None:
        """The CPU is done when the call returns."""

    def extra_bytes(self) -> int:
        return _read_status_bytes("VmHWM") - self._before


class _GpuMeter(_Meter):
    """The same of torch's allocations on the current GPU."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda
        self._cuda.reset_peak_memory_stats()
        self._before = self._cuda.memory_allocated()

    def synchronize(self) -> None:
        self._cuda.synchronize()

    def extra_bytes(self) -> int:
        return self._cuda.max_memory_allocated() - self._before


def _read_status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; memory is measured on Linux only")


def _reset_peak() -> int:
    """Returns the memory in use, and makes it the peak from here on: set-up may have needed more for a moment."""
    Path("/proc/self/clear_refs").write_text("5")
    return _read_status_bytes("VmRSS")


def describe_noise() -> str:
    """Returns the load of the machine and a warning where it makes timings noisy."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    warning = " NOISY: other programs use the cores" if load > cores else ""
    return f"load average {load:.1f} on {cores} cores{warning}"
