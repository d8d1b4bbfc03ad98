"""What the encoder minimises: the interface behind which every term stands, and the sum of the terms of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from ..alarms import Collapse
from ..config import Level, TermConfig
from ..estimator import LogitKind, Role
from .koleo import compute_embedding_koleo

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

PREFIXES: dict[Level, str] = {"instance": "", "patch": "patch_"}
"""What the names of a level's figures begin with."""

# Forward: the mean over ranks of an equally shaped tensor; backward: the identity, which is exact once the engine
# averages gradients. None where it is optional: a single process.
MeanOverRanks = Callable[[Tensor], Tensor]


class LogitOperands(NamedTuple):
    """The two factors of logits = rows @ columns.T, as `PrototypeEstimator.logit_operands` gives them."""

    rows: Float[Tensor, "*batch Q"]
    columns: Float[Tensor, "K Q"]


class ViewRows(NamedTuple):
    """What both networks give for the views. Global ones come first, and view j of both shows the same crop.

    Attributes:
        student: rows [V, B, Q] of all views.
        teacher: rows [W, B, Q] of the global views, W <= V.
    """

    student: LogitOperands
    teacher: LogitOperands


class PatchRows(NamedTuple):
    """What both networks give for patches that were hidden from the student. Ranks may hold different numbers, also 0.

    Attributes:
        student: rows [R, Q], one for each patch that is predicted.
        teacher: rows [T, Q], of as many patches or more.
        target: [R] which of the teacher's rows shows the student's patch; None: the same patches in the same order.
        weight: [R] weight of each of the student's rows in the loss; they sum to the share of crops with masks.
        position: [T] place of each of the teacher's patches in its crop's grid, 0 .. num_positions - 1.
        num_positions: patches of a crop.
    """

    student: LogitOperands
    teacher: LogitOperands
    target: Int64[Tensor, " R"] | None
    weight: Float[Tensor, " R"]
    position: Int64[Tensor, " T"]
    num_positions: int


@dataclass(frozen=True, kw_only=True)
class RankBatch:
    """What student and teacher give for those images of this rank that share one loss.

    Attributes:
        views: for the term on views; None where there is none.
        patches: for the term on patches; None where there is none.
        embeddings: [W, B, D] the student's, of the global views, before the head; None where nothing asks for them.
        num_parts: micro-batches that the images came in. Memory that grows with B is to be divided by it.
    """

    views: ViewRows | None = None
    patches: PatchRows | None = None
    embeddings: Float[Tensor, "W B D"] | None = None
    num_parts: int = 1


class Term(nn.Module, ABC):
    """A term of the objective, on views or on patches: its part of a `RankBatch` in, named scalars out.

    It knows no engine and no optimizer, and owns no prototypes: an estimator hands it rows and columns. What it
    remembers from step to step (a centre) are buffers, alike on all ranks; its state dict belongs to a checkpoint.

    Args:
        config: logits and temperatures.
        steps_per_epoch: by which schedules count.

    Attributes:
        kinds: the kind of logits that its operands are made for, by role.
        by_position: whether targets are balanced within each position of the grid.
    """

    by_position = False

    def __init__(self, config: TermConfig, steps_per_epoch: int = 1) -> None:
        super().__init__()
        self.settings = config.resolved
        teacher: LogitKind = "posterior" if self.settings.targets == "posterior" else self.settings.logits
        self.kinds: dict[Role, LogitKind] = {"student": self.settings.logits, "teacher": teacher}
        self._warmup_steps = config.teacher_temperature_warmup_epochs * steps_per_epoch

    @abstractmethod
    def forward(self, batch: RankBatch, *, step: int, micro_step: int = 0) -> dict[str, Tensor]:
        """Returns named scalars, fp32; `total` is minimised, the others are recorded beside it as `loss/NAME`.

        Gradient reaches the student's rows and, where they are learned, its columns; the teacher's are detached.
        Collective where it is given something that is. The state moves in `accept` alone.

        Args:
            batch: this rank's rows.
            step: optimizer step; whatever is drawn or scheduled is a function of the seed, it and `micro_step`, alike
                on all ranks.
            micro_step: number of the loss inside the step: 0 where all micro-batches share one, else the micro-batch.
        """

    def accept(self) -> None:
        """Takes over what the step's batches say about the state: the step was taken."""

    def discard(self) -> None:
        """Forgets what the step's batches say: the step was skipped, the state is bitwise what it was before it."""

    @property
    def collapses(self) -> tuple[Collapse, ...]:
        """How the scalars show that student and teacher have become constant, for the alarms."""
        return ()

    def temperature(self, role: Role, step: int) -> float:
        """Returns what a role's logits are divided by at a step; the teacher's rises linearly in its warm-up."""
        if role == "student":
            return self.settings.student_temperature
        start, end = self.settings.teacher_temperature_start, self.settings.teacher_temperature
        if start is None or step >= self._warmup_steps:
            return end
        return start + (end - start) * step / self._warmup_steps


class Objective(nn.Module):
    """The sum of a run's terms, weighted, and of KoLeo on the student's embeddings (DINOv2's regulariser).

    Args:
        terms: by level.
        weights: of the terms, by level.
        koleo_weight: 0 leaves KoLeo out.
    """

    def __init__(
        self, terms: Mapping[Level, Term], weights: Mapping[Level, float], koleo_weight: float = 0.0
    ) -> None:
        super().__init__()
        self._by_level = dict(terms)
        self.terms = nn.ModuleDict({level: term for level, term in terms.items()})  # noqa: C416
        self._weights = dict(weights)
        self.koleo_weight = koleo_weight

    @property
    def balances_positions(self) -> bool:
        """Whether patches are compared within their positions: an estimator that balances rows does so as well."""
        return "patch" in self._by_level and self._by_level["patch"].by_position

    def kind(self, level: Level, role: Role) -> LogitKind:
        """Returns the kind of logits that a level's operands of a role are made for."""
        return self._by_level[level].kinds[role]

    def forward(self, batch: RankBatch, *, step: int, micro_step: int = 0) -> dict[str, Tensor]:
        """Returns the terms' scalars, those of patches as `patch_NAME`, `koleo`, and the weighted sum `total`.

        See `Term.forward`.
        """
        scalars: dict[str, Tensor] = {}
        totals = []
        for level, term in self._by_level.items():
            found = term(batch, step=step, micro_step=micro_step)
            totals.append(self._weights[level] * found.pop("total"))
            scalars |= {PREFIXES[level] + name: value for name, value in found.items()}
        if self.koleo_weight > 0 and batch.embeddings is not None:
            scalars["koleo"] = compute_embedding_koleo(batch.embeddings)
            totals.append(self.koleo_weight * scalars["koleo"])
        total = totals[0]
        for other in totals[1:]:
            total = total + other
        return {"total": total, **scalars}

    def accept(self) -> None:
        """See `Term`."""
        for term in self._by_level.values():
            term.accept()

    def discard(self) -> None:
        """See `Term`."""
        for term in self._by_level.values():
            term.discard()

    @property
    def collapses(self) -> tuple[Collapse, ...]:
        """See `Term`."""
        return tuple(
            collapse._replace(terms=tuple(PREFIXES[level] + name for name in collapse.terms))
            for level, term in self._by_level.items()
            for collapse in term.collapses
        )


def compute_mask_weights(masks: Bool[Tensor, "V B N"]) -> Float[Tensor, " R"]:
    """Returns the weight of each masked patch, in the order of `masks.nonzero()`: one crop, one voice.

    1 / (masked patches of the crop * number of crops), crops without masks included, so that the loss grows with the
    share of masked crops, as in iBOT's and DINOv2's code; the weights sum to that share.
    """
    counts = masks.sum(-1, keepdim=True)
    return (masks / (counts.clamp_min(1) * masks.shape[0] * masks.shape[1]))[masks]
