"""Which code finds the largest logits of a batch: torch, or the Triton kernel where a timing shows that it pays."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import statistics
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..statistics import Collectives
from .sparse import TopLogits

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

logger = logging.getLogger(__name__)

KEPT = 32
"""Components of a row that the Triton kernel keeps; a power of two, for they live in registers."""
MAX_L1_ERROR = 5e-3
"""Largest L1 difference of a row's responsibilities for which a kernel counts as exact: the bar of benchmarks.gmm."""
_COMPARED_ROWS = 16
_WARM_UP_RUNS, _TIMED_RUNS = 2, 5


def find_obstacle(device: torch.device) -> str | None:
    """Returns why the Triton kernel cannot run on a device, or None where it can; imports nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return find_missing_tool() if device.type == "cuda" else f"the prototypes are on the device {device.type}"


def find_missing_tool() -> str | None:
    """Returns what Triton lacks on this machine to build the C code that starts its kernels, or None.

    Triton's own rule; what it has built once it keeps under ~/.triton, so that another machine may not need it.
    """
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
        return "no C compiler is found (CC, gcc or clang)"
    headers = Path(sysconfig.get_paths(scheme="posix_prefix")["include"])
    return None if (headers / "Python.h").is_file() else f"Python's headers are not in {headers}"


def require_kernel(kernel: str, device: torch.device, section: str = "prototypes") -> None:
    """Checks that the chosen kernel can run; `section` of the configuration names it.

    Raises:
        ValueError: "triton" without a GPU, without triton, or without what it builds with.
    """
    obstacle = find_obstacle(device) if kernel == "triton" else None
    if obstacle is not None:
        raise ValueError(
            f"{section}.gmm.kernel is triton and {obstacle}; expected a CUDA device, triton and a C compiler; "
            f"set {section}.gmm.kernel=auto"
        )


def choose_kernel(
    paths: Mapping[str, Callable[[], TopLogits]],
    collectives: Collectives,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> str:
    """Returns the faster of the paths "torch" and "triton", alike on every rank, and logs by how much.

    "triton" only where its responsibilities are within `MAX_L1_ERROR` of torch's on every rank. Collective, waited
    for; called once, at the start, with the first batch of an initialised mixture.

    Args:
        paths: what finds the largest logits of one and the same batch.
        collectives: times are averaged over all ranks.
        measure: returns the milliseconds of a call; by default the median of a few, the device waited for.
    """
    found = {name: path() for name, path in paths.items()}
    error = compute_l1_difference(found["torch"], found["triton"])
    device = error.device
    times = [(measure or _measure_ms)(paths[name]) for name in ("torch", "triton")]
    rows = torch.stack([error.float(), *(torch.tensor(ms, device=device) for ms in times)])
    gathered = collectives.start_gather(rows).wait()
    largest_error = float(gathered[:, 0].max())
    torch_ms, triton_ms = gathered[:, 1:].mean(0).tolist()
    faster, slower = ("triton", "torch") if triton_ms < torch_ms else ("torch", "triton")
    is_exact = largest_error <= MAX_L1_ERROR
    chosen = faster if is_exact else "torch"
    ratio = max(torch_ms, triton_ms) / min(torch_ms, triton_ms)
    logger.info(
        "E-step kernel: %s; torch %.3f ms, triton %.3f ms: %s is %.2fx faster than %s; responsibilities differ by "
        "%.1e in L1%s",
        *(chosen, torch_ms, triton_ms, faster, ratio, slower, largest_error),
        "" if is_exact else f", more than {MAX_L1_ERROR:g}, so triton is not used",
    )
    return chosen


def compute_l1_difference(first: TopLogits, second: TopLogits) -> Float[Tensor, ""]:
    """Returns the largest L1 difference of a row's responsibilities, of the components that both keep; 0 without rows.

    The two may keep different numbers: what only one keeps says nothing about the error of the other.
    """
    if len(first.component) == 0:
        return first.logit.new_zeros(())
    num_components = 1 + int(torch.stack([top.component.max() for top in (first, second)]).max())
    tables = []
    for top in (first, second):
        index, logit = top.component[:_COMPARED_ROWS], top.logit[:_COMPARED_ROWS]
        gamma = (logit - top.log_normaliser[:_COMPARED_ROWS, None]).exp()
        table = torch.full((len(index), num_components), torch.nan, device=gamma.device)
        tables.append(table.scatter_(1, index, gamma))
    return (tables[0] - tables[1]).abs().nansum(1).amax()


def _measure_ms(run: Callable[[], object]) -> float:
    """Returns the median milliseconds of a call, warmed up; waits for the device."""
    for _ in range(_WARM_UP_RUNS):
        run()
    times = []
    for _ in range(_TIMED_RUNS):
        _wait()
        started = time.perf_counter()
        run()
        _wait()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
