"""Time to count unique prototypes at all thresholds: python -m benchmarks.unique [--K 65536]."""

from __future__ import annotations

import argparse
import sys
import time

from runtime.usage import HelpFormatter, positive


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.unique", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--K", type=positive, default=65536, help="prototypes")
    parser.add_argument("--D", type=positive, default=256, help="their dimension")
    return parser.parse_args(arguments)


if __name__ == "__main__":  # usage and mistakes are answered before the slow imports
    parse(sys.argv[1:])

import torch

from benchmarks._ceiling import measure
from benchmarks._timing import describe_noise
from prototypes.diagnostics import count_unique

MAX_SECONDS = 60.0


def main() -> int:
    """Prints counts, seconds and the floor of the products; returns the exit code."""
    arguments = parse(sys.argv[1:])
    torch.manual_seed(0)
    prototypes = torch.randn(arguments.K, arguments.D)
    ceiling = measure()
    start = time.perf_counter()
    counts = count_unique(prototypes)
    seconds = time.perf_counter() - start
    floor_s = arguments.K**2 * arguments.D / ceiling.gemm_flops
    limit = MAX_SECONDS * (arguments.K / 65536) ** 2
    verdict = "PASS" if seconds <= max(limit, 1.0) else "FAIL"
    print(ceiling, "|", describe_noise())
    print(
        f"unique K={arguments.K} D={arguments.D} | {seconds:.1f} s ({seconds / floor_s:.1f}x floor) | {counts} | "
        f"{verdict} <= {max(limit, 1.0):.0f} s"
    )
    return 0 if verdict == "PASS" else 1


if __name__ == "__main__":
    sys.exit(main())
