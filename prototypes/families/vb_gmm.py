"""Online variational Bayes of the diagonal Gaussian mixture: Dirichlet weights, Normal-Gamma components."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..mixture.model import Components
from .gmm_diag import DiagonalGmm

if TYPE_CHECKING:
    from jaxtyping import Float


class VariationalGmm(DiagonalGmm):
    """The diagonal mixture whose E-step takes expectations over a posterior (Hoffman et al. 2013; Sato 2001).

    State and M-step are the Gaussian mixture's: with the running sufficient statistics (n, mean, variance) the
    conjugate posterior is a closed form, and the responsibility-based rate is the natural-gradient step. With
    kappa = kappa0 + n, m = n mu / kappa, a = a0 + n/2, b = b0 + n var/2 + kappa0 n mu^2 / (2 kappa), mu shifted
    by the rows' mean (the prior's mean)::

        E[log rho] = E[log pi] + 1/2 sum_d [ psi(a) - log b - log 2 pi - 1/kappa - (a/b) (h - m)^2 ]
        E[log pi_k] = psi(alpha_k) - psi(sum alpha),   alpha_k = alpha0 + pi_k M K

    a0 = max(1, shrinkage M / 2) and b0 = a0 gvar take the place of shrinkage: the prior's variance is the rows'.
    """

    name = "vb_gmm"

    def reference(self) -> Float[Tensor, " P"]:
        """Returns the running mean itself, which the prior's mean is."""
        return self.row_mean

    @property
    def moves_together(self) -> bool:
        """The prior is the rows' mean and variance, which move with every step."""
        return True

    def natural_parameters(self, chunk: Components) -> tuple[Float[Tensor, "k F"], Float[Tensor, " k"]]:
        """Returns theta and bias of the expected log density."""
        config = self.gmm.variational
        counts = self.counts[chunk, None]
        shifted = self.means[chunk] - self.reference()
        strength = config.mean_strength + counts
        means = shifted * (counts / strength)
        shape = max(1.0, self.gmm.variance.shrinkage * self.memory / 2) + counts / 2
        prior_rate = (shape - counts / 2) * self.row_variance
        spread = self.variances[chunk] + config.mean_strength / strength * shifted.square()
        gamma_rate = prior_rate + 0.5 * counts * spread
        precision = shape / gamma_rate
        linear = precision * means
        expected_log = (torch.digamma(shape) - gamma_rate.log()).sum(1)
        constant = self.dim * (math.log(2 * math.pi) + 1 / strength.squeeze(1))
        bias = 0.5 * (expected_log - constant - torch.linalg.vecdot(linear, means))
        return torch.cat([linear, precision], dim=1), bias

    def log_mixing_weights(self, chunk: Components) -> Float[Tensor, " k"]:
        """Returns E[log pi] under the Dirichlet posterior."""
        evidence = self.memory * self.num_prototypes
        prior = self.gmm.variational.weight_concentration
        total = torch.tensor(evidence + prior * self.num_prototypes).to(self.means)
        return torch.digamma(prior + evidence * self.mixing_weights[chunk]) - torch.digamma(total)
