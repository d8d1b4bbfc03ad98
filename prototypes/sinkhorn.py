"""Sinkhorn-Knopp: assignments that use every prototype equally."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from prototypes.statistics import Collectives

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor


def compute_sinkhorn_targets(
    logits: Float[Tensor, "N K"],
    weight: Float[Tensor, " N"],
    group: Int64[Tensor, " N"] | None,
    num_iterations: int,
    collectives: Collectives,
) -> Float[Tensor, "N K"]:
    """Returns targets whose rows sum to 1 and whose columns share the rows' weight evenly. Collective.

    Starting from exp(logits), columns are divided by their sum over all ranks' rows and rows by their own, in
    turn, rows last (Cuturi 2013; SwAV, Caron et al. 2020). Row scaling is divided out again, so each row's
    maximum is subtracted first and nothing overflows. K floats cross the wire per iteration and group.

    Args:
        logits: logits / target temperature, fp32.
        weight: weight of each row.
        group: balance within groups (token positions, as CAPI); every rank must hold the same set of groups.
            None: one group.
        num_iterations: at least 1.
        collectives: the exchange between ranks.
    """
    targets = (logits - logits.amax(dim=1, keepdim=True)).exp_()
    if group is None:
        return _balance_(targets, weight, num_iterations, collectives)
    for value in torch.unique(group).tolist():
        chosen = group == value
        targets[chosen] = _balance_(targets[chosen], weight[chosen], num_iterations, collectives)
    return targets


def _balance_(
    targets: Float[Tensor, "N K"],
    weight: Float[Tensor, " N"],
    num_iterations: int,
    collectives: Collectives,
) -> Float[Tensor, "N K"]:
    tiny = torch.finfo(targets.dtype).tiny
    for _ in range(num_iterations):
        column_sums = collectives.start_sum(weight @ targets).wait()
        targets.div_(column_sums.clamp_min(tiny))
        targets.div_(targets.sum(dim=1, keepdim=True).clamp_min(tiny))
    return targets
