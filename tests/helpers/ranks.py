"""Starts a module on several gloo ranks of this machine, with a deadline: a hung collective fails a test."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from runtime.rendezvous import free_port
from tests.helpers import starts


def start_ranks(
    module: str,
    arguments: list[str],
    world_size: int,
    *,
    environment: dict[str, str] | None = None,
    log_dir: Path,
    forked: bool = True,
) -> list[starts.Started | subprocess.Popen]:
    """Starts `python -m module arguments` as ranks 0 .. world_size - 1; output goes to log_dir/rank-N.log.

    With `forked` the ranks come with their libraries loaded, see `tests.helpers.starts`; not where they use a GPU.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    shared = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(log_dir / "torch_extensions"),
        **(environment or {}),
    }
    processes: list[starts.Started | subprocess.Popen] = []
    for rank in range(world_size):
        with (log_dir / f"rank-{rank}.log").open("w") as log:
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if forked:
                processes.append(starts.start(module, arguments, environment=own, stdout=log, stderr=log))
                continue
            command = [sys.executable, "-m", module, *arguments]
            own = {**os.environ, **own}
            processes.append(subprocess.Popen(command, env=own, cwd=starts.ROOT, stdout=log, stderr=log))
    return processes


def wait_for_ranks(processes: list[starts.Started | subprocess.Popen], timeout_s: float) -> list[int]:
    """Returns the exit codes; a rank that is still running at the deadline is killed and counts as -9."""
    deadline = time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.02)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return [process.wait() for process in processes]


def run_ranks(
    module: str,
    arguments: list[str],
    world_size: int,
    *,
    log_dir: Path,
    environment: dict[str, str] | None = None,
    timeout_s: float = 180.0,
    forked: bool = True,
) -> None:
    """Runs a module on all ranks and fails with the logs' ends unless every rank exits with 0."""
    processes = start_ranks(
        module, arguments, world_size, environment=environment, log_dir=log_dir, forked=forked
    )
    codes = wait_for_ranks(processes, timeout_s)
    if any(codes):
        logs = [
            f"rank {rank}:\n{(log_dir / f'rank-{rank}.log').read_text()[-4000:]}"
            for rank in range(world_size)
        ]
        raise AssertionError(f"exit codes {codes}\n" + "\n".join(logs))
