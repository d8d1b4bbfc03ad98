"""The consistency objective inside random partitions (CARP), block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from ..alarms import Collapse
from ..config import InstanceConfig, PartitionConfig
from .interface import MeanOverRanks, RankBatch, Term
from .logits import LOGITS_PER_CHUNK
from .partitions import draw_partition

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor

_BLOCKS_ON_A_CPU = 8
"""Logits of so many stay in its caches; a GPU wants few, large kernels instead."""


class CarpTerm(Term):
    """CARP on random partitions that it draws itself, a new one for every loss.

    Args:
        config: logits, temperatures and the entropy's weight.
        partition: size of the blocks, and how many of them have logits at once.
        seed: the run's seed, of which the partitions are a function.
        steps_per_epoch: by which the teacher's temperature warms up.
        mean_over_ranks: of the mean probabilities.
    """

    def __init__(
        self,
        config: InstanceConfig,
        partition: PartitionConfig,
        *,
        seed: int,
        steps_per_epoch: int = 1,
        mean_over_ranks: MeanOverRanks | None = None,
    ) -> None:
        super().__init__(config, steps_per_epoch)
        self._entropy_weight = config.entropy_weight
        self._partition = partition
        self._seed = seed
        self._mean_over_ranks = mean_over_ranks

    def forward(self, batch: RankBatch, *, step: int, micro_step: int = 0) -> dict[str, Tensor]:
        """Returns `total`, `consistency` and `entropy` of `carp_loss`. Collective."""
        assert batch.views is not None
        student, teacher = batch.views
        columns = student.columns
        loss = carp_loss(
            student.rows / self.temperature("student", step),
            teacher.rows / self.temperature("teacher", step),
            columns,
            teacher.columns,
            draw_partition(
                len(columns),
                self._partition.size,
                seed=self._seed,
                step=step,
                micro_step=micro_step,
                device=columns.device,
            ),
            mean_over_ranks=self._mean_over_ranks,
            entropy_weight=self._entropy_weight,
            blocks_per_chunk=count_blocks_per_chunk(
                self._partition,
                num_rows=student.rows.shape[:2].numel() + teacher.rows.shape[:2].numel(),
                num_parts=batch.num_parts,
                device=columns.device,
            ),
        )
        return loss._asdict()

    @property
    def collapses(self) -> tuple[Collapse, ...]:
        """Whatever the entropy's weight, consistency and entropy of constant networks add up to log S."""
        remedy = "its entropy_weight >= 1, BatchNorm in the head"
        return (Collapse(("consistency", "entropy"), self._partition.size, remedy=remedy),)


def count_blocks_per_chunk(
    partition: PartitionConfig, *, num_rows: int, num_parts: int, device: torch.device
) -> int:
    """Returns how many blocks have logits at once.

    Args:
        partition: which says it, or leaves it to the device.
        num_rows: rows of both networks, (V + W) * B.
        num_parts: micro-batches that the rows come from; by it a number of blocks is divided, for one of them.
        device: where the logits are.
    """
    if partition.blocks_per_chunk is None and device.type == "cuda":
        return max(1, LOGITS_PER_CHUNK // (num_rows * partition.size))
    return max(1, (partition.blocks_per_chunk or _BLOCKS_ON_A_CPU) // num_parts)


class CarpLoss(NamedTuple):
    """Scalars of the objective: total = consistency + entropy_weight * entropy; entropy >= 0."""

    total: Tensor
    consistency: Tensor
    entropy: Tensor


def carp_loss(
    student: Float[Tensor, "V B Q"],
    teacher: Float[Tensor, "W B Q"],
    student_prototypes: Float[Tensor, "K Q"],
    teacher_prototypes: Float[Tensor, "K Q"],
    partition: Int64[Tensor, "G S"],
    *,
    mean_over_ranks: MeanOverRanks | None = None,
    entropy_weight: float = 1.0,
    blocks_per_chunk: int = _BLOCKS_ON_A_CPU,
) -> CarpLoss:
    """Returns CARP's consistency and entropy inside the blocks of a random partition.

    With p, q the softmax of student and teacher logits inside each block (no temperature)::

        consistency = mean_{i != j, block, sample} -log clamp(<p_i, q_j>, eps, 1 - eps)
        entropy     = mean_block [ log S + sum_c m_c log clamp(m_c, eps, 1 - eps) ],   m = mean of p and q

    where i runs over the V student views, j over the W teacher views, view j of both networks shows the
    same crop, and m is the mean over all student and teacher views, samples and ranks. Source: CARP (Silva &
    Ramirez Rivera 2023), section 3, and its public code. There the probabilities themselves are gathered for
    m; here only K floats are reduced, which gives the same value and the same gradient.

    Peak memory is (V + W) * B * blocks_per_chunk * S floats: logits are computed for a few blocks at a time,
    dropped, and recomputed in the backward pass, unless one chunk has them all. Collective through
    `mean_over_ranks` (one reduction of K floats). Logits follow the ambient autocast; softmax and everything after
    it is fp32. Gradient reaches `student` and, where they require it, `student_prototypes`; teacher inputs are
    detached.

    Args:
        student: projections, global views first.
        teacher: projections of the global views, W <= V.
        student_prototypes: the student's prototypes.
        teacher_prototypes: the teacher's prototypes.
        partition: indices of the prototypes of each block.
        mean_over_ranks: forward: mean over ranks; backward: identity, which is exact once the engine averages
            gradients. None: a single process.
        entropy_weight: weight of the entropy term.
        blocks_per_chunk: blocks whose logits exist at once.

    Returns:
        Scalars, fp32. Both a uniform and a constant one-hot solution give log S.
    """
    consistency, mean_prob = _compute_in_chunks(
        student,
        teacher.detach(),
        student_prototypes,
        teacher_prototypes.detach(),
        partition.split(blocks_per_chunk),
    )
    if mean_over_ranks is not None:
        mean_prob = mean_over_ranks(mean_prob)
    entropy = math.log(partition.shape[1]) - _compute_entropy(mean_prob).mean()
    return CarpLoss(consistency + entropy_weight * entropy, consistency, entropy)


def _compute_in_chunks(
    student: Float[Tensor, "V B Q"],
    teacher: Float[Tensor, "W B Q"],
    student_prototypes: Float[Tensor, "K Q"],
    teacher_prototypes: Float[Tensor, "K Q"],
    chunks: Sequence[Int64[Tensor, "_ S"]],
) -> tuple[Float[Tensor, ""], Float[Tensor, "G S"]]:
    """Returns the mean consistency and the mean probabilities; each chunk's logits live for the chunk only."""
    # Sample-major rows make the products <p_i, q_j> of one sample one small matrix product without a copy.
    student_rows = student.transpose(0, 1).contiguous()
    teacher_rows = teacher.transpose(0, 1).contiguous()
    rows_and_columns = (student_rows, teacher_rows, student_prototypes, teacher_prototypes)
    # One chunk alone is as large in the backward pass, recomputed or kept, and the loss is followed by that at once.
    compute = _compute_blocks if len(chunks) == 1 else _compute_blocks_again
    consistency_sums, mean_probs = [], []
    for blocks in chunks:
        consistency, mean_prob = compute(*rows_and_columns, blocks)
        consistency_sums.append(consistency)
        mean_probs.append(mean_prob)
    mean_probs_of_blocks = torch.cat(mean_probs)
    return torch.stack(consistency_sums).sum() / len(mean_probs_of_blocks), mean_probs_of_blocks


def _compute_blocks(
    student: Float[Tensor, "B V Q"],
    teacher: Float[Tensor, "B W Q"],
    student_prototypes: Float[Tensor, "K Q"],
    teacher_prototypes: Float[Tensor, "K Q"],
    blocks: Int64[Tensor, "g S"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "g S"]]:
    """Returns the consistency summed over the blocks and the mean probabilities of the blocks' prototypes."""
    student_probs = _compute_block_probs(student, student_prototypes, blocks)
    teacher_probs = _compute_block_probs(teacher, teacher_prototypes, blocks)
    num_student_views, num_teacher_views = student.shape[1], teacher.shape[1]
    eps = torch.finfo(torch.float32).eps
    with torch.autocast(student.device.type, enabled=False):
        # [g, B, V, W]: agreement of every student view with every teacher view of the same sample
        agreement = student_probs @ teacher_probs.transpose(-1, -2)
        losses = -agreement.clamp(eps, 1 - eps).log()
        same_crop = torch.eye(num_student_views, num_teacher_views, dtype=torch.bool, device=student.device)
        num_pairs = num_student_views * num_teacher_views - min(num_student_views, num_teacher_views)
        consistency = losses.masked_fill(same_crop, 0.0).sum() / (num_pairs * student.shape[0])
        num_rows = student.shape[0] * (num_student_views + num_teacher_views)
        mean_prob = (student_probs.sum((1, 2)) + teacher_probs.sum((1, 2))) / num_rows
    return consistency, mean_prob


def _compute_blocks_again(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """As `_compute_blocks`, whose logits are dropped and made once more in the backward pass."""
    return checkpoint(_compute_blocks, *inputs, use_reentrant=False, preserve_rng_state=False)


def _compute_block_probs(
    rows: Float[Tensor, "B V Q"], prototypes: Float[Tensor, "K Q"], blocks: Int64[Tensor, "g S"]
) -> Float[Tensor, "g B V S"]:
    """Returns the softmax of rows . prototypes inside each block, fp32."""
    num_samples, num_views, width = rows.shape
    block_prototypes = prototypes[blocks].transpose(1, 2)
    logits = torch.matmul(rows.view(1, num_samples * num_views, width), block_prototypes)
    probs = torch.softmax(logits.float(), dim=-1)
    return probs.view(len(blocks), num_samples, num_views, blocks.shape[1])


def _compute_entropy(probs: Float[Tensor, "g S"]) -> Float[Tensor, " g"]:
    eps = torch.finfo(torch.float32).eps
    return -(probs * probs.clamp(eps, 1 - eps).log()).sum(-1)
