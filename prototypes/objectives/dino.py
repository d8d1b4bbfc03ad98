"""DINO's loss: cross-entropy between views with targets of the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from .cross_entropy import Targets, compute_cross_entropy
from .interface import MeanOverRanks
from .logits import LOGITS_PER_CHUNK
from .targets import TargetFigures, TargetLoss

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def dino_loss(
    student: Float[Tensor, "V B Q"],
    teacher: Float[Tensor, "W B Q"],
    student_prototypes: Float[Tensor, "K Q"],
    teacher_prototypes: Float[Tensor, "K Q"],
    *,
    offsets: Float[Tensor, "1 K"] | None = None,
    mean_over_ranks: MeanOverRanks | None = None,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
) -> TargetLoss:
    """Returns DINO's cross-entropy over ordered pairs of different views, and the figures of its targets.

    With the logits s = student . student_prototypes and t = teacher . teacher_prototypes, temperatures and all::

        total = mean_{i != j, b} -sum_k softmax_k(t_jb - u) log softmax_k(s_ib)

    where i runs over the V student views, j over the W teacher views, and view j of both networks shows the same crop.
    u makes the targets what they are: centre / teacher temperature, Sinkhorn's offsets, or nothing, where the
    logits are a mixture's posterior. Source: DINO (Caron et al. 2021), section 3.1 and its public code; DINOv2
    (Oquab et al. 2023) has the same mean, in two parts.

    Peak memory is about four times `logits_per_chunk` floats, whatever B, V and K are: the logits of a few images
    exist at a time, of one student view after the other, with the gradient at them. Collective through
    `mean_over_ranks` (the figures only). Gradient reaches `student` and, where they require it,
    `student_prototypes`.

    Args:
        student: rows of all views, global ones first.
        teacher: rows of the global views, W <= V.
        student_prototypes: the student's columns.
        teacher_prototypes: the teacher's columns.
        offsets: what is subtracted from the teacher's logits.
        mean_over_ranks: of the targets' sums; None: a single process.
        logits_per_chunk: logits of the teacher that exist at once.
    """
    num_views, num_images, _ = student.shape
    num_targets = teacher.shape[0]
    num_pairs = num_views * num_targets - min(num_views, num_targets)
    images_per_chunk = max(1, logits_per_chunk // (num_targets * len(teacher_prototypes)))
    figures = TargetFigures(len(teacher_prototypes), student.device)

    def make_targets() -> Iterator[Targets]:
        for first in range(0, num_images, images_per_chunk):
            last = min(first + images_per_chunk, num_images)
            probs = figures.take(_compute_logits(teacher[:, first:last], teacher_prototypes, offsets))
            for view in range(num_views):
                others = [index for index in range(num_targets) if index != view]
                if others:
                    rows = slice(view * num_images + first, view * num_images + last)
                    mixed = probs[others[0]] if len(others) == 1 else probs[others].sum(0)
                    yield Targets(rows, mixed, float(len(others)), 1 / (num_pairs * num_images))

    return figures.complete(
        compute_cross_entropy(student.flatten(0, 1), student_prototypes, make_targets()), mean_over_ranks
    )


@torch.no_grad()
def _compute_logits(
    rows: Float[Tensor, "W n Q"], prototypes: Float[Tensor, "K Q"], offsets: Float[Tensor, "1 K"] | None
) -> Float[Tensor, "W n K"]:
    logits = (rows @ prototypes.to(rows.dtype).T).float()
    return logits if offsets is None else logits.sub_(offsets)
