"""The loss of terms on patches: cross-entropy with the teacher's targets at positions that the student did not see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .cross_entropy import Targets, compute_cross_entropy
from .interface import MeanOverRanks
from .logits import LOGITS_PER_CHUNK, ChunkedLogits
from .sinkhorn import pick_offsets
from .targets import TargetFigures, TargetLoss

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor


def patch_loss(
    student: Float[Tensor, "R Q"],
    teacher: Float[Tensor, "R Q"],
    student_prototypes: Float[Tensor, "K Q"],
    teacher_prototypes: Float[Tensor, "K Q"],
    weight: Float[Tensor, " R"],
    *,
    offsets: Float[Tensor, "G K"] | None = None,
    group: Int64[Tensor, " R"] | None = None,
    mean_over_ranks: MeanOverRanks | None = None,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
) -> TargetLoss:
    """Returns the weighted cross-entropy of masked patches with the teacher's targets, and the targets' figures.

    With the logits s and t of student and teacher, temperatures and all, and row r of both at the same patch::

        total = sum_r w_r ( -sum_k softmax_k(t_r - u_{g(r)}) log softmax_k(s_r) )

    Weights make it iBOT's (`compute_mask_weights`) or CAPI's (one over the number of rows). Sources: iBOT (Zhou et al.
    2022), eq. 2; DINOv2 (Oquab et al. 2023), section 4; CAPI (Darcet et al. 2025), section 3.

    Peak memory is about four times `logits_per_chunk` floats, whatever R and K are. Collective through
    `mean_over_ranks` (the figures only); ranks may hold different numbers of rows, also none. Gradient reaches
    `student` and, where they require it, `student_prototypes`.

    Args:
        student: rows, one for each patch that is predicted.
        teacher: rows of the same patches.
        student_prototypes: the student's columns.
        teacher_prototypes: the teacher's columns.
        weight: of each row.
        offsets: what is subtracted from the teacher's logits: see `dino_loss`; one row for each group.
        group: of each row (its position), where the offsets differ by group.
        mean_over_ranks: of the targets' sums; None: a single process.
        logits_per_chunk: logits of the teacher that exist at once.
    """
    figures = TargetFigures(len(teacher_prototypes), student.device)

    def make_targets() -> Iterator[Targets]:
        for rows, logits in ChunkedLogits(teacher, teacher_prototypes, logits_per_chunk):
            if offsets is not None:
                logits = logits - pick_offsets(offsets, None if group is None else group[rows])
            yield Targets(rows, figures.take(logits), 1.0, weight[rows])

    return figures.complete(
        compute_cross_entropy(student, student_prototypes, make_targets()), mean_over_ranks
    )
