"""What this machine can do at most: bytes copied and products computed a second: python -m benchmarks._ceiling."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from runtime.usage import HelpFormatter


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks._ceiling", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    return parser.parse_args(arguments)


if __name__ == "__main__":  # usage and mistakes are answered before the slow imports
    parse(sys.argv[1:])

import torch

_COPY_BYTES = 2**28
_GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
_WARM_UPS, _REPETITIONS = 2, 5


def main() -> int:
    """Prints the ceilings of the device, one line."""
    device = parse(sys.argv[1:]).device
    bf16 = measure_product(device, torch.bfloat16)
    print(f"{measure(device)}, bf16 GEMM {bf16 / 1e9:.0f} GF/s")
    return 0


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
    """Returns the ceilings of `device`, best of a few."""
    source = torch.rand(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copy_s = _best(lambda: target.copy_(source), device)
    return Ceiling(2 * _COPY_BYTES / copy_s, measure_product(device, torch.float32))


def measure_product(device: str, dtype: torch.dtype) -> float:
    """Returns floating point operations a second of a large square product of random numbers, best of a few."""
    size = _GEMM_SIZE[device]
    square = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(square)
    return 2 * size**3 / _best(lambda: torch.mm(square, square, out=product), device)


def _best(run: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(_WARM_UPS + _REPETITIONS):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[_WARM_UPS:])


if __name__ == "__main__":
    sys.exit(main())
