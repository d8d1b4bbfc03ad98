"""Sinkhorn-Knopp: assignments that use every prototype equally."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..statistics import Collectives

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
    turn, rows last (Cuturi 2013; SwAV, Caron et al. 2020). In log space: at CAPI's temperature exp(logits) spans
    more than fp32 holds. 2 K floats cross the wire per iteration and group.

    Args:
        logits: logits / target temperature, fp32.
        weight: weight of each row.
        group: balance within groups 0, 1, ... (token positions, as CAPI), of which a rank may lack some: as many are
            gone through as any rank has. None: one group.
        num_iterations: at least 1.
        collectives: the exchange between ranks.
    """
    if group is None:
        return _balance(logits, weight, num_iterations, collectives).exp_()
    targets = torch.empty_like(logits)
    last = torch.cat([group, group.new_full((1,), -1)]).max()
    for value in range(int(collectives.start_gather(last[None]).wait().max()) + 1):
        chosen = group == value
        targets[chosen] = _balance(logits[chosen], weight[chosen], num_iterations, collectives).exp_()
    return targets


def _balance(
    log_targets: Float[Tensor, "N K"],
    weight: Float[Tensor, " N"],
    num_iterations: int,
    collectives: Collectives,
) -> Float[Tensor, "N K"]:
    for _ in range(num_iterations):
        log_targets = log_targets - _column_log_sums(log_targets, weight, collectives)
        log_targets = torch.log_softmax(log_targets, dim=1)
    return log_targets


def _column_log_sums(
    log_targets: Float[Tensor, "N K"], weight: Float[Tensor, " N"], collectives: Collectives
) -> Float[Tensor, " K"]:
    """Returns log sum_i weight_i exp(log_targets_ik) over all ranks' rows, which may be none here."""
    lowest = log_targets.new_full((1, log_targets.shape[1]), torch.finfo(log_targets.dtype).min)
    largest = torch.cat([log_targets, lowest]).amax(dim=0)
    largest = collectives.start_gather(largest).wait().amax(dim=0)
    total = collectives.start_sum(weight @ (log_targets - largest).exp()).wait()
    return largest + total.clamp_min(torch.finfo(total.dtype).tiny).log()
