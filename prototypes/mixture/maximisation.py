"""The M-step: from the statistics of a step to a candidate, which a step that is taken makes the state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import PrototypesConfig
from ..coupling import couple
from ..estimator import EstimatorContext
from ..learned import LearnedPrototypes
from ..random_numbers import draw_unit_vectors
from . import moments
from .candidate import CandidateTables
from .expectation import ObservingMixture
from .figures import traced
from .forgetting import forget
from .initialisation import Collected
from .mixing import compute_rates, update_mixing_weights, update_usage
from .model import iterate_chunks
from .touched import Components, StepStatistics, TouchedRows

if TYPE_CHECKING:
    from jaxtyping import Float


class UpdatingMixture(ObservingMixture):
    """A mixture that can write the M-step of a batch beside its tables.

    A step that touches some components keeps their new rows aside; one of all components has a second set of the
    tables. Moments and what is one number per component have a second set in both.

    Attributes:
        traced_means: where about a thousand of the means started.
        collected: how far a start from features has come.
        has_just_begun: whether the last accepted step has placed the last of them.
    """

    traced_means: Tensor

    def __init__(self, config: PrototypesConfig, context: EstimatorContext) -> None:
        super().__init__(config, context)
        self._candidate = CandidateTables()
        self._candidate_rows = CandidateTables()
        self._touched_rows: TouchedRows | None = None
        self.collected = Collected()
        self.has_just_begun = False
        self.register_buffer("traced_means", traced(self.means).clone())

    def accept_candidate(self) -> None:
        """Makes the candidate the state."""
        self._candidate.swap(self)
        if self._touched_rows is None:
            self._candidate_rows.swap(self)
        else:
            self._touched_rows.write(self)

    def build_learned(self) -> nn.Module | None:
        """Returns learned prototypes where the coupling is on.

        They start at the random directions of the seed, as means do by `init.method` sphere. Means that start from
        features leave them there, unless `coupling.start` is "means"; see `learned_start`.
        """
        if self.config.coupling.strength == 0:
            return None
        return LearnedPrototypes(self.num_prototypes, self.dim, self.context.seed)

    def learned_start(self) -> Float[Tensor, "K P"] | None:
        """Returns the directions of the means in the step that has placed the last of them; see the base class."""
        if self.config.coupling.start == "directions" or not self.has_just_begun:
            return None
        return nn.functional.normalize(self.means, dim=1)

    @property
    def _has_placed_learned(self) -> bool:
        """Whether learned prototypes that were read in the last step were written before it."""
        return self.collected.seen == self.num_prototypes and not self.has_just_begun

    def cosines_to_start(self, prototypes: Float[Tensor, "K P"]) -> Float[Tensor, " k"]:
        """Returns those of about a thousand prototypes; a mixture starts where its rows were placed.

        What a revival has moved counts as moved.
        """
        start = nn.functional.normalize(self.traced_means, dim=1)
        has_directions = self.config.coupling.start == "directions" or not self._has_placed_learned
        if self.config.coupling.strength > 0 and has_directions:
            learned = draw_unit_vectors(self.num_prototypes, self.dim, self.context.seed)
            start = couple(traced(learned).to(start.device), start, self.config.coupling.strength)
        return nn.functional.cosine_similarity(start, traced(prototypes), dim=1)

    def update_components(self, statistics: StepStatistics) -> None:
        """Writes the M-step to the candidate: of all components, or of those that the step touches."""
        mass = statistics.all_masses
        # While the means wait for rows there is no mass: nothing is forgotten either.
        num_rows = torch.where(mass.sum() > 0, statistics.sums["sum_weight"], 0.0)
        forgetting = forget(self.gmm, self.memory, self.counts, mass, num_rows)
        self._update_vectors(statistics, forgetting.counts)
        if isinstance(statistics.components, slice):
            self._touched_rows = None
            self._candidate_rows.allocate(self, self.row_tables)
            rows = self._candidate_rows.tables
        else:
            self._touched_rows = TouchedRows(self, self.row_tables, statistics.components)
            rows = self._touched_rows.rows
        rate = forgetting.rate[statistics.components]
        for chunk in iterate_chunks(slice(0, len(rate)), rate.device):
            touched = statistics.components
            components = chunk if isinstance(touched, slice) else touched[chunk]
            out = {name: table[chunk] for name, table in rows.items()}
            self.m_step(components, rate[chunk], statistics.mass[chunk], statistics.moments[chunk], out)
        if forgetting.shrink is not None:
            rows["means"].mul_(forgetting.shrink[:, None])
        self.finish_m_step(statistics, rows)

    def _update_vectors(self, statistics: StepStatistics, counts: Float[Tensor, " K"]) -> None:
        """Writes to the candidate what is small: moments, and one number per component."""
        names = [name for name in self.table_names if name not in self.row_tables]
        self._candidate.allocate(self, names)
        mass, sums = statistics.all_masses, statistics.sums
        rate = moments.compute_moments_rate(self.step)
        self._candidate.write(moments.update_moments(self._moments(), sums, sums["sum_weight"], rate))
        weight_rate, usage_rate = compute_rates(mass, self.context.num_observations_per_epoch)
        weights = update_mixing_weights(self.gmm.mixing_weights, self.mixing_weights, mass, weight_rate)
        usage = update_usage(self.usage, mass, usage_rate)
        self._candidate.write({"counts": counts, "usage": usage, "mixing_weights": weights})

    def divide_by_mass(self, rate: Float[Tensor, " k"], mass: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Returns rho / w, exactly 0 where the rate is 0."""
        return torch.where(rate > 0, rate / mass.clamp_min(1e-30), 0.0)

    def move_means(
        self,
        chunk: Components,
        rate: Float[Tensor, " k"],
        mass: Float[Tensor, " k"],
        first: Float[Tensor, "k P"],
        out: dict[str, Tensor],
    ) -> Float[Tensor, "k P"]:
        """Writes mu + rho T1 / w to `out` and returns the move rho T1 / w."""
        move = first * self.divide_by_mass(rate, mass)[:, None]
        torch.add(self.means[chunk], move, out=out["means"])
        return move
