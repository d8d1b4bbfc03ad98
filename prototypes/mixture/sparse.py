"""Responsibilities that are not negligible: a few components of every row instead of all K.

Of a row's K responsibilities nearly all are too small to move anything. `TopLogits` is what an E-step returns that
looks for the others alone, here from logits in memory; `keep_largest` makes responsibilities of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..statistics import Collectives

if TYPE_CHECKING:
    from jaxtyping import Float

LARGEST = 128
"""Components kept of a row where their number must be known beforehand, as on a GPU."""
_LARGEST_ON_CPU = 1024
_LARGEST_SHARE = 8
"""Of K components a CPU keeps at most the eighth part: with more entries the product of all is as fast."""
_BLOCK = 128
_BLOCKS_AT_ONCE = 8192
_LOG_NOTHING = -80.0
"""exp of it is lost beside 1, and still no subnormal number, with which a CPU is fifty times slower."""
_LOG_PRECISION = 17.0
"""A sum of exponentials loses nothing in fp32 without terms that are together below exp(-17) of it."""


class TopLogits(NamedTuple):
    """The largest tempered log joint densities t_ik = beta log rho_ik - penalty_k of each row.

    Of one range of components. Taken from the row's maximum: the densities themselves are thousands of nats, of which
    fp32 keeps too few digits.

    Attributes:
        component: [N, m] numbers of components from the start of the range, in any order; 0 in places not filled.
        logit: [N, m] their t_ik - max_k t_ik, fp32; 0 for the largest, -inf in places not filled.
        log_normaliser: [N] logsumexp_k (t_ik - max_k t_ik) over the whole range, what was left out included.
        maximum: [N] max_k t_ik.
    """

    component: Tensor
    logit: Tensor
    log_normaliser: Tensor
    maximum: Tensor


class SparseResponsibilities(NamedTuple):
    """Responsibilities of the components kept, which sum to one in every row.

    Attributes:
        component: [N, m] numbers of components, as in `TopLogits`.
        gamma: [N, m] responsibilities after renormalisation, 0 in places not filled.
        dropped: [N] share of the responsibility that was left out, before renormalisation.
        winner: [N] component with the largest responsibility of the row.
        has_winner: [N] whether it lies in this range of components; False everywhere else.
        log_normaliser: [N] logsumexp_k t_ik over all components.
    """

    component: Tensor
    gamma: Tensor
    dropped: Tensor
    winner: Tensor
    has_winner: Tensor
    log_normaliser: Tensor


def may_wait(device: torch.device) -> bool:
    """Returns whether a program may read on the way what it has just computed: where that takes no time, on a CPU.

    On a GPU sizes are fixed beforehand and scalars are read with those of the next step. Tests run that program on
    a CPU too.
    """
    return device.type == "cpu"


def count_places(num_components: int, device: torch.device) -> int:
    """Returns how many components of a row are kept at most."""
    if not may_wait(device):
        return min(LARGEST, num_components)
    return min(num_components, max(LARGEST, min(_LARGEST_ON_CPU, num_components // _LARGEST_SHARE)))


def bound_dropped(
    gamma: Float[Tensor, "N K"], threshold: float, largest: int, across: Collectives | None = None
) -> Float[Tensor, " N"]:
    """Returns at most how much of each row's responsibility a sparse step leaves out, from all responsibilities.

    At most `largest` of them exceed 1 / `largest`, as they sum to one; where more than that are above the threshold
    it is what these few leave. Collective where the components are split over ranks.
    """
    is_kept = gamma > threshold
    kept = torch.where(is_kept, gamma, 0.0).sum(1)
    surely = torch.where(gamma > max(threshold, 1 / largest), gamma, 0.0).sum(1)
    kept = torch.where(is_kept.sum(1) > largest, surely, kept)
    kept = kept if across is None else across.start_sum(kept).wait()
    return (1 - kept).clamp_min_(0.0)


def make_logit_blocks(num_rows: int, num_components: int, device: torch.device) -> Float[Tensor, "N C B"]:
    """Returns room for logits [N, K], in blocks of components; the places beyond K hold -inf and stay untouched."""
    size = min(_BLOCK, num_components)
    blocks = torch.empty(num_rows, -(-num_components // size), size, device=device)
    blocks.flatten(1)[:, num_components:] = -torch.inf
    return blocks


def find_top_logits(
    blocks: Float[Tensor, "N C B"], threshold: float, largest: int, fixed: bool | None = None
) -> TopLogits:
    """Returns the logits of each row that may have a responsibility above `threshold`, at most `largest`.

    Args:
        blocks: from `make_logit_blocks`, filled.
        threshold: of the responsibility; 0 keeps the largest, however small.
        largest: most places of a row.
        fixed: always `largest` places and one top-k, so that no size is waited for; None: on a GPU. Otherwise only
            blocks of components whose maximum is near the row's are looked at, and there are as many places as the
            fullest row needs.
    """
    if not may_wait(blocks.device) if fixed is None else fixed:
        logits = blocks.flatten(1)
        logit, index = logits.topk(min(largest, logits.shape[1]), dim=1)
        row_max = logit[:, 0]
        return TopLogits(
            index, logit - row_max[:, None], torch.logsumexp(logits - row_max[:, None], dim=1), row_max
        )
    best = blocks.amax(2)
    row_max = best.amax(1)
    log_threshold = math.log(threshold) if threshold > 0 else -math.inf
    reach = max(-log_threshold, math.log(blocks.shape[1] * blocks.shape[2]) + _LOG_PRECISION)
    near_row, near_block = (best >= row_max[:, None] - reach).nonzero(as_tuple=True)
    total = torch.zeros_like(row_max)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, max(1, len(near_row)), _BLOCKS_AT_ONCE):
        row, block = (part[start : start + _BLOCKS_AT_ONCE] for part in (near_row, near_block))
        shifted = blocks[row, block].sub_(row_max[row, None])
        pair, column = (shifted >= log_threshold).nonzero(as_tuple=True)
        found.append((row[pair], block[pair] * blocks.shape[2] + column, shifted[pair, column]))
        total.index_add_(0, row, shifted.clamp_min_(_LOG_NOTHING).exp_().sum(1))
    row, component, shifted = (torch.cat(parts) for parts in zip(*found, strict=True))
    index, logit = _arrange(row, component, shifted, len(blocks), largest)
    return TopLogits(index, logit, total.log(), row_max)


def _arrange(
    row: Tensor, component: Tensor, value: Tensor, num_rows: int, largest: int
) -> tuple[Tensor, Tensor]:
    """Returns entries that are sorted by row as [N, m]; a row with more than `largest` keeps those."""
    number = torch.bincount(row, minlength=num_rows)
    width = max(1, int(number.max())) if num_rows else 1
    place = torch.arange(len(row)) - (number.cumsum(0) - number)[row]
    index = torch.zeros(num_rows, width, dtype=torch.int64)
    logit = torch.full((num_rows, width), -torch.inf)
    index[row, place], logit[row, place] = component, value
    if width <= largest:
        return index, logit
    logit, kept = logit.topk(largest, dim=1)
    return index.gather(1, kept), logit


def keep_largest(
    top: TopLogits, threshold: float, *, hard: bool = False, across: Collectives | None = None
) -> SparseResponsibilities:
    """Returns the responsibilities above `threshold`, renormalised.

    Args:
        top: of this rank's range of components.
        threshold: responsibilities at or below it are left out.
        hard: the row's maximum has everything; ties share it.
        across: collectives where the components are split over ranks; then collective, waited for.
    """
    place = top.logit.argmax(dim=1)
    logit, log_normaliser = top.logit, top.log_normaliser
    largest, has_winner = top.maximum, torch.ones_like(place, dtype=torch.bool)
    if across is not None:
        parts = across.start_gather(torch.stack([top.maximum, log_normaliser])).wait()
        maxima, normalisers = parts.unbind(1)
        has_winner = maxima.argmax(0) == across.rank
        largest = maxima.amax(0)
        log_normaliser = (normalisers + (maxima - largest)).logsumexp(0)
        logit = logit + (top.maximum - largest)[:, None]
    if hard:
        gamma = (logit == 0).to(logit.dtype)
        gamma /= _row_sum(gamma, across)
    else:
        gamma = (logit - log_normaliser[:, None]).exp_()
    gamma = torch.where(gamma > threshold, gamma, 0.0)
    kept = _row_sum(gamma, across)
    winner = top.component.gather(1, place[:, None]).squeeze(1)
    dropped = (1 - kept.squeeze(1)).clamp_min_(0.0)
    gamma /= kept.clamp_min(torch.finfo(kept.dtype).tiny)
    return SparseResponsibilities(top.component, gamma, dropped, winner, has_winner, largest + log_normaliser)


def _row_sum(values: Tensor, across: Collectives | None) -> Tensor:
    total = values.sum(dim=1, keepdim=True)
    return total if across is None else across.start_sum(total).wait()
