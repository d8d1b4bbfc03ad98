"""The inverse temperature beta of the responsibilities, and the critical value below which means merge."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from .config import AnnealingConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

logger = logging.getLogger(__name__)

CRITICAL_REFRESH_STEPS = 100
_NO_ROOM = 0.5


def compute_critical_beta(covariance: Float[Tensor, "P P"]) -> float:
    """Returns beta_c = 1 / lambda_max(Corr): below it the only fixed point of EM is "all means equal".

    Around the merged state mu_k = m + delta_k one EM step gives delta' = beta Cov Sigma^-1 delta; with
    Sigma = diag(Cov) the merged state is stable iff beta lambda_max(Corr) < 1. Computed in fp64 on the CPU;
    waits for the device. Source: Rose 1998, Ueda & Nakano 1998; derivation ours. Where the covariance has
    overflowed nothing is known: 0, which guards nothing.

    Args:
        covariance: running covariance of the observed rows.
    """
    covariance = covariance.detach().to("cpu", torch.float64)
    scale = covariance.diagonal().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    correlation = covariance * scale[:, None] * scale[None, :]
    if not bool(correlation.isfinite().all()):
        return 0.0
    return 1.0 / max(float(torch.linalg.eigvalsh(correlation)[-1]), 1.0)


class Annealing:
    """The schedule of beta; plain floats, the same on every rank.

    Attributes:
        beta: inverse temperature of the next E-step.
        beta_critical: last critical value.
    """

    def __init__(self, config: AnnealingConfig, total_steps: int) -> None:
        self.config = config
        self.num_steps = config.fraction * total_steps
        self.beta_critical = 0.0
        self.start = config.end if config.start is None else config.start
        self.beta = config.end

    def begin(self, beta_critical: float) -> None:
        """Fixes the start of the schedule from the first critical value."""
        self.beta_critical = beta_critical
        if self.config.start is None:
            self.start = min(1.0, max(0.3, 3 * beta_critical))
        if self.config.schedule != "constant" and beta_critical > _NO_ROOM:
            logger.warning(
                "no room to anneal: beta_critical is %.2f, so beta stays between %.2f and 1",
                beta_critical,
                min(1.0, 2 * beta_critical),
            )
        self.beta = self._guarded(self.config.end if self.config.schedule == "constant" else self.start)

    def advance(self, step: int) -> None:
        """Sets beta for `step`."""
        progress = min(1.0, step / self.num_steps) if self.num_steps > 0 else 1.0
        is_constant = self.config.schedule == "constant"
        end = self.config.end
        self.beta = self._guarded(end if is_constant else self.start * (end / self.start) ** progress)

    def _guarded(self, beta: float) -> float:
        if self.config.guard == "critical":
            return max(beta, min(1.0, 2 * self.beta_critical))
        return beta

    def state(self) -> dict[str, float]:
        """Returns the floats that a resumed run needs."""
        return {"beta": self.beta, "beta_critical": self.beta_critical, "beta_start": self.start}

    def load(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.beta, self.beta_critical = float(state["beta"]), float(state["beta_critical"])
        self.start = float(state["beta_start"])
