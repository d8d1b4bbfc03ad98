"""Loader processes that neither die of the job's signals nor eat its memory."""

from __future__ import annotations

import signal
from pathlib import Path

import torch

_MIB = 1024 * 1024
_PAGE_BYTES = 4096


def start_worker(worker_id: int) -> None:
    """Prepares a loader process; the `worker_init_fn` of every DataLoader here.

    A cluster's SIGTERM and SIGUSR1/2 reach every process of a job. They ask the trainer to save: a loader that
    dies of them takes the last batches, and with them the emergency checkpoint, away. The trainer ends its loaders.
    SIGINT is ignored for the same reason: Ctrl-C belongs to the trainer.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def measure_rss_mib() -> float:
    """Returns this process's resident memory in MiB; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return pages * _PAGE_BYTES / _MIB
