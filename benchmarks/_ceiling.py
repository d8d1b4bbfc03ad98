"""What this machine can do at most: bytes copied and products computed a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_COPY_BYTES = 2**28
_GEMM_SIZE = 2048


@dataclass(frozen=True)
class Ceiling:
    """Measured ceilings: bytes read plus written a second, fp32 floating point operations a second."""

    copy_bytes_per_s: float
    gemm_flops: float

    def seconds(self, num_bytes: float, flops: float) -> float:
        """Returns the least time of a piece of work: the slower of its bytes and its products."""
        return max(num_bytes / self.copy_bytes_per_s, flops / self.gemm_flops)

    def __str__(self) -> str:
        return f"ceilings: copy {self.copy_bytes_per_s / 1e9:.1f} GB/s, fp32 GEMM {self.gemm_flops / 1e9:.0f} GF/s"


def measure(device: str = "cpu") -> Ceiling:
    """Returns the ceilings of `device`, best of five."""
    source = torch.rand(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    square = torch.rand(_GEMM_SIZE, _GEMM_SIZE, device=device)
    product = torch.empty_like(square)
    copy_s = _best(lambda: target.copy_(source), device)
    gemm_s = _best(lambda: torch.mm(square, square, out=product), device)
    return Ceiling(2 * _COPY_BYTES / copy_s, 2 * _GEMM_SIZE**3 / gemm_s)


def _best(run: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
