"""Sinkhorn-Knopp: assignments that use every prototype equally, as one offset for each prototype's logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..statistics import Collectives, full_precision
from .logits import ChunkedLogits

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor


@torch.no_grad()
def compute_sinkhorn_offsets(
    logits: ChunkedLogits,
    num_iterations: int,
    collectives: Collectives,
    *,
    weight: Float[Tensor, " N"] | None = None,
    group: Int64[Tensor, " N"] | None = None,
    num_groups: int = 1,
) -> Float[Tensor, "G K"]:
    """Returns u with which targets = softmax(logits - u) share the rows' weight evenly among the prototypes.

    Starting from exp(logits), columns are divided by their sum over all ranks' rows and rows by their own, in turn,
    rows last (Cuturi 2013; SwAV, Caron et al. 2020; DINOv2; CAPI). What one iteration leaves of the one before is a
    number for each column and each row, so neither the logits nor the targets of all rows ever exist::

        u_k = log sum_n w_n exp(l_nk - v_n),    v_n = log sum_k exp(l_nk - u_k),    v = 0 at first

    In log space: at CAPI's temperature exp(logits) spans more than fp32 holds. Constant in w: targets do not depend on
    the weights' scale. Each iteration computes the logits once, if there are several chunks, and sends G * K
    doubles: ranks are summed in fp64, whose range makes one number for each group enough as the common exponent.
    Collective.

    Args:
        logits: logits / target temperature.
        num_iterations: at least 1.
        collectives: the exchange between ranks.
        weight: weight of each row, 0 for a row that is not there; None is 1 for every row.
        group: balance within groups 0 .. num_groups - 1 (token positions, as CAPI), of which a rank may lack some.
        num_groups: G, alike on all ranks.
    """
    offsets = torch.zeros(num_groups, logits.num_prototypes, device=logits.device)
    for iteration in range(num_iterations):
        log_sums = torch.full_like(offsets, -torch.inf)
        for chosen, chunk in logits:
            members = None if group is None else group[chosen]
            if iteration > 0:
                chunk = chunk - (chunk - pick_offsets(offsets, members)).logsumexp(1, keepdim=True)
            if weight is not None:
                chunk = chunk + weight[chosen, None].log()
            log_sums = torch.logaddexp(log_sums, _sum_rows(chunk, members, num_groups))
        offsets = _sum_ranks(log_sums, collectives)
    return offsets


def pick_offsets(
    offsets: Float[Tensor, "G K"], group: Int64[Tensor, " N"] | None
) -> Float[Tensor, "1 K"] | Float[Tensor, "N K"]:
    """Returns the offsets of each row, or those of all rows where there is one group."""
    return offsets if group is None else offsets[group]


def count_groups(group: Int64[Tensor, " N"], collectives: Collectives) -> int:
    """Returns 1 + the largest group of any rank's rows; 0 without rows. Collective; waits for the device."""
    last = torch.cat([group, group.new_full((1,), -1)]).max()
    return int(collectives.start_gather(last[None]).wait().max()) + 1


def _sum_rows(
    logits: Float[Tensor, "N K"], group: Int64[Tensor, " N"] | None, num_groups: int
) -> Float[Tensor, "G K"]:
    """Returns log sum exp over the rows of each group; -inf for one without rows.

    A group's sum is a matrix product with its members: the same bits each time, unlike adding by index on a GPU.
    """
    if group is None:
        return logits.logsumexp(0, keepdim=True)
    lowest = torch.finfo(logits.dtype).min
    largest = logits.new_full((num_groups, logits.shape[1]), lowest)
    largest = largest.scatter_reduce_(0, group[:, None].expand_as(logits), logits, "amax")
    members = F.one_hot(group, num_groups).T.to(logits.dtype)
    with full_precision(logits.device):
        return largest + (members @ (logits - largest[group]).exp()).log()


def _sum_ranks(log_sums: Float[Tensor, "G K"], collectives: Collectives) -> Float[Tensor, "G K"]:
    """Returns the logarithm of the sum over ranks; finite."""
    largest = log_sums.amax(1, keepdim=True).clamp_min(torch.finfo(log_sums.dtype).min)
    largest = collectives.start_gather(largest).wait().amax(0).double()
    total = collectives.start_sum((log_sums - largest).exp()).wait()
    return (largest + total.clamp_min(torch.finfo(total.dtype).tiny).log()).float()
