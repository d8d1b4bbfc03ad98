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
from prototypes.diagnostics import UsageCounter
from prototypes.estimator import PrototypeEstimator, Role
from prototypes.objectives.interface import LogitOperands, Objective, RankBatch, ViewRows
from training.accumulation import RowLoss, StudentPass, differentiate, join
from training.config import BatchConfig
from training.drift import DriftGauge
from training.engines.interface import Engine, NetworkOutput
from training.engines.synchronization import Handle, Synchronization
from training.guards import LossSpikeGuard
from training.schedules import StepSchedule


@dataclass(frozen=True)
class StepOutcome:
    """What one step did; tensors stay on the device until somebody asks.

    Attributes:
        applied: whether anything moved; a step with a non-finite loss or gradient moves nothing.
        loss: of the whole batch, means over ranks: the objective's scalars, `total` among them, and `auxiliary`, the
            estimator's own loss, if there is one.
        grad_norm: scalar, 2-norm of the gradient before clipping; 0 where the step was not applied.
        projections: [views * B, P] the teacher's projections of all micro-batches, for diagnostics.
        prototypes: [K, P] the teacher's prototypes of this step, C^t, before any of them was revived.
        vanished: [K] which of them have shrunk away and point nowhere.
    """

    applied: bool
    loss: dict[str, Tensor]
    grad_norm: Tensor
    projections: Tensor
    prototypes: Tensor
    vanished: Tensor


@dataclass(frozen=True)
class _Share:
    """Micro-batches under one loss, and the teacher's rows of them: the whole batch, or each micro-batch its own."""

    crops: list[Crops]
    teacher: NetworkOutput


class TrainingStep:
    """Runs one optimizer step on this rank's micro-batches. Collective: every rank must call it equally often."""

    def __init__(
        self,
        *,
        engine: Engine,
        estimator: PrototypeEstimator,
        objective: Objective,
        batch: BatchConfig,
        synchronization: Synchronization,
        usage: UsageCounter,
        spike_guard: LossSpikeGuard,
        drift: DriftGauge | None = None,
    ) -> None:
        self.engine = engine
        self.estimator = estimator
        self.objective = objective
        self.usage = usage
        self.spike_guard = spike_guard
        self.drift = drift
        self._accumulation = batch.accumulation
        self._synchronization = synchronization

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
        # The mixture sees the whole batch, however many micro-batches it comes in: one observation, one commit.
        shares, teacher = self._forward_teacher(crops)
        observation = self.estimator.observe(teacher.projections)
        # The student's first forward pass needs no prototypes: it overlaps the reduction of the statistics.
        student = self._forward_student(shares[0])
        self.estimator.commit(observation)

        losses: list[dict[str, Tensor]] = []
        for index, share in enumerate(shares):
            if index > 0:
                student = self._forward_student(share)
            loss, gradient = differentiate(self._row_loss(share, step, index), student.output)
            student.backward(gradient, weight=1 / len(shares), is_last=share is shares[-1])
            losses.append(loss)
        mean_loss = self._mean_loss(losses)

        finite = self.engine.gradients_are_finite()
        meanwhile()
        applied, grad_norm = self._apply(mean_loss["total"], finite, schedule)
        if applied:
            self._count_usage(teacher, len(crops))
            if self.drift is not None:
                self.drift.observe(crops[0].global_crops[0], step + 1)
        prototypes = self.estimator.prototypes("teacher", teacher.learned_prototypes).detach()
        vanished = self.estimator.find_vanished()
        if applied:
            # Last: figures taken after a repair, on the rows that the repair has seen, would praise the repair.
            self.estimator.reseed(step + 1)
        return StepOutcome(applied, mean_loss, grad_norm, teacher.projections, prototypes, vanished)

    @property
    def reduce_sum(self) -> Callable[[Tensor], Handle]:
        """The sum over ranks, for counts that are closed at step boundaries."""
        return self._synchronization.reduce_sum

    @property
    def gather(self) -> Callable[[Tensor], Handle]:
        """All ranks' equally shaped tensors, [world_size, ...], for figures of the whole global batch."""
        return self._synchronization.gather

    @torch.no_grad()
    def initial_prototypes(self) -> Tensor:
        """Returns the teacher's prototypes [K, P] before step 0. Learned ones are a function of the seed."""
        learned = self.estimator.build_learned()
        return self.estimator.prototypes("teacher", None if learned is None else learned()).to(
            self.usage.counts.device
        )

    def _mean_loss(self, losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the means over micro-batches and ranks: the record is the job's, and all guards see one window."""
        means = torch.stack([torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]])
        return dict(zip(losses[0], self._synchronization.mean_over_ranks(means).unbind(), strict=True))

    def _apply(self, loss: Tensor, finite: Tensor, schedule: StepSchedule) -> tuple[bool, Tensor]:
        """Moves everything, or nothing: one decision that all ranks share, taken before anything moves.

        The step's one wait for the device but the estimator's: loss and check come in one transfer.
        """
        loss_value, is_finite = torch.stack([loss, finite.to(loss.dtype)]).tolist()
        if not (is_finite and self.spike_guard.admits(loss_value)):
            self.estimator.discard()
            self.objective.discard()
            self.engine.skip()
            return False, torch.zeros_like(loss)
        self.spike_guard.record(loss_value)
        self.estimator.accept()
        self.objective.accept()
        grad_norm = self.engine.step(schedule)
        self.engine.update_teacher(schedule.ema_momentum)
        return True, grad_norm

    def _forward_teacher(self, crops: Sequence[Crops]) -> tuple[list[_Share], NetworkOutput]:
        """Returns what shares a loss with the teacher's rows of it, and the teacher's rows of the whole batch."""
        num_images = crops[0].global_crops.shape[1]
        outputs = [self.engine.forward_teacher(_teacher_views(micro)) for micro in crops]
        whole = join(outputs, num_images)
        if self._accumulation == "exact":
            return [_Share(list(crops), whole)], whole
        return [_Share([micro], output) for micro, output in zip(crops, outputs, strict=True)], whole

    def _forward_student(self, share: _Share) -> StudentPass:
        num_images = share.crops[0].global_crops.shape[1]
        return StudentPass(self.engine, [_student_views(micro) for micro in share.crops], num_images)

    def _row_loss(self, share: _Share, step: int, index: int) -> RowLoss:
        """Returns the loss of a share as a function of the student's rows: where objective and estimator meet."""
        num_images = sum(micro.global_crops.shape[1] for micro in share.crops)

        def compute(student: NetworkOutput) -> dict[str, Tensor]:
            embeddings = student.embeddings
            batch = RankBatch(
                views=ViewRows(
                    student=_by_view(self._logit_operands(student, "student"), num_images),
                    teacher=_by_view(self._logit_operands(share.teacher, "teacher"), num_images),
                ),
                embeddings=None if embeddings is None else embeddings.unflatten(0, (-1, num_images)),
                num_parts=len(share.crops),
            )
            terms = self.objective(batch, step=step, micro_step=index)
            auxiliary = self.estimator.auxiliary_loss(student.learned_prototypes, step=step, micro_step=index)
            if auxiliary is None:
                return terms
            return terms | {"total": terms["total"] + auxiliary, "auxiliary": auxiliary}

        return compute

    def _logit_operands(self, output: NetworkOutput, role: Role) -> LogitOperands:
        operands = self.estimator.logit_operands(
            output.projections,
            role,
            output.learned_prototypes,
            kind=self.objective.kind("instance", role),
        )
        return LogitOperands(*operands)

    @torch.no_grad()
    def _count_usage(self, teacher: NetworkOutput, num_parts: int) -> None:
        rows, prototypes = self._logit_operands(teacher, "teacher")
        for part in rows.chunk(num_parts):  # the logits of one micro-batch exist at once
            self.usage.update(part, prototypes)
        assignment = self.estimator.assignment()
        if assignment is not None:
            self.usage.add_assignment(assignment)


def _by_view(operands: LogitOperands, num_images: int) -> LogitOperands:
    return operands._replace(rows=operands.rows.unflatten(0, (-1, num_images)))


def _teacher_views(crops: Crops) -> list[Tensor]:
    return [crops.global_crops.flatten(0, 1)]


def _student_views(crops: Crops) -> list[Tensor]:
    views = [crops.global_crops.flatten(0, 1)]
    if crops.local_crops.shape[0]:
        views.append(crops.local_crops.flatten(0, 1))
    return views
