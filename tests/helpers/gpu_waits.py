"""Where a program waits for the GPU, as torch tells it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Once a process torch also says that its debug mode finds not every "synchronizing operation": that is no wait.
_WAIT = "called a synchronizing CUDA operation"


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Collects the places of all waits inside."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{w.filename}:{w.lineno}" for w in caught if _WAIT in str(w.message)]
