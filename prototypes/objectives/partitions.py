"""Random partitions of the prototypes, drawn alike on every rank without a message."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..random_numbers import make_generator

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor


def draw_partition(
    num_prototypes: int,
    size: int,
    *,
    seed: int,
    step: int,
    micro_step: int = 0,
    device: torch.device | str = "cpu",
) -> Int64[Tensor, "G S"]:
    """Returns a random partition of 0 .. num_prototypes - 1 in blocks of `size`.

    A pure function of (seed, step, micro_step): every rank draws the same partition and a resumed run draws
    it again. Not collective. Each prototype appears exactly once. Source: CARP (Silva & Ramirez Rivera
    2023), section 3; there, rank 0 draws and broadcasts.

    Args:
        num_prototypes: K.
        size: prototypes per block, N_B; divides K.
        seed: the run's seed.
        step: optimizer step.
        micro_step: number of the loss inside the step: 0 where all micro-batches share one, else the micro-batch.
        device: where the indices are put; they are always drawn on the CPU.

    Returns:
        Indices, int64 [K / size, size].

    Raises:
        ValueError: `size` does not divide `num_prototypes`.
    """
    if num_prototypes % size != 0:
        raise ValueError(
            f"prototypes.partition.size is {size}; expected a divisor of {num_prototypes}; "
            "set prototypes.partition.size"
        )
    generator = make_generator("partition", seed, step, micro_step)
    partition = torch.randperm(num_prototypes, generator=generator).view(-1, size)
    if torch.device(device).type == "cuda":
        partition = partition.pin_memory()  # or the copy would wait for everything that the device has to do
    return partition.to(device, non_blocking=True)
