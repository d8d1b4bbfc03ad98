"""Hygiene of the observed rows, the flat buffer of sufficient statistics, and how ranks exchange them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> Tensor:
        """Returns the result once it is complete."""


ReduceSum = Callable[[Tensor], Handle]
Gather = Callable[[Tensor], Handle]


@dataclass
class _Done:
    result: Tensor

    def wait(self) -> Tensor:
        return self.result


@dataclass
class _Reshaped:
    handle: Handle
    shape: tuple[int, ...]

    def wait(self) -> Tensor:
        return self.handle.wait().view(self.shape)


@dataclass(frozen=True)
class Collectives:
    """The exchange between ranks, handed in as callables: this room knows no process group.

    Attributes:
        rank: this process's rank.
        world_size: number of ranks.
        reduce_sum: asynchronous in-place all-reduce(SUM).
        gather: asynchronous all-gather of equal shapes to [world_size, ...].
    """

    rank: int = 0
    world_size: int = 1
    reduce_sum: ReduceSum | None = None
    gather: Gather | None = None

    def __post_init__(self) -> None:
        if self.world_size > 1 and self.reduce_sum is None:
            raise ValueError(
                f"world_size is {self.world_size} without reduce_sum; expected a collective; pass reduce_sum"
            )

    def start_sum(self, tensor: Tensor) -> Handle:
        """Starts the sum over ranks of `tensor`, in place. Collective, asynchronous."""
        if self.world_size == 1 or self.reduce_sum is None:
            return _Done(tensor)
        return self.reduce_sum(tensor)

    def start_gather(self, tensor: Tensor) -> Handle:
        """Starts gathering equal shapes to [world_size, ...]. Collective, asynchronous."""
        if self.world_size == 1:
            return _Done(tensor.unsqueeze(0))
        if self.gather is not None:
            return self.gather(tensor)
        slots = tensor.new_zeros(self.world_size, *tensor.shape)
        slots[self.rank] = tensor
        return _Reshaped(self.start_sum(slots), tuple(slots.shape))

    def gather_rows(self, rows: Float[Tensor, "N P"]) -> Float[Tensor, "M P"]:
        """Returns all ranks' rows in rank order, whose numbers may differ. Collective, waits twice."""
        if self.world_size == 1:
            return rows
        count = torch.tensor([float(len(rows))], device=rows.device)
        counts = [int(value) for value in self.start_gather(count).wait().flatten().tolist()]
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: len(rows)] = rows
        gathered = self.start_gather(padded).wait()
        return torch.cat([gathered[rank, :number] for rank, number in enumerate(counts)])


@dataclass
class FlatStatistics:
    """Named views of one contiguous buffer, so that one collective moves them all.

    Attributes:
        shapes: shape of each view.
        flat: the buffer, fp32.
        views: view of each name.
    """

    shapes: Mapping[str, tuple[int, ...]]
    device: torch.device
    flat: Tensor = field(init=False)
    views: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        sizes = [prod(shape) for shape in self.shapes.values()]
        self.flat = torch.zeros(sum(sizes), device=self.device)
        parts = self.flat.split(sizes)
        self.views = {
            name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.views[name]


def drop_non_finite(
    rows: Float[Tensor, "N P"], weight: Float[Tensor, " N"] | None
) -> tuple[Float[Tensor, "M P"], Float[Tensor, " M"] | None, int]:
    """Returns the finite rows, their weights and the number of rows dropped.

    Rows are removed, not zeroed, so that the state is bitwise what it would be had they never been there. A
    row is also dropped when its weight is not finite. Waits for the device once.
    """
    finite = rows.isfinite().all(dim=1)
    if weight is not None:
        finite &= weight.isfinite()
    num_bad = int((~finite).sum())
    if num_bad == 0:
        return rows, weight, 0
    return rows[finite], None if weight is None else weight[finite], num_bad


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """fp32 as written: no autocast, no TF32, no bf16 products; the previous settings come back afterwards.

    The E-step adds terms of about 20 P nats that cancel: with TF32 the responsibilities are off by tens of
    percent at the variance floor.
    """
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    previous = cuda.fp32_precision, cpu.fp32_precision
    cuda.fp32_precision = cpu.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision = previous


def merge_moments(
    mean: Float[Tensor, "..."],
    variance: Float[Tensor, "..."],
    shift: Float[Tensor, "..."],
    spread: Float[Tensor, "..."],
    rate: Float[Tensor, ""],
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Returns the running mean and (co)variance after a batch with weight `rate`.

    mean' = mean + r s;  variance' = (1 - r) variance + r E[(x - mean)^2] - r^2 s^2, with s = E[x - mean]: no
    difference of large squares, exact for any rate.

    Args:
        mean: running mean.
        variance: running variance (same shape) or covariance (one axis more).
        shift: batch mean of x - mean.
        spread: batch mean of (x - mean)^2, or of its outer product.
        rate: weight of the batch, 0 to 1.
    """
    square = shift * shift if variance.shape == mean.shape else torch.outer(shift, shift)
    return mean + rate * shift, variance + rate * (spread - variance) - rate * rate * square
