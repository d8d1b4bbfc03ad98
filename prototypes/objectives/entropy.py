"""The entropy of the mean probabilities: what holds images apart where neither centre nor Sinkhorn does."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .interface import MeanOverRanks
from .logits import LOGITS_PER_CHUNK

if TYPE_CHECKING:
    from jaxtyping import Float


def compute_entropy_deficit(
    rows: Float[Tensor, "N Q"],
    columns: Float[Tensor, "K Q"],
    mean_over_ranks: MeanOverRanks | None = None,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
) -> Float[Tensor, ""]:
    """Returns log K - H(m), m the mean over all ranks' rows of softmax(rows . columns): 0 where all are used alike.

    The "mean entropy maximisation" of MSN (Assran et al. 2022), eq. 2; CARP takes the same inside blocks. The logits of
    `logits_per_chunk / K` rows exist at a time and are computed again in the backward pass. Gradient reaches rows and
    columns. Ranks may hold different numbers of rows, also none. Collective through `mean_over_ranks`.

    Args:
        rows: with their temperature.
        columns: prototypes.
        mean_over_ranks: differentiable mean over ranks; None: a single process.
        logits_per_chunk: logits that exist at once; at least one row's.
    """
    sums = columns.new_zeros(len(columns), dtype=torch.float32)
    for part in rows.split(max(1, logits_per_chunk // len(columns))):
        sums = sums + checkpoint(_sum_probs, part, columns, use_reentrant=False, preserve_rng_state=False)
    count = sums.new_tensor([float(len(rows))])
    if mean_over_ranks is not None:
        sums, count = mean_over_ranks(sums), mean_over_ranks(count)
    mean = sums / count.clamp_min(torch.finfo(count.dtype).tiny)
    return math.log(len(columns)) - torch.special.entr(mean).sum()


def _sum_probs(rows: Float[Tensor, "n Q"], columns: Float[Tensor, "K Q"]) -> Float[Tensor, " K"]:
    return torch.softmax((rows @ columns.to(rows.dtype).T).float(), dim=1).sum(0)
