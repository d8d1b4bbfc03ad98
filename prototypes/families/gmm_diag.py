"""The diagonal Gaussian mixture: the estimator of the paper."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..mixture.model import Components
from ..mixture.online_em import OnlineMixture

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

_LOG_2PI = math.log(2 * math.pi)


class DiagonalGmm(OnlineMixture):
    """Online EM of a Gaussian mixture with diagonal covariances (Arteaga et al. 2026, section 3).

    log rho_ik = log pi_k - 1/2 sum_d [ log 2 pi v_kd + (h_id - mu_kd)^2 / v_kd ], computed as one GEMM of
    [H, -H*H/2] with [mu/v, 1/v] on rows and means shifted by the running mean m of the rows: the raw form
    cancels badly when features share a direction. v is the variance after MAP shrinkage.
    """

    name = "gmm_diag"

    variances: Tensor

    @property
    def num_statistics(self) -> int:
        """First and second moments, 2 P columns."""
        return 2 * self.dim

    def family_tables(self) -> dict[str, Tensor]:
        """Returns `variances` [K, P], ones until the first batch is known."""
        return {"variances": torch.ones(self.num_prototypes, self.dim)}

    def reset_components(self) -> None:
        """Every component starts with the variance of the rows."""
        self.variances.copy_(self.prior_variance())

    def component_variances(self) -> Float[Tensor, "K P"]:
        """Returns the variances of all components."""
        return self.variances.expand(self.num_prototypes, self.dim)

    row_tables: tuple[str, ...] = ("means", "variances")

    def prior_variance(self) -> Float[Tensor, " V"]:
        """Returns the variance of the rows, which floors, priors and starts refer to."""
        return self.average_dimensions(self.row_variance)

    def average_dimensions(self, variance: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch V"]:
        """Returns a variance per dimension as the family keeps it: here as it is."""
        return variance

    def restart_components_(self, index: Int64[Tensor, " R"]) -> None:
        """Restarts components with the rows' variance; see the base class."""
        super().restart_components_(index)
        self.variances[index] = self.prior_variance()

    def split_components_(
        self, children: Int64[Tensor, " R"], parents: Int64[Tensor, " R"], offset: Float[Tensor, "R P"]
    ) -> None:
        """Splits components; children are as wide as their parents."""
        super().split_components_(children, parents, offset)
        if len(self.variances) == self.num_prototypes:
            self.variances[children] = self.variances[parents]

    @property
    def moves_together(self) -> bool:
        """Whether variances are shrunk to that of the rows, which moves with every step."""
        return self.gmm.variance.shrinkage > 0

    def row_features(self, rows: Float[Tensor, "N P"]) -> Float[Tensor, "N F"]:
        """Returns [h, -h*h/2], whose natural parameters are [mu/v, 1/v]."""
        return torch.cat([rows, -0.5 * rows * rows], dim=1)

    def row_statistics(self, rows: Float[Tensor, "N P"]) -> Float[Tensor, "N M"]:
        """Returns [h, h*h]."""
        return torch.cat([rows, rows * rows], dim=1)

    def natural_parameters(self, chunk: Components) -> tuple[Float[Tensor, "k F"], Float[Tensor, " k"]]:
        """Returns ([mu/v, 1/v], -1/2 sum_d [mu^2/v + log 2 pi v]) with mu shifted by m."""
        variances = self.shrunk_variances(chunk)
        means = self.means[chunk] - self.reference()
        width = variances.shape[1]
        theta = torch.empty(len(means), self.dim + width, device=means.device)
        linear, quadratic = theta.split([self.dim, width], dim=1)
        torch.reciprocal(variances.expand(len(means), width), out=quadratic)
        torch.mul(means, quadratic, out=linear)
        log_determinant = variances.log().sum(1) * (self.dim / width) + self.dim * _LOG_2PI
        return theta, -0.5 * (torch.linalg.vecdot(means, linear) + log_determinant)

    def shrunk_variances(self, chunk: Components) -> Float[Tensor, "k P"]:
        """Returns v = (n var + k0 gvar) / (n + k0), k0 = shrinkage * M: MAP with the rows' variance gvar."""
        prior = self.gmm.variance.shrinkage * self.memory
        if prior == 0:
            return self.variances[chunk]
        weight = prior / (self.counts[chunk, None] + prior)
        return torch.lerp(self.variances[chunk], self.prior_variance(), weight)

    def centre_statistics_(
        self, chunk: Components, mass: Float[Tensor, " k"], statistics: Float[Tensor, "k F"]
    ) -> None:
        """Replaces S1 by T1 = S1 - w mu and S2 by T2 = S2 - mu (2 T1 + w mu), mu shifted by m, in place."""
        means = self.means[chunk] - self.reference()
        first, second = statistics.split(self.dim, dim=1)
        weighted = mass[:, None] * means
        first.sub_(weighted)
        second.addcmul_(means, weighted.add_(first, alpha=2), value=-1)

    def m_step(
        self,
        chunk: Components,
        rate: Float[Tensor, " k"],
        mass: Float[Tensor, " k"],
        statistics: Float[Tensor, "k F"],
        out: dict[str, Tensor],
    ) -> None:
        """Moves means and variances by the rate rho_k, exactly as S/S0 and S2/S0 - mu^2 would.

        mu  <- mu + rho T1/w;    var <- (1 - rho) var + rho T2/w - rho^2 (T1/w)^2,   floored
        """
        first, second = statistics.split(self.dim, dim=1)
        move = self.move_means(chunk, rate, mass, first, out)
        scale = self.divide_by_mass(rate, mass)[:, None]
        old, new = self.variances[chunk], out["variances"]
        torch.addcmul(old, old, rate[:, None], value=-1, out=new)
        self.write_variances(chunk, rate, new.addcmul_(second, scale).addcmul_(move, move, value=-1), out)

    def write_variances(
        self,
        chunk: Components,
        rate: Float[Tensor, " k"],
        variances: Float[Tensor, "k V"],
        out: dict[str, Tensor],
    ) -> None:
        """Writes floored variances to `out`; where the rate is 0 they stay bitwise."""
        floored = variances.clamp_min_(self.gmm.variance.floor * self.prior_variance())
        # A component without mass keeps its variance, also when the floor has moved past it.
        torch.where(rate[:, None] > 0, floored, self.variances[chunk], out=out["variances"])

    def metrics(self) -> dict[str, float]:
        """Adds the share of variances at the floor."""
        values = super().metrics()
        floor = self.gmm.variance.floor * self.prior_variance()
        values["gmm/variance_at_floor"] = float((self.variances <= floor * 1.0001).float().mean())
        return values
