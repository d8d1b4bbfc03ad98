"""Memory and speed of the CARP loss beside the form that builds all logits: python -m benchmarks.loss."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable

from runtime.usage import HelpFormatter, positive


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--K", type=positive, default=65536, help="prototypes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.add_argument("--rounds", type=positive, default=2, help="rounds of both contestants")
    parser.add_argument("--contestant", choices=("ours", "whole"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":  # usage and mistakes are answered before the slow imports
    parse(sys.argv[1:])

import torch

from benchmarks._bars import judge
from benchmarks._timing import compare, describe_noise, serve
from prototypes.config import PartitionConfig
from prototypes.objectives.carp import carp_loss, count_blocks_per_chunk
from prototypes.objectives.partitions import draw_partition

MAX_MEMORY_SHARE = 0.5
NUM_VIEWS, NUM_SAMPLES, DIM, BLOCK_SIZE = 4, 32, 128, 512


def main() -> int:
    """Prints both contestants' times and memory; returns 1 if ours needs more than half the memory on a CPU."""
    arguments = parse(sys.argv[1:])
    if arguments.contestant:
        torch.manual_seed(0)
        # A small run first: modules loaded on first use are not the loss's memory.
        build = CONTESTANTS[arguments.contestant]
        build(2 * BLOCK_SIZE, arguments.device)()
        serve(build(arguments.K, arguments.device), arguments.device)
        return 0
    command = [f"--K={arguments.K}", f"--device={arguments.device}"]
    timings = compare("benchmarks.loss", ["ours", "whole"], command, num_rounds=arguments.rounds)
    ours, whole = timings["ours"], timings["whole"]
    share = ours.extra_bytes / max(whole.extra_bytes, 1)
    verdict = judge(share, arguments.device, most=MAX_MEMORY_SHARE)
    print(describe_noise())
    times = [
        f"{name} min {1e3 * timing.minimum:.0f} ms, {timing.extra_bytes / 2**20:.0f} MiB"
        for name, timing in timings.items()
    ]
    print(
        f"loss K={arguments.K} forward + backward | {' | '.join(times)} | "
        f"{whole.minimum / ours.minimum:.2f}x speed, {share:.2f}x memory | memory {verdict.text}"
    )
    return 0 if verdict.passed else 1


def build_ours(num_prototypes: int, device: str) -> Callable[[], object]:
    """As many blocks at a time as a run takes on the device: a few, recomputed in the backward pass, on a CPU."""
    student, teacher, prototypes, partition = make_inputs(num_prototypes, device)
    blocks = count_blocks_per_chunk(
        PartitionConfig(size=BLOCK_SIZE),
        num_rows=len(student.flatten(0, 1)) + len(teacher.flatten(0, 1)),
        num_parts=1,
        device=student.device,
    )

    def step() -> None:
        loss = carp_loss(student, teacher, prototypes, prototypes, partition, blocks_per_chunk=blocks)
        loss.total.backward()

    return step


def build_whole(num_prototypes: int, device: str) -> Callable[[], object]:
    """All logits of all views at once, as the formula is printed."""
    student, teacher, prototypes, partition = make_inputs(num_prototypes, device)
    eps = torch.finfo(torch.float32).eps

    def step() -> None:
        p = (student @ prototypes.T)[..., partition].softmax(-1)
        with torch.no_grad():
            q = (teacher @ prototypes.T)[..., partition].softmax(-1)
        pairs = [(i, j) for i in range(len(p)) for j in range(len(q)) if i != j]
        agreement = torch.stack([(p[i] * q[j]).sum(-1) for i, j in pairs])
        mean = (p.sum((0, 1)) + q.sum((0, 1))) / ((len(p) + len(q)) * p.shape[1])
        entropy = (math.log(BLOCK_SIZE) + (mean * mean.clamp(eps, 1 - eps).log()).sum(-1)).mean()
        (entropy - agreement.clamp(eps, 1 - eps).log().mean()).backward()

    return step


def make_inputs(
    num_prototypes: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns student and teacher projections, prototypes and a partition."""
    student = torch.randn(NUM_VIEWS, NUM_SAMPLES, DIM, device=device, requires_grad=True)
    teacher = torch.randn(2, NUM_SAMPLES, DIM, device=device)
    prototypes = torch.nn.functional.normalize(torch.randn(num_prototypes, DIM, device=device), dim=1)
    partition = draw_partition(num_prototypes, BLOCK_SIZE, seed=0, step=0, device=device)
    return student, teacher, prototypes, partition


CONTESTANTS: dict[str, Callable[[int, str], Callable[[], object]]] = {
    "ours": build_ours,
    "whole": build_whole,
}


if __name__ == "__main__":
    sys.exit(main())
