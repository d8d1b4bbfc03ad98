"""The one interface behind which every objective of the encoder stands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from ..alarms import Collapse
from ..config import TermConfig
from ..estimator import LogitKind, Role

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

# Forward: the mean over ranks of an equally shaped tensor; backward: the identity, which is exact once the engine
# averages gradients. None where it is optional: a single process.
MeanOverRanks = Callable[[Tensor], Tensor]


class LogitOperands(NamedTuple):
    """The two factors of logits = rows @ columns.T, as `PrototypeEstimator.logit_operands` gives them."""

    rows: Float[Tensor, "*batch Q"]
    columns: Float[Tensor, "K Q"]


@dataclass(frozen=True, kw_only=True)
class RankBatch:
    """What student and teacher give for those images of this rank that share one loss.

    Global views come before local ones, and view j of both networks shows the same crop.

    Attributes:
        student: rows [V, B, Q] of all views.
        teacher: rows [W, B, Q] of the global views, W <= V.
        num_parts: micro-batches that the images came in. Memory that grows with B is to be divided by it.
    """

    student: LogitOperands
    teacher: LogitOperands
    num_parts: int = 1


@dataclass(frozen=True, kw_only=True)
class PatchBatch:
    """What both give for patches that were hidden from the student, in those images of this rank that share one loss.

    Ranks may hold different numbers of rows, also none.

    Attributes:
        student: rows [R, Q], one for each patch that is predicted.
        teacher: rows [T, Q]. Without `target_index` those of the same patches, T = R.
        weight: [R] weight of each row in the loss sum_r weight_r loss_r: one over the number of rows of its crop, over
            the number of crops with and without masks, so that every masked crop counts alike.
        position: [T] number of the patch of each of the teacher's rows in its crop's grid.
        target_index: [R] which of the teacher's rows is the target of each of the student's.
        num_parts: as in `RankBatch`.
    """

    student: LogitOperands
    teacher: LogitOperands
    weight: Float[Tensor, " R"]
    position: Int64[Tensor, " T"]
    target_index: Int64[Tensor, " R"] | None = None
    num_parts: int = 1


Batch = TypeVar("Batch", RankBatch, PatchBatch)


class Objective(nn.Module, ABC, Generic[Batch]):
    """What the encoder minimises on one batch: a term on views takes a `RankBatch`, one on patches a `PatchBatch`.

    It knows no engine and no optimizer, and owns no prototypes: an estimator hands it rows and columns. What it
    remembers from step to step (a centre) are buffers, alike on all ranks; its state dict belongs to a checkpoint.

    Attributes:
        kinds: the kind of logits that its operands are made for, by role.
        temperatures: what it divides them by, by role.
    """

    def __init__(self, config: TermConfig) -> None:
        super().__init__()
        term = config.resolved
        self.kinds: dict[Role, LogitKind] = {"student": term.logits, "teacher": term.logits}
        self.temperatures: dict[Role, float] = {
            "student": term.student_temperature,
            "teacher": term.teacher_temperature,
        }

    @abstractmethod
    def forward(self, batch: Batch, *, step: int, micro_step: int = 0) -> dict[str, Tensor]:
        """Returns named scalars, fp32; `total` is minimised, the others are recorded beside it as `loss/NAME`.

        Gradient reaches the student's rows and, where they are learned, its columns; the teacher's are detached.
        Collective where it is given something that is. Buffers stay as they are until `accept`.

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
