"""The one interface behind which every objective of the encoder stands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..alarms import Collapse
from ..config import ObjectiveConfig
from ..estimator import LogitKind, Role

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# Forward: the mean over ranks of an equally shaped tensor; backward: the identity, which is exact once the engine
# averages gradients. None where it is optional: a single process.
MeanOverRanks = Callable[["Tensor"], "Tensor"]


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
        student_patches: rows [W, B, M, Q] of M patches of every global view, for terms on patches (iBOT, CAPI); None
            where the network projects no patches, as all do today.
        teacher_patches: the same of the teacher.
        num_parts: micro-batches that the images came in. Memory that grows with B is to be divided by it.
    """

    student: LogitOperands
    teacher: LogitOperands
    student_patches: LogitOperands | None = None
    teacher_patches: LogitOperands | None = None
    num_parts: int = 1


class Objective(ABC):
    """What the encoder minimises on one `RankBatch`.

    It knows no engine and no optimizer, and owns no prototypes: an estimator hands it rows and columns.

    Attributes:
        logits: the kind of logits that its operands are made for.
        temperatures: of "cosine" logits, by role.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.logits: LogitKind = config.logits
        self.temperatures: dict[Role, float] = {
            "student": config.student_temperature,
            "teacher": config.teacher_temperature,
        }

    @abstractmethod
    def __call__(self, batch: RankBatch, *, step: int, micro_step: int = 0) -> dict[str, Tensor]:
        """Returns named scalars, fp32; `total` is minimised, the others are recorded beside it as `loss/NAME`.

        Gradient reaches the student's rows and, where they are learned, its columns; the teacher's are detached.
        Collective through the objective's mean over ranks, if it takes one.

        Args:
            batch: this rank's rows.
            step: optimizer step; whatever is drawn is a function of the seed, it and `micro_step`, alike on all ranks.
            micro_step: number of the loss inside the step: 0 where all micro-batches share one, else the micro-batch.
        """

    @property
    def collapses(self) -> tuple[Collapse, ...]:
        """How the scalars show that student and teacher have become constant, for the alarms."""
        return ()
