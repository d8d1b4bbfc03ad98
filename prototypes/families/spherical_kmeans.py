"""Streaming spherical k-means: unit centroids, assignments by cosine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..mixture.assignments import assign_hard_
from ..mixture.model import Components
from ..statistics import Collectives
from .vmf import VonMisesFisherMixture

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


class SphericalKMeans(VonMisesFisherMixture):
    """A von Mises-Fisher mixture with one fixed concentration 1 / tau and even weights (Dhillon & Modha 2001).

    gamma = softmax(h . c / tau), or one-hot of the nearest centroid; c <- normalize((1 - rho) c + rho hbar).
    """

    name = "sph_kmeans"

    def reset_components(self) -> None:
        """Centroids have unit length from the start."""

    def restart_components_(self, index: Int64[Tensor, " R"]) -> None:
        """Restarts counts; moved centroids get unit length."""
        super(VonMisesFisherMixture, self).restart_components_(index)
        self.means[index] = nn.functional.normalize(self.means[index], dim=1)

    def component_variances(self) -> Float[Tensor, "K P"]:
        """Returns the variance of all rows: centroids track no spread of their own."""
        return self.row_variance.expand(self.num_prototypes, self.dim)

    def natural_parameters(self, chunk: Components) -> tuple[Float[Tensor, "k P"], Float[Tensor, " k"]]:
        """Returns (c / tau, 0)."""
        return self.means[chunk] / self.gmm.kmeans_temperature, torch.zeros_like(self.mixing_weights[chunk])

    @property
    def moves_together(self) -> bool:
        """A centroid is all that its density depends on."""
        return False

    @property
    def assigns_hard(self) -> bool:
        """Whether the nearest centroid alone is assigned."""
        return self.gmm.kmeans_hard

    def log_mixing_weights(self, chunk: Components) -> Float[Tensor, " k"]:
        """Returns zeros: k-means has no mixing weights."""
        return torch.zeros_like(self.mixing_weights[chunk])

    def assign_(
        self,
        log_joint: Float[Tensor, "N K"],
        penalty: Float[Tensor, " K"] | None,
        across: Collectives | None,
    ) -> Float[Tensor, "N K"]:
        """Assigns to the nearest centroid alone, or softly, in place."""
        if self.gmm.kmeans_hard:
            return assign_hard_(log_joint, penalty, across)
        return super().assign_(log_joint, penalty, across)

    def m_step(
        self,
        chunk: Components,
        rate: Float[Tensor, " k"],
        mass: Float[Tensor, " k"],
        statistics: Float[Tensor, "k M"],
        out: dict[str, Tensor],
    ) -> None:
        """Moves the centroids and puts those that moved back on the sphere."""
        self.move_means(chunk, rate, mass, statistics, out)
        means = out["means"]
        torch.where(rate[:, None] > 0, nn.functional.normalize(means, dim=1), means, out=means)
