"""The unit means that the encoder's loss is taken against, kept up with the means row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .figures import find_vanished

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

    from .model import Mixture

_SHORTEST_DIRECTION = 1e-12


class Publication:
    """Unit means [K, P], one tensor that is overwritten.

    Attributes:
        is_current: whether they are those of the tables, or of the candidate after `publish`; otherwise `read`
            computes them.
    """

    def __init__(self) -> None:
        self.is_current = False
        self._prototypes: Tensor | None = None
        self._norms: Tensor | None = None
        self._replaced: tuple[Tensor, Tensor, Tensor] | None = None
        self._is_candidate = False

    def read(self, mixture: Mixture) -> Float[Tensor, "K P"]:
        """Returns the published prototypes; those of the tables where none are current."""
        if not self.is_current:
            self._write(mixture.means)
        assert self._prototypes is not None
        return self._prototypes

    def find_vanished(self, mixture: Mixture) -> Bool[Tensor, " K"]:
        """Returns which published means have shrunk away; see `figures.find_vanished`."""
        self.read(mixture)
        assert self._norms is not None
        return find_vanished(self._norms, mixture)

    def publish(self, means: Float[Tensor, "K P"]) -> None:
        """Publishes a candidate's means."""
        self._write(means)
        self._is_candidate = True

    def publish_rows(
        self, mixture: Mixture, components: Int64[Tensor, " U"], means: Float[Tensor, "U P"]
    ) -> None:
        """Publishes the means of a candidate that differs from the tables in some components."""
        prototypes = self.read(mixture)
        assert self._norms is not None
        self._replaced = components, prototypes[components], self._norms[components]
        self._is_candidate = True
        unit, norms = normalise(means)
        prototypes.index_copy_(0, components, unit)
        self._norms.index_copy_(0, components, norms)

    def settle(self) -> None:
        """The candidate has become the state."""
        self._replaced, self._is_candidate = None, False

    def take_back(self) -> None:
        """Publishes what was published before the candidate: it was dropped."""
        if self._replaced is not None:
            assert self._prototypes is not None and self._norms is not None
            components, prototypes, norms = self._replaced
            self._prototypes.index_copy_(0, components, prototypes)
            self._norms.index_copy_(0, components, norms)
        elif self._is_candidate:
            self.is_current = False
        self.settle()

    def _write(self, means: Float[Tensor, "K P"]) -> None:
        if self._prototypes is None or self._prototypes.device != means.device:
            self._prototypes = torch.empty_like(means)
        self._norms = torch.linalg.vector_norm(means, dim=1)
        torch.div(means, _lengths(self._norms)[:, None], out=self._prototypes)
        self.is_current = True


def normalise(means: Float[Tensor, "k P"]) -> tuple[Float[Tensor, "k P"], Float[Tensor, " k"]]:
    """Returns unit rows and lengths; a row that is too short for a direction becomes zeros: it is no unit row."""
    norms = torch.linalg.vector_norm(means, dim=1)
    return means / _lengths(norms)[:, None], norms


def _lengths(norms: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    return torch.where(norms >= _SHORTEST_DIRECTION, norms, torch.inf)
