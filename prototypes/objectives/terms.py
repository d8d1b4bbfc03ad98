"""The terms with targets: cross-entropy whose targets a centre, Sinkhorn, a mixture or the loss itself keeps apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..alarms import Collapse
from ..config import PatchConfig, TermConfig
from ..statistics import Collectives
from .dino import dino_loss
from .entropy import compute_entropy_deficit
from .interface import LogitOperands, MeanOverRanks, RankBatch, Term
from .logits import ChunkedLogits
from .patches import patch_loss
from .sinkhorn import compute_sinkhorn_offsets
from .targets import TargetLoss, compute_mean_logits, move_centre

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


class TargetTerm(Term):
    """A cross-entropy with targets softmax(teacher's logits / T - u); the loss and its rows are a subclass's.

    u is the centre / T, Sinkhorn's offsets, or 0: the posterior needs none, and with "entropy" the loss holds the mean
    probabilities apart (MSN, Assran et al. 2022).

    Args:
        config: the term's options.
        num_prototypes: K.
        steps_per_epoch: by which the teacher's temperature warms up.
        collectives: the exchange between ranks.
        mean_over_ranks: differentiable mean over ranks; None in a single process.

    Attributes:
        centre: [K] fp32, where the targets are centred: what is taken off the teacher's logits before the temperature.
    """

    centre: Tensor

    def __init__(
        self,
        config: TermConfig,
        *,
        num_prototypes: int,
        steps_per_epoch: int = 1,
        collectives: Collectives | None = None,
        mean_over_ranks: MeanOverRanks | None = None,
    ) -> None:
        super().__init__(config, steps_per_epoch)
        self._config = config
        self._num_prototypes = num_prototypes
        self._collectives = collectives or Collectives()
        self._mean_over_ranks = mean_over_ranks
        self._mean_logits: list[Tensor] = []
        if self.settings.targets == "centre":
            self.register_buffer("centre", torch.zeros(num_prototypes))

    def accept(self) -> None:
        """Moves the centre by the mean logits of the step."""
        if self._mean_logits:
            mean = torch.stack(self._mean_logits).mean(0)
            self.centre = move_centre(self.centre, mean, self._config.centre_momentum)
        self.discard()

    def discard(self) -> None:
        """Forgets the mean logits of the step."""
        self._mean_logits = []

    @property
    def collapses(self) -> tuple[Collapse, ...]:
        """Targets of constant networks say nothing about an image, be they uniform or one-hot."""
        remedy = "other targets, a lower teacher temperature"
        return (Collapse(("target_information",), self._num_prototypes, 0.0, remedy),)

    @torch.no_grad()
    def _compute_offsets(
        self,
        teacher: LogitOperands,
        step: int,
        group: Int64[Tensor, " N"] | None = None,
        num_groups: int = 1,
    ) -> Float[Tensor, "G K"] | None:
        """Returns u of this step; notes what moves the centre. Collective."""
        temperature = self.temperature("teacher", step)
        rows = teacher.rows.detach().flatten(0, -2)
        if self.settings.targets == "centre":
            self._mean_logits.append(compute_mean_logits(rows, teacher.columns, self._mean_over_ranks))
            return self.centre[None] / temperature
        if self.settings.targets == "sinkhorn":
            return compute_sinkhorn_offsets(
                ChunkedLogits(rows / temperature, teacher.columns),
                self._config.sinkhorn_iterations,
                self._collectives,
                group=group,
                num_groups=num_groups,
            )
        return None

    def _complete(self, loss: TargetLoss, student: LogitOperands, step: int) -> dict[str, Tensor]:
        """Returns the scalars of the term; with "entropy" that of the student's mean probabilities joins."""
        scalars = {
            "total": loss.total,
            "cross_entropy": loss.total,
            "target_entropy": loss.target_entropy,
            "target_information": loss.target_information,
        }
        if self.settings.targets != "entropy":
            return scalars
        rows = student.rows.flatten(0, -2) / self.temperature("student", step)
        entropy = compute_entropy_deficit(rows, student.columns, self._mean_over_ranks)
        return scalars | {
            "total": loss.total + self._config.entropy_weight * entropy,
            "entropy": entropy,
        }


class DinoTerm(TargetTerm):
    """DINO on all prototypes: see `dino_loss`."""

    def forward(self, batch: RankBatch, *, step: int, micro_step: int = 0) -> dict[str, Tensor]:
        """See `Term`. Collective."""
        del micro_step
        assert batch.views is not None
        student, teacher = batch.views
        loss = dino_loss(
            student.rows / self.temperature("student", step),
            teacher.rows.detach() / self.temperature("teacher", step),
            student.columns,
            teacher.columns.detach(),
            offsets=self._compute_offsets(teacher, step),
            mean_over_ranks=self._mean_over_ranks,
        )
        return self._complete(loss, student, step)


class PatchTerm(TargetTerm):
    """iBOT and CAPI on all prototypes: see `patch_loss`. CAPI's Sinkhorn balances each position by itself."""

    def __init__(self, config: PatchConfig, **shared: Any) -> None:
        super().__init__(config, **shared)
        self.by_position = config.name == "capi"
        if self.by_position and self.kinds["teacher"] == "cosine":
            self.kinds["teacher"] = "clustering"  # CAPI hands the student the clustering's assignments

    def forward(self, batch: RankBatch, *, step: int, micro_step: int = 0) -> dict[str, Tensor]:
        """See `Term`. Collective."""
        del micro_step
        assert batch.patches is not None
        patches = batch.patches
        by_position = self.by_position and self.settings.targets == "sinkhorn"
        group = patches.position if by_position else None
        num_groups = patches.num_positions if by_position else 1
        offsets = self._compute_offsets(patches.teacher, step, group, num_groups)
        teacher = patches.teacher.rows.detach()
        if patches.target is not None:
            teacher = teacher[patches.target]
            group = None if group is None else group[patches.target]
        loss = patch_loss(
            patches.student.rows / self.temperature("student", step),
            teacher / self.temperature("teacher", step),
            patches.student.columns,
            patches.teacher.columns.detach(),
            patches.weight,
            offsets=offsets,
            group=group,
            mean_over_ranks=self._mean_over_ranks,
        )
        return self._complete(loss, patches.student, step)
