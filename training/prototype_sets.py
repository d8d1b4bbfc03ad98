"""A set of prototypes at work: its estimator, the levels of the objective that compare rows with it, and its use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prototypes.config import Level
from prototypes.diagnostics import UsageCounter
from prototypes.estimator import Observation, PrototypeEstimator, Role
from prototypes.objectives.interface import LogitOperands, Objective
from training.engines.interface import NetworkOutput
from training.patches import MaskedPatches

SECTIONS = ("prototypes", "patch_prototypes")
"""The sections of the configuration that hold prototypes; the figures of a set bear what precedes `prototypes`."""


def estimator_name(section: str) -> str:
    """Returns the name that checkpoints know a section's estimator by."""
    return section.removesuffix("prototypes") + "estimator"


ESTIMATORS = tuple(map(estimator_name, SECTIONS))


class SetOutcome(NamedTuple):
    """What one step did to a set; tensors stay on the device until somebody asks.

    Attributes:
        projections: [N, P] the teacher's rows that were observed, of all micro-batches.
        prototypes: [K, P] the teacher's prototypes of this step, C^t, before any of them was revived.
        vanished: [K] which of them have shrunk away and point nowhere.
    """

    projections: Tensor
    prototypes: Tensor
    vanished: Tensor


class PrototypeSet:
    """The prototypes of one section of the configuration.

    Args:
        section: `prototypes` or `patch_prototypes`.
        levels: the levels that compare rows with them; two where they are shared.
        estimator: who estimates them.
        usage: what counts their use.
    """

    def __init__(
        self, section: str, levels: Sequence[Level], estimator: PrototypeEstimator, usage: UsageCounter
    ) -> None:
        self.section = section
        self.prefix = section.removesuffix("prototypes")
        self.levels = tuple(levels)
        self.estimator = estimator
        self.usage = usage
        self._observed: dict[Level, Tensor] = {}

    def learned(self, output: NetworkOutput) -> Tensor | None:
        """Returns the rows [K, P] that the loss trains, as a network gave them; None where it trains none."""
        rows: Tensor | None = getattr(output, self.learned_name)
        return rows

    @property
    def learned_name(self) -> str:
        """What `TrainedNetwork` and `NetworkOutput` call those rows."""
        return f"learned_{self.section}"

    def observe(
        self, teacher: NetworkOutput, patches: MaskedPatches | None, *, by_position: bool
    ) -> Observation:
        """Starts the estimator's observation of the teacher's rows of the whole batch. Collective.

        Of more than `max_rows_per_rank` rows of a level as many are drawn from torch's generator on the CPU, which
        every step seeds by (seed, step, rank), and weigh as much as all.
        """
        observation = Observation()
        for level in self.levels:
            rows = _rows(teacher, level)
            group = patches.position if level == "patch" and by_position and patches is not None else None
            chosen, weight = self._draw(rows)
            if chosen is not None:
                rows, group = rows[chosen], None if group is None else group[chosen]
            self._observed[level] = rows
            is_last = level == self.levels[-1]
            observation = self.estimator.observe(rows, weight, group, is_last=is_last)
        return observation

    def operands(
        self, output: NetworkOutput, level: Level, role: Role, objective: Objective
    ) -> LogitOperands:
        """Returns the factors of the logits of a level's rows, as the objective wants them."""
        return self._operands(_rows(output, level), level, role, self.learned(output), objective)

    @torch.no_grad()
    def count_usage(self, teacher: NetworkOutput, objective: Objective, num_parts: int) -> None:
        """Adds the step to the counts of use: by the logits of the observed rows, and by the E-step."""
        for level, rows in self._observed.items():
            operands = self._operands(rows, level, "teacher", self.learned(teacher), objective)
            for part in operands.rows.chunk(num_parts):  # the logits of one micro-batch exist at once
                self.usage.update(part, operands.columns)
        assignment = self.estimator.assignment()
        if assignment is not None:
            self.usage.add_assignment(assignment)

    def describe(self, teacher: NetworkOutput) -> SetOutcome:
        """Returns what the step did to the set."""
        prototypes = self.estimator.prototypes("teacher", self.learned(teacher)).detach()
        observed = [rows.detach() for rows in self._observed.values()]
        projections = observed[0] if len(observed) == 1 else torch.cat(observed)
        return SetOutcome(projections, prototypes, self.estimator.find_vanished())

    @torch.no_grad()
    def initial_prototypes(self) -> Tensor:
        """Returns the teacher's prototypes [K, P] before step 0. Learned ones are a function of the seed."""
        learned = self.estimator.build_learned()
        prototypes = self.estimator.prototypes("teacher", None if learned is None else learned())
        return prototypes.to(self.usage.counts.device)

    def _operands(
        self, rows: Tensor, level: Level, role: Role, learned: Tensor | None, objective: Objective
    ) -> LogitOperands:
        kind = objective.kind(level, role)
        return LogitOperands(*self.estimator.logit_operands(rows, role, learned, kind=kind))

    def _draw(self, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Returns which rows are observed and the weight of each; None for all, and for weights of 1."""
        most = self.estimator.config.max_rows_per_rank
        if most is None or len(rows) <= most:
            return None, None
        chosen = torch.randperm(len(rows))[:most].sort().values
        return chosen.to(rows.device), rows.new_full((most,), len(rows) / most)


def modules_of(sets: Sequence[PrototypeSet]) -> Mapping[str, PrototypeEstimator]:
    """Returns the estimators by the names that checkpoints know them by."""
    return {estimator_name(one.section): one.estimator for one in sets}


def _rows(output: NetworkOutput, level: Level) -> Tensor:
    rows = output.projections if level == "instance" else output.patch_projections
    assert rows is not None, f"the network gave no rows of the level {level}"
    return rows
