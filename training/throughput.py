"""How fast a run is beside what its device can do: images a second, and shares of a measured product's speed."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

# Sides of the square matrices of a product, and for how long products are repeated: a second at most on a device of
# 2 TFLOP/s and more.
_SIDES = {("cuda", torch.bfloat16): 8192, ("cuda", torch.float32): 4096}
_SIDE_ELSEWHERE = 1024
_BUDGET_S = 0.2
_MOST_ROUNDS = 10


class Flops(NamedTuple):
    """Floating point operations of the networks for one image.

    Attributes:
        dense: student forward and backward on all crops, teacher forward on global crops.
        executed: the same with recomputed activations and exact accumulation's second forward pass.
    """

    dense: float
    executed: float


def measure_product_ceiling(
    device: torch.device, dtype: torch.dtype, *, side: int | None = None, budget_s: float = _BUDGET_S
) -> float:
    """Returns the FLOP/s of a square matrix product on this device: the best of a few, not what a data sheet says.

    Of random numbers, in the precision that the process allows (TF32 or not), with as many CPU threads as torch has.
    Waits for the device. Ranks that share a CPU share its ceiling if they measure together. Not collective.

    Args:
        device: where.
        dtype: of the matrices.
        side: of the matrices; None takes one that fills the device.
        budget_s: no product begins after so many seconds.
    """
    side = side or _SIDES.get((device.type, dtype), _SIDE_ELSEWHERE)
    generator = torch.Generator(device).manual_seed(0)  # the run's own generators stay as they are
    left, right = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    began, best = time.perf_counter(), float("inf")
    for round_number in range(_MOST_ROUNDS):
        _wait(device)
        started = time.perf_counter()
        torch.mm(left, right, out=product)
        _wait(device)
        finished = time.perf_counter()
        # The first one prepares: threads, kernels, workspaces.
        best = min(best, finished - started) if round_number else best
        if round_number and finished - began > budget_s:
            break
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Throughput:
    """The steps since the last line of the record, as figures.

    Args:
        global_batch_size: images of a step on all ranks.
        world_size: number of ranks.
        flops: of one image.
        ceiling: FLOP/s that one rank's device can do at most, from `measure_product_ceiling`.
    """

    def __init__(self, *, global_batch_size: int, world_size: int, flops: Flops, ceiling: float) -> None:
        self._global_batch_size = global_batch_size
        self._world_size = world_size
        self._flops = flops
        self._ceiling = ceiling
        self._num_steps, self._total_s = 0, 0.0

    def add(self, step_s: float) -> None:
        """Counts one step."""
        self._num_steps += 1
        self._total_s += step_s

    def read(self, waited_s: float) -> dict[str, float]:
        """Returns `throughput/...` of the steps since the last call.

        `mfu_dense` and `mfu_executed` are the networks' FLOPs a second and rank, as a share of the ceiling: what
        recomputation adds counts in the second alone. The mixture, the loss and the augmentation are in neither.

        Args:
            waited_s: seconds of them waited for data.
        """
        step_s = self._total_s / max(self._num_steps, 1)
        waited = waited_s / self._total_s if self._total_s else 0.0
        self._num_steps, self._total_s = 0, 0.0
        images_per_s = self._global_batch_size / step_s if step_s else 0.0
        share = images_per_s / self._world_size / self._ceiling
        return {
            "throughput/step_s": step_s,
            "throughput/images_per_s": images_per_s,
            "throughput/data_wait_fraction": waited,
            "throughput/mfu_dense": share * self._flops.dense,
            "throughput/mfu_executed": share * self._flops.executed,
            "throughput/ceiling_tflops": self._ceiling / 1e12,
        }
