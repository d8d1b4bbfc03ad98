"""Whether the mixture can follow: how far the teacher moves an image's feature while a component waits for a row.

A component of K wins one of a step's N rows about every K / N steps. What the teacher has done to the features in
between is measured, not extrapolated: the same crops go through the teacher twice, that many steps apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prototypes.estimator import PrototypeEstimator
from training.engines.interface import Engine, running_statistics_held

_NUM_IMAGES = 64


@dataclass(frozen=True)
class _Held:
    """Crops [n, C, H, W], the teacher's projections [n, P] of them, and the step at which they were taken."""

    crops: Tensor
    projections: Tensor
    step: int


class DriftGauge:
    """Measures the drift of features per revisit of a component; one pair of forward passes of 64 images a reading.

    Not part of the state: a resumed run begins a new reading.

    Args:
        engine: whose teacher is looked at.
        estimator: silent unless it is a mixture.
        rows_per_step: rows of all ranks that one step gives to the mixture, N.
        every_steps: a reading begins at every so many steps, unless one is under way.
        mean_over_ranks: of the figures.
        num_patches: of a crop, where the mixture follows patches alone: one patch of each image is looked at, each in
            another place. None: the views' projections are.
        prefix: of the figures' names.
    """

    def __init__(
        self,
        engine: Engine,
        estimator: PrototypeEstimator,
        rows_per_step: int,
        every_steps: int,
        mean_over_ranks: Callable[[Tensor], Tensor],
        *,
        num_patches: int | None = None,
        prefix: str = "",
    ) -> None:
        self.revisit_steps = max(1, round(estimator.num_prototypes / max(1, rows_per_step)))
        self._engine = engine
        self._estimator = estimator
        self._every = every_steps
        self._mean_over_ranks = mean_over_ranks
        self._num_patches = num_patches
        self._prefix = prefix
        self._held: _Held | None = None
        self._figures: dict[str, Tensor] = {}

    def observe(self, crops: Tensor, step: int) -> None:
        """Ends the reading that is due, and begins one with the first images of a view [B, C, H, W]. Collective."""
        if not self._estimator.has_components:
            return
        if self._held is not None and step - self._held.step >= self.revisit_steps:
            held, self._held = self._held, None
            self._figures = self._estimator.describe_drift(held.projections, self._project(held.crops))
        if self._held is None and step % self._every == 0:
            crops = crops[:_NUM_IMAGES]
            self._held = _Held(crops, self._project(crops), step)

    def metrics(self) -> dict[str, float]:
        """Returns the last reading, once: the mean over ranks of their medians. Collective; waits for the device."""
        figures, self._figures = self._figures, {}
        if not figures:
            return {}
        values = self._mean_over_ranks(torch.stack(list(figures.values()))).tolist()
        return dict(zip((self._prefix + name for name in figures), values, strict=True))

    @torch.no_grad()
    def _project(self, crops: Tensor) -> Tensor:
        patches = None
        if self._num_patches is not None:
            image = torch.arange(len(crops), device=crops.device)
            patches = {"rows": image * self._num_patches + image % self._num_patches}
        with running_statistics_held(self._engine.teacher):  # a measurement moves nothing
            output = self._engine.forward_teacher([crops], patches)
        rows = output.projections if patches is None else output.patch_projections
        assert rows is not None, "the networks give no rows of the gauge's level"
        return rows
