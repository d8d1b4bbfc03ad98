"""Responsibilities: tempered posteriors over the prototypes, in log space and in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def normalise_responsibilities_(
    log_joint: Float[Tensor, "N K"], beta: float = 1.0, penalty: Float[Tensor, " K"] | None = None
) -> Float[Tensor, "N K"]:
    """Turns log joint densities into responsibilities, in place, and returns them.

    gamma_ik = softmax_k(beta log rho_ik - penalty_k): the posterior of [pi_k p(h_i | k)]^beta (Ueda & Nakano
    1998, deterministic annealing EM). The row maximum is subtracted first, so a shift of the logits by any
    constant changes nothing and no row underflows to all zeros.

    Args:
        log_joint: log rho, fp32; overwritten.
        beta: inverse temperature, > 0.
        penalty: subtracted from the tempered logits, for balanced responsibilities.
    """
    if beta != 1.0:
        log_joint.mul_(beta)
    if penalty is not None:
        log_joint.sub_(penalty)
    log_joint.sub_(log_joint.amax(dim=1, keepdim=True)).exp_()
    return log_joint.div_(log_joint.sum(dim=1, keepdim=True))


def keep_largest_(responsibilities: Float[Tensor, "N K"], number: int) -> Float[Tensor, "N K"]:
    """Keeps each row's `number` largest responsibilities, renormalised, in place, and returns them."""
    values, index = responsibilities.topk(number, dim=1)
    values.div_(values.sum(dim=1, keepdim=True))
    return responsibilities.zero_().scatter_(1, index, values)


class AssignmentProbe(NamedTuple):
    """Sums over a few rows that describe how a batch was assigned; see `probe_assignments`."""

    log_likelihood: Tensor
    log_perplexity: Tensor


def probe_assignments(log_joint: Float[Tensor, "N K"], beta: float) -> AssignmentProbe:
    """Returns sums over rows of log p(h) at beta = 1 and of the entropy of the tempered posterior.

    Before the batch has moved the mixture, log p(h) is a held-out log-likelihood.
    """
    log_likelihood = torch.logsumexp(log_joint, dim=1)
    log_posterior = torch.log_softmax(beta * log_joint, dim=1)
    log_perplexity = -(log_posterior.exp() * log_posterior).sum(dim=1)
    return AssignmentProbe(log_likelihood.sum(), log_perplexity.sum())
