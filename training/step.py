"""One training step, in the order in which it must happen.

The prototypes are updated before the encoder and from this step's own features: C^t is the M-step's result on
h^t, and the encoder's loss is taken against C^t (Arteaga et al. 2026, arXiv 2510.20108, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.views.augmentations import Crops
from prototypes.config import Level
from prototypes.estimator import PrototypeEstimator
from prototypes.objectives.interface import (
    LogitOperands,
    Objective,
    PatchRows,
    RankBatch,
    ViewRows,
)
from prototypes.statistics import Collectives
from training.accumulation import MicroBatch, RowLoss, StudentPass, differentiate, join
from training.config import BatchConfig
from training.drift import DriftGauge
from training.engines.interface import Engine, NetworkOutput
from training.engines.synchronization import Handle, Synchronization
from training.guards import LossSpikeGuard
from training.patches import MaskedPatches, join_patches, read_masks
from training.prototype_sets import PrototypeSet, SetOutcome
from training.schedules import StepSchedule


@dataclass(frozen=True)
class StepOutcome:
    """What one step did; tensors stay on the device until somebody asks.

    Attributes:
        applied: whether anything moved; a step with a non-finite loss or gradient moves nothing.
        loss: of the whole batch, means over ranks: the objective's scalars, `total` among them, and `auxiliary` (for
            the patches' own prototypes `patch_auxiliary`), an estimator's own loss, if there is one.
        grad_norm: scalar, 2-norm of the gradient before clipping; 0 where the step was not applied.
        sets: what it did to each set of prototypes, by section.
    """

    applied: bool
    loss: dict[str, Tensor]
    grad_norm: Tensor
    sets: dict[str, SetOutcome]


@dataclass(frozen=True)
class _Share:
    """Micro-batches under one loss, the teacher's rows and the patches of them: the whole batch, or each its own."""

    micro_batches: list[MicroBatch]
    teacher: NetworkOutput
    patches: MaskedPatches | None

    @classmethod
    def of(cls, micro_batches: list[MicroBatch], teacher: NetworkOutput) -> _Share:
        parts = [micro.patches for micro in micro_batches if micro.patches is not None]
        return cls(micro_batches, teacher, join_patches(parts) if parts else None)

    @property
    def num_images(self) -> int:
        return sum(micro.num_images for micro in self.micro_batches)


class TrainingStep:
    """Runs one optimizer step on this rank's micro-batches. Collective: every rank must call it equally often."""

    def __init__(
        self,
        *,
        engine: Engine,
        sets: Sequence[PrototypeSet],
        objective: Objective,
        batch: BatchConfig,
        synchronization: Synchronization,
        spike_guard: LossSpikeGuard,
        patches: str = "none",
        drift: Sequence[DriftGauge] = (),
    ) -> None:
        self.engine = engine
        self.sets = tuple(sets)
        self.objective = objective
        self.spike_guard = spike_guard
        self._set_of = {level: one for one in self.sets for level in one.levels}
        self._accumulation = batch.accumulation
        self._synchronization = synchronization
        self.drift = tuple(drift)
        self._patches = patches

    def __call__(
        self,
        crops: Sequence[Crops],
        step: int,
        schedule: StepSchedule,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> StepOutcome:
        """Returns what the step did.

        Args:
            crops: this rank's micro-batches, equally large, on the training device.
            step: updates done so far; with the seed it determines every random draw of the step.
            schedule: learning rate, weight decay and EMA momentum of this step.
            meanwhile: what the CPU may do while the device is at the backward pass, before it waits for the device.
        """
        micro_batches = [self._prepare(micro) for micro in crops]
        # The mixture sees the whole batch, however many micro-batches it comes in: one observation, one commit.
        whole, shares = self._forward_teacher(micro_batches)
        by_position = self.objective.balances_positions
        observations = [
            one.observe(whole.teacher, whole.patches, by_position=by_position) for one in self.sets
        ]
        # The student's first forward pass needs no prototypes: it overlaps the reduction of the statistics.
        student = StudentPass(self.engine, shares[0].micro_batches)
        for one, observation in zip(self.sets, observations, strict=True):
            one.estimator.commit(observation)

        losses: list[dict[str, Tensor]] = []
        for index, share in enumerate(shares):
            if index > 0:
                student = StudentPass(self.engine, share.micro_batches)
            loss, gradient = differentiate(self._row_loss(share, step, index), student.output)
            student.backward(gradient, weight=1 / len(shares), is_last=share is shares[-1])
            losses.append(loss)
        mean_loss = self._mean_loss(losses)

        finite = self.engine.gradients_are_finite()
        meanwhile()
        applied, grad_norm = self._apply(mean_loss["total"], finite, schedule)
        if applied:
            for one in self.sets:
                one.count_usage(whole.teacher, self.objective, len(crops))
            for gauge in self.drift:
                gauge.observe(crops[0].global_crops[0], step + 1)
        outcomes = {one.section: one.describe(whole.teacher) for one in self.sets}
        if applied:
            # Last: figures taken after a repair, on the rows that the repair has seen, would praise the repair.
            for one in self.sets:
                one.estimator.reseed(step + 1)
        return StepOutcome(applied, mean_loss, grad_norm, outcomes)

    @property
    def reduce_sum(self) -> Callable[[Tensor], Handle]:
        """The sum over ranks, for counts that are closed at step boundaries."""
        return self._synchronization.reduce_sum

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Returns all ranks' rows, whose numbers may differ, for figures of the whole global batch. Collective."""
        sync = self._synchronization
        return Collectives(0, sync.world_size, sync.reduce_sum, sync.gather).gather_rows(rows)

    def _mean_loss(self, losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the means over micro-batches and ranks: the record is the job's, and all guards see one window."""
        means = torch.stack([torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]])
        return dict(zip(losses[0], self._synchronization.mean_over_ranks(means).unbind(), strict=True))

    def _apply(self, loss: Tensor, finite: Tensor, schedule: StepSchedule) -> tuple[bool, Tensor]:
        """Moves everything, or nothing: one decision that all ranks share, taken before anything moves.

        The step's one wait for the device but the estimators': loss and check come in one transfer.
        """
        loss_value, is_finite = torch.stack([loss, finite.to(loss.dtype)]).tolist()
        moving: list[PrototypeEstimator | Objective] = [*(one.estimator for one in self.sets), self.objective]
        if not (is_finite and self.spike_guard.admits(loss_value)):
            for part in moving:
                part.discard()
            self.engine.skip()
            return False, torch.zeros_like(loss)
        self.spike_guard.record(loss_value)
        for part in moving:
            part.accept()
        grad_norm = self.engine.step(schedule)
        self.engine.update_teacher(schedule.ema_momentum)
        for one in self.sets:
            start = one.estimator.learned_start()
            if start is not None:
                self.engine.write_parameter(f"{one.learned_name}.weight", start)
        return True, grad_norm

    def _prepare(self, crops: Crops) -> MicroBatch:
        """Returns what the student is given of a micro-batch."""
        patches = None
        if self._patches != "none":
            assert crops.masks is not None
            device = crops.global_crops.device
            patches = read_masks(crops.masks, self._patches, device)
        groups = [crops.global_crops.flatten(0, 1)]
        if crops.local_crops.shape[0]:
            groups.append(crops.local_crops.flatten(0, 1))
        return MicroBatch(groups, crops.global_crops.shape[1], patches)

    def _forward_teacher(self, micro_batches: list[MicroBatch]) -> tuple[_Share, list[_Share]]:
        """Returns the whole batch with the teacher's rows of it, and what shares a loss."""
        outputs = [
            self.engine.forward_teacher(micro.crops[:1], micro.patches.teacher if micro.patches else None)
            for micro in micro_batches
        ]
        counts = [micro.patches.teacher_counts for micro in micro_batches if micro.patches]
        whole = _Share.of(micro_batches, join(outputs, micro_batches[0].num_images, counts))
        if self._accumulation == "exact":
            return whole, [whole]
        return whole, [
            _Share.of([micro], output) for micro, output in zip(micro_batches, outputs, strict=True)
        ]

    def _row_loss(self, share: _Share, step: int, index: int) -> RowLoss:
        """Returns the loss of a share as a function of the student's rows: where objective and estimators meet."""

        def compute(student: NetworkOutput) -> dict[str, Tensor]:
            batch = RankBatch(
                views=self._view_rows(share, student),
                patches=self._patch_rows(share, student),
                embeddings=None
                if student.embeddings is None
                else student.embeddings.unflatten(0, (-1, share.num_images)),
                num_parts=len(share.micro_batches),
            )
            terms = self.objective(batch, step=step, micro_step=index)
            for one in self.sets:
                auxiliary = one.estimator.auxiliary_loss(one.learned(student), step=step, micro_step=index)
                if auxiliary is not None:
                    terms = terms | {
                        "total": terms["total"] + auxiliary,
                        f"{one.prefix}auxiliary": auxiliary,
                    }
            return terms

        return compute

    def _view_rows(self, share: _Share, student: NetworkOutput) -> ViewRows | None:
        if "instance" not in self._set_of:
            return None
        return ViewRows(
            *(
                operands._replace(rows=operands.rows.unflatten(0, (-1, share.num_images)))
                for operands in self._operands(share, student, "instance")
            )
        )

    def _patch_rows(self, share: _Share, student: NetworkOutput) -> PatchRows | None:
        patches = share.patches
        if patches is None:
            return None
        return PatchRows(
            *self._operands(share, student, "patch"),
            target=patches.target,
            weight=patches.weight,
            position=patches.position,
            num_positions=patches.shape[2],
        )

    def _operands(
        self, share: _Share, student: NetworkOutput, level: Level
    ) -> tuple[LogitOperands, LogitOperands]:
        of_level = self._set_of[level]
        return (
            of_level.operands(student, level, "student", self.objective),
            of_level.operands(share.teacher, level, "teacher", self.objective),
        )
