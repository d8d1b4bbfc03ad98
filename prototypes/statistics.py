"""Hygiene of the observed rows, the flat buffer of sufficient statistics, and how ranks exchange them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@runtime_checkable
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

    def gather_rows(self, rows: Float[Tensor, "N F"]) -> Float[Tensor, "M F"]:
        """Returns all ranks' rows in rank order, whose numbers may differ. Collective, waits twice."""
        if self.world_size == 1:
            return rows
        count = torch.tensor([float(len(rows))], device=rows.device)
        counts = [int(value) for value in self.start_gather(count).wait().flatten().tolist()]
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: len(rows)] = rows
        gathered = self.start_gather(padded).wait()
        return torch.cat([gathered[rank, :number] for rank, number in enumerate(counts)])


class FlatStatistics:
    """The sufficient statistics of one step: named views of one buffer, so that one collective moves all.

    Allocated once and overwritten every step.

    Attributes:
        flat: the buffer, fp32.
        mass: w_k, summed responsibilities [K].
        moments: S_k = sum_i gamma_ik f(h_i) [K, F], centred before the exchange.
        tail: everything that is not indexed by K (row counts, probes, moments of rows and inputs), flat.
        sums: named views of the tail.
    """

    def __init__(self, num_prototypes: int, num_moments: int, dim: int, device: torch.device) -> None:
        shapes = {
            "mass": (num_prototypes,),
            "moments": (num_prototypes, num_moments),
            "sum_weight": (),
            "dropped": (),
            "num_bad": (),
            "num_probed": (),
            "log_likelihood": (),
            "log_perplexity": (),
            "sum_rows": (dim,),
            "sum_outer": (dim, dim),
            "sum_inputs": (dim,),
            "sum_input_squares": (dim,),
        }
        sizes = [prod(shape) for shape in shapes.values()]
        self.flat = torch.zeros(sum(sizes), device=device)
        parts = self.flat.split(sizes)
        views = [part.view(shape) for part, shape in zip(parts, shapes.values(), strict=True)]
        self.mass, self.moments = views[:2]
        self.tail = self.flat[sum(sizes[:2]) :]
        self.sums = dict(zip(list(shapes)[2:], views[2:], strict=True))


def find_finite(rows: Float[Tensor, "N P"], weight: Float[Tensor, " N"] | None) -> Bool[Tensor, " N"]:
    """Returns which rows have a finite squared length in fp32, and a finite weight.

    A row of 1e30 is finite itself, but its square would stay in the running variance for ever.
    """
    finite = rows.float().square().sum(dim=1).isfinite()
    return finite if weight is None else finite & weight.isfinite()


def drop_non_finite(
    rows: Float[Tensor, "N P"],
    weight: Float[Tensor, " N"] | None,
    read: Callable[[Tensor], int] = int,
) -> tuple[Float[Tensor, "M P"], Float[Tensor, " M"] | None, int]:
    """Returns the finite rows, their weights and the number of rows dropped.

    Rows are removed, not zeroed, so that the state is bitwise what it would be had they never been there. A
    row is also dropped when its weight is not finite. Waits for the device once.

    Args:
        rows: any values.
        weight: of the rows; None is 1.
        read: reads the number of rows dropped; whoever has more to read does it at once.
    """
    finite = find_finite(rows, weight)
    num_bad = read((~finite).sum())
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
