"""Responsibilities: tempered posteriors over the prototypes, in log space and in place.

Where each rank holds a range of the prototypes (`across`), row maxima and sums run over all ranks' ranges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..statistics import Collectives

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor


_SOFTMAX_ELEMENTS = 2**19
_BLOCK = 512
_LOG_NOTHING = -80.0
"""exp of it is lost beside 1, and still no subnormal number, with which a CPU is fifty times slower."""


def normalise_responsibilities_(
    log_joint: Float[Tensor, "N K"],
    beta: float = 1.0,
    penalty: Float[Tensor, " K"] | None = None,
    across: Collectives | None = None,
) -> Float[Tensor, "N K"]:
    """Turns log joint densities into responsibilities, in place, and returns them.

    gamma_ik = softmax_k(beta log rho_ik - penalty_k): the posterior of [pi_k p(h_i | k)]^beta (Ueda & Nakano
    1998, deterministic annealing EM). The row maximum is subtracted first, so a shift of the logits by any
    constant changes nothing and no row underflows to all zeros.

    Args:
        log_joint: log rho, fp32; overwritten.
        beta: inverse temperature, > 0.
        penalty: subtracted from the tempered logits, for balanced responsibilities.
        across: collectives where K is this rank's range only; then collective, waited for twice.
    """
    if beta != 1.0:
        log_joint.mul_(beta)
    if penalty is not None:
        log_joint.sub_(penalty)
    if across is not None:
        log_joint.sub_(_row_max(log_joint, across)).exp_()
        return log_joint.div_(_row_sum(log_joint, across))
    # A few rows at a time: the temporary stays in the cache and nothing of size [N, K] is allocated.
    for rows in log_joint.split(tile_rows(log_joint)):
        rows.copy_(torch.softmax(rows, dim=1))
    return log_joint


def assign_hard_(
    log_joint: Float[Tensor, "N K"],
    penalty: Float[Tensor, " K"] | None = None,
    across: Collectives | None = None,
) -> Float[Tensor, "N K"]:
    """Turns logits into one-hot responsibilities of the row maximum, in place; ties are shared."""
    if penalty is not None:
        log_joint.sub_(penalty)
    log_joint.copy_(log_joint == _row_max(log_joint, across))
    return log_joint.div_(_row_sum(log_joint, across))


def count_winners_(
    hits: Float[Tensor, " K"],
    responsibilities: Float[Tensor, "N K"],
    weight: Float[Tensor, " N"],
    across: Collectives | None = None,
) -> None:
    """Adds to `hits` the rows, of those with a weight, that each prototype wins: the argmax over all of them.

    Where K is this rank's range only, a row counts on the rank that holds its winner: collective, waited for.
    """
    largest, winner = find_winners(responsibilities)
    counted = weight > 0
    if across is not None:
        counted &= across.start_gather(largest).wait().argmax(dim=0) == across.rank
    hits.scatter_add_(0, winner, counted.to(hits.dtype))


def find_winners(values: Float[Tensor, "N K"]) -> tuple[Float[Tensor, " N"], Int64[Tensor, " N"]]:
    """Returns maximum and argmax of each row.

    In two stages on a CPU, where a maximum with its index is several times as slow as one without: the largest block
    by its maximum alone, then the place in it.
    """
    width = values.shape[1]
    if values.device.type != "cpu" or width <= _BLOCK:
        return values.max(dim=1)
    num_blocks = width // _BLOCK
    best = values[:, : num_blocks * _BLOCK].unflatten(1, (num_blocks, _BLOCK)).amax(2)
    if width % _BLOCK:
        best = torch.cat([best, values[:, num_blocks * _BLOCK :].amax(1, keepdim=True)], dim=1)
    largest, block = best.max(dim=1)
    start = (block * _BLOCK).clamp_max(width - _BLOCK)[:, None]
    inside = values.gather(1, start + torch.arange(_BLOCK)).argmax(1)
    return largest, start.squeeze(1) + inside


def tile_rows(values: Float[Tensor, "N K"], across: Collectives | None = None) -> int:
    """Returns how many rows to make responsibilities of at a time: on a CPU what stays in its cache."""
    if across is not None or values.device.type != "cpu":
        return max(1, len(values))
    return max(1, _SOFTMAX_ELEMENTS // values.shape[1])


class AssignmentProbe(NamedTuple):
    """Sums over a few rows that describe how a batch was assigned; see `probe_assignments`."""

    log_likelihood: Tensor
    log_perplexity: Tensor


def probe_assignments(
    log_joint: Float[Tensor, "N K"],
    beta: float,
    penalty: Float[Tensor, " K"] | None = None,
    across: Collectives | None = None,
) -> AssignmentProbe:
    """Returns sums over rows of log p(h) at beta = 1 and of the entropy of the responsibilities.

    Before the batch has moved the mixture, log p(h) is a held-out log-likelihood.
    """
    log_likelihood = _log_normaliser(log_joint, across)
    tempered = beta * log_joint if penalty is None else beta * log_joint - penalty
    log_posterior = (tempered - _log_normaliser(tempered, across)).clamp_min_(_LOG_NOTHING)
    log_perplexity = -_row_sum(log_posterior.exp() * log_posterior, across)
    return AssignmentProbe(log_likelihood.sum(), log_perplexity.sum())


def _row_max(values: Float[Tensor, "N K"], across: Collectives | None) -> Float[Tensor, "N 1"]:
    largest = values.amax(dim=1, keepdim=True)
    return largest if across is None else across.start_gather(largest).wait().amax(dim=0)


def _row_sum(values: Float[Tensor, "N K"], across: Collectives | None) -> Float[Tensor, "N 1"]:
    total = values.sum(dim=1, keepdim=True)
    return total if across is None else across.start_sum(total).wait()


def _log_normaliser(values: Float[Tensor, "N K"], across: Collectives | None) -> Float[Tensor, "N 1"]:
    largest = _row_max(values, across)
    return largest + _row_sum((values - largest).clamp_min_(_LOG_NOTHING).exp_(), across).log()
