"""How ranks share one step's observations: sum statistics, gather rows, split prototypes, gather responsibilities.

All give the same candidate up to rounding; they differ in what crosses the wire and who computes what.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..random_numbers import make_generator
from ..statistics import Collectives, FlatStatistics, Handle
from .config import GmmConfig, SynchronizationConfig
from .sparse import LARGEST, SparseResponsibilities

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

logger = logging.getLogger(__name__)

PROBE_SUMS = ("num_bad", "num_probed", "log_likelihood", "log_perplexity")
_LARGEST_EXACT = 2**24
_FLOPS = 5e13
"""fp32 products a second assumed by the cost rule; one data-centre GPU without TF32."""


class Exchange:
    """The exchange of one mixture; `method` is never "auto" here.

    Attributes:
        method: "all_reduce", "all_gather", "sharded" or "sparse".
        own: range of prototypes whose responsibilities this rank computes.
        counts_rows: whether this rank counts the rows it computes: where every rank computes all, the first does.
        is_local: whether a rank computes the responsibilities of its own rows, and not of all ranks' rows.
        needs_table: whether statistics cross the wire as tables of all prototypes.
    """

    def __init__(
        self, config: SynchronizationConfig, collectives: Collectives, num_prototypes: int, method: str
    ) -> None:
        self.config = config
        if method == "sparse" and num_prototypes > _LARGEST_EXACT:
            raise ValueError(
                f"prototypes.num_prototypes is {num_prototypes}; expected at most {_LARGEST_EXACT} with sparse "
                "statistics; set prototypes.gmm.synchronization.method=all_reduce"
            )
        self.collectives = collectives
        self.num_prototypes = num_prototypes
        is_alone = collectives.world_size == 1 and config.reduction != "fixed_order"
        self.method = "all_reduce" if is_alone else method
        self.counts_rows = self.method != "all_gather" or collectives.rank == 0
        self.is_local = self.method in ("all_reduce", "sparse")
        self.needs_table = self.method in ("all_reduce", "sharded") and collectives.world_size > 1
        self.own = slice(0, num_prototypes)
        if self.method == "sharded":
            share, remainder = divmod(num_prototypes, collectives.world_size)
            if remainder:
                raise ValueError(
                    f"prototypes.num_prototypes is {num_prototypes}; expected a multiple of the "
                    f"{collectives.world_size} ranks for sharded statistics; set "
                    "prototypes.gmm.synchronization.method=all_reduce"
                )
            self.own = slice(collectives.rank * share, (collectives.rank + 1) * share)

    def share_rows(
        self, inputs: Float[Tensor, "N P"], weight: Float[Tensor, " N"]
    ) -> tuple[Float[Tensor, "M P"], Float[Tensor, " M"]]:
        """Returns the rows whose statistics this rank computes, and their weights.

        Its own rows for "all_reduce" and "sparse"; all ranks' rows otherwise, which is collective and waited for. With
        `reduction: fixed_order` they are sorted by their bits, so that the sums do not depend on which rank
        saw which row.
        """
        if self.is_local:
            return inputs, weight
        both = torch.cat([inputs, weight[:, None]], dim=1)
        both = self.collectives.gather_rows(both)
        if self.config.reduction == "fixed_order":
            both = _sort_rows(both)
        return both[:, :-1], both[:, -1]

    def reduce_over_prototypes(self) -> Collectives | None:
        """Returns the collectives with which row maxima and sums run over all ranks' prototypes, or None."""
        return self.collectives if self.method == "sharded" else None

    def start(self, statistics: FlatStatistics, num_bad: int) -> Handle:
        """Starts the exchange of the statistics; `wait` leaves them complete in `statistics`. Collective.

        With "sparse" their sum, as with "all_reduce": steps that leave nothing out have no few entries to gather.
        """
        statistics.sums["num_bad"].fill_(float(num_bad))
        if self.method == "all_reduce" and self.config.reduction == "fp64":
            return _Rounded(self.collectives.start_sum(statistics.flat.double()), statistics)
        if self.is_local:
            return _InPlace(self.collectives.start_sum(statistics.flat), statistics.flat)
        bad = statistics.sums["num_bad"]
        counted = self.collectives.start_sum(bad.clone())
        if self.method == "all_gather":
            return _Gathered([(counted, bad)], statistics)
        mass, moments = statistics.mass, statistics.moments
        return _Gathered(
            [
                (counted, bad),
                (self.collectives.start_gather(mass[self.own].clone()), mass),
                (self.collectives.start_gather(moments[self.own].clone()), moments),
            ],
            statistics,
        )

    def start_entries(
        self,
        inputs: Float[Tensor, "N P"],
        weight: Float[Tensor, " N"],
        found: SparseResponsibilities,
        sums: dict[str, Tensor],
        num_bad: int,
    ) -> Entries:
        """Starts gathering rows, weights and responsibilities of all ranks: N W (P + 2 + 2 m) 4 bytes received.

        Collective; waits for how many rows and places each rank has, which are padded to the most.
        """
        assert found.component is not None
        sums["num_bad"].fill_(float(num_bad))
        sizes = inputs.new_tensor([len(inputs), found.component.shape[1]])
        header = torch.cat([sizes, torch.stack([sums[name] for name in PROBE_SUMS])])
        gathered = self.collectives.start_gather(header).wait()
        counts, widths = gathered[:, :2].T.to(torch.int64).tolist()
        width = max(widths)
        packed = inputs.new_zeros(max(1, *counts), inputs.shape[1] + 2 + 2 * width)
        parts = packed[: len(inputs)].split([inputs.shape[1], 1, 1, width, width], dim=1)
        places = slice(0, found.component.shape[1])
        for part, values in zip(parts[:3], (inputs, weight[:, None], found.dropped[:, None]), strict=True):
            part.copy_(values)
        # Numbers of components travel as floats: a sum of bit patterns, where no gather is given, would spoil them.
        parts[3][:, places], parts[4][:, places] = found.component.to(packed.dtype), found.gamma
        return Entries(self.collectives.start_gather(packed), counts, width, gathered[:, 2:].sum(0))


@dataclass
class Entries:
    """All ranks' rows and responsibilities under way.

    Attributes:
        handle: gathering [W, N, P + 2 + 2 m].
        counts: rows of each rank.
        width: places of a row, m.
        sums: sums over ranks of `PROBE_SUMS`.
    """

    handle: Handle
    counts: list[int]
    width: int
    sums: Tensor

    def wait(self) -> Tensor:
        """Returns what was gathered, rows of all ranks in rank order, [M, P + 2 + 2 m]."""
        gathered = self.handle.wait()
        return torch.cat([gathered[rank, :number] for rank, number in enumerate(self.counts)])

    def unpack(self, gathered: Float[Tensor, "M F"]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns (inputs, weight, dropped, index, responsibilities) from what `wait` returned."""
        dim = gathered.shape[1] - 2 - 2 * self.width
        inputs, weight, dropped, index, gamma = gathered.split([dim, 1, 1, self.width, self.width], dim=1)
        return inputs, weight.squeeze(1), dropped.squeeze(1), index.to(torch.int64), gamma


@dataclass
class _InPlace:
    handle: Handle
    target: Tensor

    def wait(self) -> Tensor:
        reduced = self.handle.wait()
        if reduced.data_ptr() != self.target.data_ptr():
            self.target.copy_(reduced)
        return self.target


@dataclass
class _Rounded:
    handle: Handle
    statistics: FlatStatistics

    def wait(self) -> Tensor:
        return self.statistics.flat.copy_(self.handle.wait())


@dataclass
class _Gathered:
    parts: list[tuple[Handle, Tensor]]
    statistics: FlatStatistics

    def wait(self) -> Tensor:
        for handle, target in self.parts:
            target.copy_(handle.wait().reshape(target.shape))
        return self.statistics.flat


def choose_method(
    gmm: GmmConfig,
    *,
    num_prototypes: int,
    dim: int,
    rows_per_rank: int,
    world_size: int,
) -> str:
    """Returns the method to use and logs the cost rule's advice, in milliseconds a step.

    The rule adds the products and the part of the wire time that the student's forward pass does not hide::

        all_reduce  8 n K P / F       + max(0, 2 (K (2 P + 1)) 4 / bw - overlap)
        all_gather  8 n W K P / F     + n W P 4 / bw
        sharded     8 n W K P / (F W) + n W P 4 / bw + max(0, K (2 P + 1) 4 / bw - overlap)
        sparse      4 n K P / F + 4 n W m P / F + max(0, n W (P + 2 + 2 m) 4 / bw - overlap)

    with m responsibilities a row (`sparse.LARGEST`, the most). "auto" takes the cheapest, once: the choice is kept in
    the state.
    """
    config = gmm.synchronization
    if world_size == 1 or config.reduction == "fixed_order":
        return "all_gather" if config.reduction == "fixed_order" else "all_reduce"
    costs = estimate_costs(
        config, num_prototypes=num_prototypes, dim=dim, rows_per_rank=rows_per_rank, world_size=world_size
    )
    if num_prototypes % world_size:
        del costs["sharded"]
    if gmm.sparse.threshold == 0 or gmm.forgetting == "uniform":
        del costs["sparse"]
    advised = min(costs, key=lambda method: costs[method])
    chosen = advised if config.method == "auto" else config.method
    logger.info(
        "prototype statistics: %s; the cost rule advises %s (%s)",
        chosen,
        advised,
        ", ".join(f"{method} {1e3 * cost:.2f} ms" for method, cost in costs.items()),
    )
    return chosen


def estimate_costs(
    config: SynchronizationConfig, *, num_prototypes: int, dim: int, rows_per_rank: int, world_size: int
) -> dict[str, float]:
    """Returns the estimated exposed seconds a step of each method; see `choose_method`."""
    bandwidth = config.bandwidth_gb_per_s * 1e9
    products = 8 * rows_per_rank * num_prototypes * dim / _FLOPS
    statistics_s = num_prototypes * (2 * dim + 1) * 4 / bandwidth
    rows_s = rows_per_rank * world_size * dim * 4 / bandwidth
    overlap_s = config.overlap_ms * 1e-3
    entries = rows_per_rank * world_size * LARGEST
    entries_s = rows_s + (rows_per_rank * world_size * 2 + 2 * entries) * 4 / bandwidth
    return {
        "all_reduce": products + max(0.0, 2 * statistics_s - overlap_s),
        "all_gather": world_size * products + rows_s,
        "sharded": products + rows_s + max(0.0, statistics_s - overlap_s),
        "sparse": products / 2 + 4 * entries * dim / _FLOPS + max(0.0, entries_s - overlap_s),
    }


def _sort_rows(rows: Float[Tensor, "N F"]) -> Float[Tensor, "N F"]:
    """Returns the rows sorted by a hash of their bits: an order that depends on the set of rows alone."""
    bits = rows.contiguous().view(torch.int32).to(torch.int64)
    odd = torch.randint(1, 2**62, (rows.shape[1],), generator=make_generator("row order")) * 2 + 1
    return rows[torch.argsort((bits * odd.to(rows.device)).sum(1), stable=True)]
