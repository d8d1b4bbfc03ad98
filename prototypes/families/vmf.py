"""The von Mises-Fisher mixture: directions with a concentration, for rows of unit length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..mixture.model import Components
from ..mixture.online_em import OnlineMixture

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


class VonMisesFisherMixture(OnlineMixture):
    """Online EM of a von Mises-Fisher mixture (Banerjee et al. 2005), half the state of the Gaussian one.

    log rho_ik = log pi_k + kappa_k mu_k . h_i + log C_P(kappa_k). `means` holds the mean resultant vector of
    each component: its direction is mu_k, its length R_k gives kappa_k ~ R (P - R^2) / (1 - R^2), so first
    moments are all the statistics there are. kappa stays below P / (floor tr Cov), the counterpart of the
    variance floor.
    """

    name = "vmf"

    @property
    def num_statistics(self) -> int:
        """First moments only."""
        return self.dim

    @property
    def moves_together(self) -> bool:
        """The largest concentration is that of the rows' variance, which moves with every step."""
        return True

    def reference(self) -> Float[Tensor, " P"]:
        """Returns zero: lengths are measured from the origin."""
        return torch.zeros_like(self.row_mean)

    def reset_components(self) -> None:
        """Shortens the means to the concentration P / tr Cov: as wide as a Gaussian with the rows' variance."""
        concentration = self.dim / self.row_variance.sum()
        length = compute_resultant_length(concentration, self.dim)
        self.means.mul_(length / torch.linalg.vector_norm(self.means, dim=1, keepdim=True))

    def restart_components_(self, index: Int64[Tensor, " R"]) -> None:
        """Shortens moved components to the median length."""
        super().restart_components_(index)
        length = torch.linalg.vector_norm(self.means, dim=1).median()
        self.means[index] = torch.nn.functional.normalize(self.means[index], dim=1) * length

    def component_variances(self) -> Float[Tensor, "K P"]:
        """Returns (1 - R^2) / P, the spread of unit rows around their mean, alike in every dimension."""
        spread = (1 - self.means.square().sum(1, keepdim=True)).clamp_min(0) / self.dim
        return spread.expand(self.num_prototypes, self.dim)

    def split_components_(
        self, children: Int64[Tensor, " R"], parents: Int64[Tensor, " R"], offset: Float[Tensor, "R P"]
    ) -> None:
        """Splits components; both halves keep the parent's length, so its concentration."""
        length = torch.linalg.vector_norm(self.means[parents], dim=1, keepdim=True)
        super().split_components_(children, parents, offset)
        for half in (children, parents):
            self.means[half] = torch.nn.functional.normalize(self.means[half], dim=1) * length

    def row_features(self, rows: Float[Tensor, "N P"]) -> Float[Tensor, "N P"]:
        """Returns h."""
        return rows

    def natural_parameters(self, chunk: Components) -> tuple[Float[Tensor, "k P"], Float[Tensor, " k"]]:
        """Returns (kappa mu, log C_P(kappa))."""
        lengths = torch.linalg.vector_norm(self.means[chunk], dim=1)
        largest = self.dim / (self.gmm.variance.floor * self.row_variance.sum())
        if self.gmm.tied_concentration:
            lengths = lengths.new_full(lengths.shape, 1.0) * self._mean_length()
        concentration = self._shrink(compute_concentration(lengths, self.dim), self.counts[chunk])
        concentration = torch.minimum(concentration, largest)
        directions = torch.nn.functional.normalize(self.means[chunk], dim=1)
        return directions * concentration[:, None], compute_log_normaliser(concentration, self.dim)

    def _shrink(self, concentration: Float[Tensor, " k"], counts: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Returns kappa with 1 / kappa = (n / kappa + k0 tr Cov / P) / (n + k0), as a Gaussian's variance is shrunk.

        A few rows are always long on average: without it a young component is far too concentrated.
        """
        prior = self.gmm.variance.shrinkage * self.memory
        if prior == 0 or self.gmm.tied_concentration:
            return concentration
        spread = torch.lerp(1 / concentration, self.row_variance.mean(), prior / (counts + prior))
        return 1 / spread

    def _mean_length(self) -> Float[Tensor, ""]:
        return (self.mixing_weights * torch.linalg.vector_norm(self.means, dim=1)).sum()

    def centre_statistics_(
        self, chunk: Components, mass: Float[Tensor, " k"], statistics: Float[Tensor, "k M"]
    ) -> None:
        """Replaces S1 by T1 = S1 - w mu, in place."""
        statistics.sub_(mass[:, None] * self.means[chunk])

    def m_step(
        self,
        chunk: Components,
        rate: Float[Tensor, " k"],
        mass: Float[Tensor, " k"],
        statistics: Float[Tensor, "k M"],
        out: dict[str, Tensor],
    ) -> None:
        """Moves the mean resultant vectors by rho T1 / w."""
        self.move_means(chunk, rate, mass, statistics, out)


def compute_concentration(lengths: Float[Tensor, " k"], dim: int) -> Float[Tensor, " k"]:
    """Returns kappa ~ R (P - R^2) / (1 - R^2) from the mean resultant length (Banerjee et al. 2005, eq. 4.4)."""
    lengths = lengths.clamp(1e-6, 1 - 1e-6)
    return lengths * (dim - lengths.square()) / (1 - lengths.square())


def compute_resultant_length(concentration: Float[Tensor, ""], dim: int) -> Float[Tensor, ""]:
    """Returns the R whose `compute_concentration` is `concentration`, by bisection: the cubic has one root."""
    low, high = torch.zeros_like(concentration), torch.ones_like(concentration)
    for _ in range(40):
        middle = (low + high) / 2
        is_above = compute_concentration(middle, dim) > concentration
        low, high = torch.where(is_above, low, middle), torch.where(is_above, middle, high)
    return low


def compute_log_normaliser(concentration: Float[Tensor, " k"], dim: int) -> Float[Tensor, " k"]:
    """Returns log C_P(kappa) = nu log kappa - P/2 log 2 pi - log I_nu(kappa), nu = P/2 - 1.

    I_nu by its uniform asymptotic expansion to second order (Abramowitz & Stegun 9.7.7), with nu log kappa
    cancelled by hand: fp32 would lose it at P = 256. Relative error of I below 1e-3 from P = 8 on.
    """
    order = dim / 2 - 1
    ratio = concentration / order
    root = (1 + ratio.square()).sqrt()
    # nu log kappa - nu (root + log(ratio / (1 + root))) = nu (log nu + log(1 + root) - root)
    leading = order * (math.log(order) + torch.log1p(root) - root)
    inverse = 1 / root
    first = (3 * inverse - 5 * inverse**3) / 24
    second = (81 * inverse**2 - 462 * inverse**4 + 385 * inverse**6) / 1152
    correction = torch.log1p(first / order + second / order**2)
    prefactor = -0.5 * math.log(2 * math.pi * order) - 0.5 * root.log()
    return leading - prefactor - correction - dim / 2 * math.log(2 * math.pi)
