"""Gaussian mixtures that share variances between dimensions, between components, or both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..mixture.model import Components
from ..mixture.moments import compute_moments_rate
from ..mixture.touched import StepStatistics
from .gmm_diag import DiagonalGmm

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor


class SphericalGmm(DiagonalGmm):
    """One variance per component: features [h, -|h|^2/2], half the state, half the statistics."""

    name = "gmm_spherical"

    @property
    def num_statistics(self) -> int:
        """First moments and the squared length."""
        return self.dim + 1

    def family_tables(self) -> dict[str, Tensor]:
        """Returns `variances` [K, 1]."""
        return {"variances": torch.ones(self.num_prototypes, 1)}

    def average_dimensions(self, variance: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch 1"]:
        """Returns the mean over dimensions."""
        return variance.mean(-1, keepdim=True)

    def row_features(self, rows: Float[Tensor, "N P"]) -> Float[Tensor, "N F"]:
        """Returns [h, -|h|^2/2]."""
        return torch.cat([rows, -0.5 * rows.square().sum(1, keepdim=True)], dim=1)

    def row_statistics(self, rows: Float[Tensor, "N P"]) -> Float[Tensor, "N M"]:
        """Returns [h, |h|^2]."""
        return torch.cat([rows, rows.square().sum(1, keepdim=True)], dim=1)

    def centre_statistics_(
        self, chunk: Components, mass: Float[Tensor, " k"], statistics: Float[Tensor, "k M"]
    ) -> None:
        """Replaces S1 by T1 and sum_d S2 by sum_d T2, in place."""
        means = self.means[chunk] - self.reference()
        first, second = statistics.split([self.dim, 1], dim=1)
        weighted = mass[:, None] * means
        first.sub_(weighted)
        second.sub_((means * weighted.add_(first, alpha=2)).sum(1, keepdim=True))

    def m_step(
        self,
        chunk: Components,
        rate: Float[Tensor, " k"],
        mass: Float[Tensor, " k"],
        statistics: Float[Tensor, "k M"],
        out: dict[str, Tensor],
    ) -> None:
        """As the diagonal mixture, with every term of the variance averaged over dimensions."""
        first, second = statistics.split([self.dim, 1], dim=1)
        move = self.move_means(chunk, rate, mass, first, out)
        scale = self.divide_by_mass(rate, mass)[:, None]
        variances = torch.lerp(self.variances[chunk], torch.zeros(()).to(scale), rate[:, None])
        variances += (scale * second - move.square().sum(1, keepdim=True)) / self.dim
        self.write_variances(chunk, rate, variances, out)


class TiedDiagonalGmm(DiagonalGmm):
    """One diagonal covariance for all components: first moments only on the wire.

    The variance is the running pooled scatter of the rows around the means, with the rate of the running
    moments: a component's own rate has no meaning for what all share.
    """

    name = "gmm_tied_diag"
    row_tables = ("means",)

    @property
    def moves_together(self) -> bool:
        """The variance that all components share moves with every step."""
        return True

    @property
    def num_statistics(self) -> int:
        """First moments only."""
        return self.dim

    def family_tables(self) -> dict[str, Tensor]:
        """Returns `variances` [1, P]."""
        return {"variances": torch.ones(1, self.dim)}

    def shrunk_variances(self, chunk: Components) -> Float[Tensor, "1 P"]:
        """Returns the shared variance; pooled over all rows it needs no prior."""
        del chunk
        return self.variances

    def restart_components_(self, index: Int64[Tensor, " R"]) -> None:
        """Restarts counts and weights; the shared variance stays."""
        super(DiagonalGmm, self).restart_components_(index)

    def row_statistics(self, rows: Float[Tensor, "N P"]) -> Float[Tensor, "N M"]:
        """Returns h: the variance follows from the rows' moments and these."""
        return rows

    def component_variances(self) -> Float[Tensor, "K P"]:
        """Returns the shared variance, once per component."""
        return self.variances.expand(self.num_prototypes, self.dim)

    def centre_statistics_(
        self, chunk: Components, mass: Float[Tensor, " k"], statistics: Float[Tensor, "k M"]
    ) -> None:
        """Replaces S1 by T1 = S1 - w mu, in place."""
        statistics.sub_(mass[:, None] * (self.means[chunk] - self.reference()))

    def m_step(
        self,
        chunk: Components,
        rate: Float[Tensor, " k"],
        mass: Float[Tensor, " k"],
        statistics: Float[Tensor, "k M"],
        out: dict[str, Tensor],
    ) -> None:
        """Moves the means; `finish_m_step` moves the shared variance."""
        self.move_means(chunk, rate, mass, statistics, out)

    def finish_m_step(self, statistics: StepStatistics, out: dict[str, Tensor]) -> None:
        """Moves the variance towards the batch's scatter around the means that it has just moved.

        sum_ik gamma (h - mu'_k)^2 = sum_i h^2 - sum_k [mu (2 T1 + w mu) + d (2 T1 - w d)], with d = mu' - mu and
        everything shifted by the rows' mean.
        """
        old = self.means[statistics.components]
        means, move = old - self.row_mean, out["means"] - old
        mass = statistics.mass[:, None]
        explained = means * (2 * statistics.moments + mass * means)
        explained += move * (2 * statistics.moments - mass * move)
        scatter = statistics.sums["sum_outer"].diagonal() - explained.sum(0)
        number = statistics.sums["sum_weight"]
        spread = self.average_dimensions(scatter[None] / number.clamp_min(1e-12))
        moved = torch.lerp(self.variances, spread, compute_moments_rate(self.step))
        floor = self.gmm.variance.floor * self.prior_variance()
        has_mass = (number > 0) & (statistics.mass.sum() > 0)
        self._candidate["variances"].copy_(torch.where(has_mass, moved.clamp_min(floor), self.variances))


class TiedSphericalGmm(TiedDiagonalGmm):
    """One variance for everything: k-means with soft assignments and mixing weights."""

    name = "gmm_tied_spherical"

    def family_tables(self) -> dict[str, Tensor]:
        """Returns `variances` [1, 1]."""
        return {"variances": torch.ones(1, 1)}

    def average_dimensions(self, variance: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch 1"]:
        """Returns the mean over dimensions."""
        return variance.mean(-1, keepdim=True)

    def row_features(self, rows: Float[Tensor, "N P"]) -> Float[Tensor, "N F"]:
        """Returns [h, -|h|^2/2]."""
        return torch.cat([rows, -0.5 * rows.square().sum(1, keepdim=True)], dim=1)
