"""Teacher prototypes trained by their own clustering loss, on features without gradient (SwAV's codes, CAPI)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .config import ClusteringConfig, PrototypesConfig
from .estimator import EstimatorContext, LogitKind, Observation, PrototypeEstimator, Role
from .learned import LearnedPrototypes, require_learned
from .mixture.candidate import CandidateTables
from .objectives.logits import ChunkedLogits
from .objectives.sinkhorn import compute_sinkhorn_offsets, count_groups, pick_offsets
from .random_numbers import draw_unit_vectors
from .statistics import drop_non_finite, find_finite, full_precision

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

_ADAM_EPS = 1e-8


class _Rows(NamedTuple):
    rows: Tensor
    weight: Tensor
    group: Tensor | None


class SinkhornCodes(PrototypeEstimator):
    """Unit prototypes that learn Sinkhorn targets by gradient, shared by student and teacher, mode `full`.

    Per step: targets t = Sinkhorn(h . w / T_target), loss CE(t, softmax(h . w / T_prediction)) on unit rows h
    without gradient, one AdamW step on w alone, w back on the sphere (SwAV, Caron et al. 2020). The gradient
    is in closed form, (softmax - t) / T_prediction, and summed over ranks like any other statistic.
    """

    name = "sinkhorn"
    table_names: tuple[str, ...] = ("means", "first_moment", "second_moment")
    means: Tensor
    first_moment: Tensor
    second_moment: Tensor

    def __init__(self, config: PrototypesConfig, context: EstimatorContext) -> None:
        super().__init__(config, context)
        self.clustering = config.clustering
        self.register_buffer("means", self.draw_start())
        self.register_buffer("first_moment", torch.zeros_like(self.means))
        self.register_buffer("second_moment", torch.zeros_like(self.means))
        self._candidate = CandidateTables()
        self._held: list[_Rows] = []
        self._num_bad = 0
        self._is_committed = False
        self._last: Tensor | None = None

    def draw_start(self) -> Float[Tensor, "K W"]:
        """Returns random unit rows."""
        return draw_unit_vectors(self.num_prototypes, self.dim, self.context.seed)

    def extend_rows(self, rows: Float[Tensor, "N P"]) -> Float[Tensor, "N W"]:
        """Returns the unit rows that the table is multiplied with."""
        return rows

    @torch.no_grad()
    def observe(
        self,
        projections: Float[Tensor, "N P"],
        weight: Float[Tensor, " N"] | None = None,
        group: Int64[Tensor, " N"] | None = None,
        is_last: bool = True,
    ) -> Observation:
        """Keeps the rows; on the last micro-batch computes the gradient and starts its sum. Collective.

        The Sinkhorn targets are balanced over the whole step, and within each group where there are groups.
        """
        rows, kept, num_bad = drop_non_finite(projections.detach().float(), weight)
        if group is not None and num_bad:
            group = group[find_finite(projections, weight)]
        self._held.append(_Rows(rows, rows.new_ones(len(rows)) if kept is None else kept.float(), group))
        self._num_bad += num_bad
        if not is_last:
            return Observation()
        with full_precision(self.means.device):
            return Observation(self.context.collectives.start_sum(self._compute_gradient()))

    def _compute_gradient(self) -> Float[Tensor, " F"]:
        """Returns [dL/dw summed over rows, flat; loss, weight, bad rows]: one tensor to reduce.

        The logits of a bounded number of rows exist at a time: patches are many.
        """
        options, collectives = self.clustering, self.context.collectives
        rows = nn.functional.normalize(torch.cat([held.rows for held in self._held]), dim=1)
        weight = torch.cat([held.weight for held in self._held])
        group, num_groups = self._join_groups()
        extended = self.extend_rows(rows)
        logits = ChunkedLogits(extended / options.target_temperature, self.means)
        offsets = compute_sinkhorn_offsets(
            logits,
            options.sinkhorn_iterations,
            collectives,
            weight=weight,
            group=group,
            num_groups=num_groups,
        )
        gradient, loss = torch.zeros_like(self.means), weight.new_zeros(())
        for chosen, chunk in logits:
            members = None if group is None else group[chosen]
            targets = torch.softmax(chunk - pick_offsets(offsets, members), dim=1)
            sharpness = options.target_temperature / options.prediction_temperature
            log_probs = torch.log_softmax(chunk * sharpness, dim=1)
            loss -= weight[chosen] @ (targets * log_probs).sum(1)
            errors = log_probs.exp_().sub_(targets).mul_(weight[chosen, None])
            gradient += (errors.T @ extended[chosen]).div_(options.prediction_temperature)
        scalars = torch.stack([loss, weight.sum(), loss.new_tensor(float(self._num_bad))])
        return torch.cat([gradient.flatten(), scalars])

    def _join_groups(self) -> tuple[Int64[Tensor, " N"] | None, int]:
        """Returns the rows' groups, None where none has one, and their number. Collective.

        Rows without a group beside others that have one, as views beside patches, are balanced among themselves.
        """
        if all(held.group is None for held in self._held):
            return None, 1
        parts = [
            torch.full_like(held.weight, -1, dtype=torch.int64) if held.group is None else held.group
            for held in self._held
        ]
        group = torch.cat(parts)
        number = count_groups(group, self.context.collectives)
        return torch.where(group < 0, number, group), number + 1

    @torch.no_grad()
    def commit(self, observation: Observation) -> None:
        """Waits for the gradient and writes one AdamW step into the candidate."""
        if observation.handle is None:
            raise ValueError(
                "observation has no reduction; expected that of the call with is_last=True; pass it"
            )
        reduced = observation.handle.wait()
        self._last = reduced[-3:].clone()
        self._candidate.allocate(self, self.table_names)
        gradient = reduced[:-3].view_as(self.means) / self._last[1].clamp_min(1e-12)
        has_rows = self._last[1] > 0
        moved = self._adam_step(gradient)
        # Without a good row on any rank nothing moves, not even by the averages' decay.
        self._candidate.write(
            {
                name: torch.where(has_rows, value, getattr(self, name))
                for name, value in zip(self.table_names, moved, strict=True)
            }
        )
        self._is_committed = True

    def _adam_step(self, gradient: Float[Tensor, "K W"]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (table, first moment, second moment) after AdamW (Loshchilov & Hutter 2019)."""
        first_rate, second_rate = (1 - beta for beta in self.clustering.betas)
        first = torch.lerp(self.first_moment, gradient, first_rate)
        second = torch.lerp(self.second_moment, gradient.square(), second_rate)
        number = self.step + 1
        first_scale = 1 - (1 - first_rate) ** number
        second_scale = 1 - (1 - second_rate) ** number
        learning_rate = compute_learning_rate(self.clustering, self.step, self.context.total_steps)
        move = (first / first_scale) / ((second / second_scale).sqrt() + _ADAM_EPS)
        table = self.means * (1 - learning_rate * self.clustering.weight_decay) - learning_rate * move
        return self.constrain(table), first, second

    def constrain(self, table: Float[Tensor, "K W"]) -> Float[Tensor, "K W"]:
        """Returns the table back on the sphere."""
        return nn.functional.normalize(table, dim=1)

    def accept(self) -> None:
        """Swaps candidate and state."""
        assert self._is_committed, "accept() without commit()"
        self._candidate.swap(self)
        self._forget_observations()
        super().accept()

    def discard(self) -> None:
        """Leaves the state."""
        self._forget_observations()

    def _forget_observations(self) -> None:
        self._held, self._num_bad, self._is_committed = [], 0, False

    def set_extra_state(self, state: dict[str, object]) -> None:
        """Restores the step and forgets what was observed."""
        super().set_extra_state(state)
        self._forget_observations()

    def prototypes(self, role: Role, learned: Float[Tensor, "K P"] | None = None) -> Float[Tensor, "K P"]:
        """Returns unit rows, the candidate's after `commit`; without gradient."""
        del role, learned
        return nn.functional.normalize(self.table()[:, : self.dim], dim=1)

    def table(self) -> Float[Tensor, "K W"]:
        """Returns the table itself, the candidate's after `commit`; without gradient."""
        return self._candidate["means"] if self._is_committed else self.means

    def metrics(self) -> dict[str, float]:
        """Returns `clustering/...` of the last committed step; waits for the device."""
        if self._last is None:
            return {}
        loss, weight, num_bad = self._last.tolist()
        learning_rate = compute_learning_rate(self.clustering, self.step, self.context.total_steps)
        return {
            "clustering/loss": loss / max(weight, 1e-12),
            "clustering/bad_rows": num_bad,
            "clustering/lr": learning_rate,
        }


class PartialEstimator(SinkhornCodes):
    """CAPI's split (Darcet et al. 2025): the teacher's prototypes cluster, the student's are learned jointly.

    The teacher's table has a bias as a last column and free row lengths; its rows start as N(0, 1). The
    student's prototypes are trained by the encoder's loss; `coupling.tie` pulls them to the teacher's. The teacher's
    "clustering" logits are those that the table is trained on, lengths and bias included: with the clustering's
    temperature they give its own assignments. All others are of unit rows.
    """

    name = "partial"

    def draw_start(self) -> Float[Tensor, "K W"]:
        """Returns standard normal rows with a zero bias as their last column."""
        rows = super().draw_start() * math.sqrt(self.dim)
        return torch.cat([rows, rows.new_zeros(len(rows), 1)], dim=1)

    def extend_rows(self, rows: Float[Tensor, "N P"]) -> Float[Tensor, "N W"]:
        """Returns the unit rows with a one for the bias."""
        return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)

    def constrain(self, table: Float[Tensor, "K W"]) -> Float[Tensor, "K W"]:
        """Returns the table as it is."""
        return table

    def build_learned(self) -> nn.Module:
        """Returns the student's prototypes, which start at the teacher's directions."""
        return LearnedPrototypes(self.num_prototypes, self.dim, self.context.seed)

    def prototypes(self, role: Role, learned: Float[Tensor, "K P"] | None = None) -> Float[Tensor, "K P"]:
        """Returns `learned` for the student, the clustering's unit rows for the teacher."""
        return require_learned(learned) if role == "student" else super().prototypes(role)

    def logit_operands(
        self,
        projections: Float[Tensor, "*batch P"],
        role: Role,
        learned: Float[Tensor, "K P"] | None = None,
        kind: LogitKind = "dot",
    ) -> tuple[Float[Tensor, "*batch Q"], Float[Tensor, "K Q"]]:
        """Returns rows and columns of the logits; see the base class."""
        rows, columns = super().logit_operands(projections, role, learned, kind)
        if role == "student" or kind != "clustering":
            return rows, columns
        extended = self.extend_rows(rows.flatten(0, -2))
        return extended.view(*rows.shape[:-1], extended.shape[-1]), self.table()

    def auxiliary_loss(
        self,
        learned: Float[Tensor, "K P"] | None = None,
        *,
        step: int = 0,
        micro_step: int = 0,
    ) -> Float[Tensor, ""] | None:
        """Returns tie * mean_k |C_student - sg(C_teacher)|^2, or None without a tie."""
        del step, micro_step
        if self.config.coupling.tie == 0:
            return None
        difference = require_learned(learned) - self.prototypes("teacher")
        return self.config.coupling.tie * difference.square().sum(1).mean()


def compute_learning_rate(config: ClusteringConfig, step: int, total_steps: int) -> float:
    """Returns the learning rate at `step`: linear warm-up, then the first part of a half cosine (CAPI)."""
    num_warmup = config.warmup_fraction * total_steps
    if step < num_warmup:
        return config.learning_rate * (step + 1) / (num_warmup + 1)
    progress = (step - num_warmup) / max(total_steps - num_warmup, 1.0)
    angle = math.pi * config.cosine_end * min(progress, 1.0)
    return config.learning_rate * 0.5 * (1 + math.cos(angle))
