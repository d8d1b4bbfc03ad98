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
from .assignments import find_winners

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

LARGEST = 128
"""Components kept of a row where their number must be known beforehand, as on a GPU."""
_LARGEST_ON_CPU = 1024
_LARGEST_SHARE = 8
"""Of K components a CPU keeps at most the eighth part: with more entries the product of all is as fast."""
_BLOCK = 128
_AT_ONCE = 2**18
"""Logits that are worked on together: 1 MiB, which stays in a core's cache from pass to pass."""
_SOFT_SHARE = 0.5
_FEWEST_BLOCKS = 16
"""Rows are soft where more than this share of at least so many blocks of components come near their maximum."""
_BYTES_IN_WORD = 8
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
        component: [N, m] numbers of components, as in `TopLogits`; None where m = K and they stand in order.
        gamma: [N, m] responsibilities after renormalisation, 0 in places not filled.
        dropped: [N] share of the responsibility that was left out, before renormalisation.
        winner: [N] component with the largest responsibility of the row.
        has_winner: [N] whether it lies in this range of components; False everywhere else.
        log_normaliser: [N] logsumexp_k t_ik over all components.
    """

    component: Tensor | None
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
    near = (best >= row_max[:, None] - _reach(blocks, log_threshold)).flatten().nonzero().squeeze(1)
    total = torch.zeros_like(row_max)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    num_blocks, size = blocks.shape[1:]
    for part in near.split(_AT_ONCE // size):
        row = part // num_blocks
        shifted = blocks.flatten(0, 1).index_select(0, part).sub_(row_max[row, None])
        place = _find_true(shifted >= log_threshold)
        block = part[place // size]
        found.append(
            (block // num_blocks, block % num_blocks * size + place % size, shifted.flatten()[place])
        )
        total.index_add_(0, row, shifted.clamp_min_(_LOG_NOTHING).exp_().sum(1))
    row, component, shifted = (torch.cat(parts) for parts in zip(*found, strict=True))
    index, logit = _arrange(row, component, shifted, len(blocks), largest)
    return TopLogits(index, logit, total.log(), row_max)


def _reach(blocks: Float[Tensor, "N C B"], log_threshold: float) -> float:
    """Returns how far below the row's maximum logits count: by themselves, or in the normaliser."""
    return max(-log_threshold, math.log(blocks.shape[1] * blocks.shape[2]) + _LOG_PRECISION)


def is_soft(blocks: Float[Tensor, "N C B"], threshold: float) -> bool:
    """Returns whether rows have responsibilities nearly everywhere: lists would cost more than `keep_whole_`."""
    if len(blocks) == 0 or blocks.shape[1] < _FEWEST_BLOCKS:
        return False
    best = blocks.amax(2)
    near = best >= best.amax(1, keepdim=True) - _reach(blocks, math.log(threshold))
    return float(near.float().mean()) > _SOFT_SHARE


def _find_true(mask: Bool[Tensor, "n B"]) -> Int64[Tensor, " m"]:
    """Returns the flat places of what is true, ascending: `nonzero` on eight at a time, of which few hold any."""
    if mask.shape[1] % _BYTES_IN_WORD:
        return mask.flatten().nonzero().squeeze(1)
    words = mask.view(torch.int64).flatten().nonzero().squeeze(1)
    inside = mask.view(-1, _BYTES_IN_WORD)[words].flatten().nonzero().squeeze(1)
    return words[inside // _BYTES_IN_WORD] * _BYTES_IN_WORD + inside % _BYTES_IN_WORD


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
    if width > largest:
        wide = (number > largest).nonzero().squeeze(1)
        chosen, kept = logit[wide].topk(largest, dim=1)
        logit[wide, :largest], index[wide, :largest] = chosen, index[wide].gather(1, kept)
        index, logit = index[:, :largest], logit[:, :largest]
    return index, logit


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


def keep_whole_(logits: Float[Tensor, "N K"], threshold: float) -> SparseResponsibilities:
    """As `keep_largest` of all logits t_ik, which become the responsibilities in their place: no list is made.

    However many are above the threshold, all are kept. A few rows at a time: passes over them stay in the cache.
    """
    winner = torch.zeros(len(logits), dtype=torch.int64)
    dropped, log_normaliser = logits.new_zeros(len(logits)), logits.new_zeros(len(logits))
    size = max(1, _AT_ONCE // logits.shape[1])
    for first in range(0, len(logits), size):
        chosen = slice(first, first + size)
        gamma = logits[chosen]
        largest, winner[chosen] = find_winners(gamma)
        total = gamma.sub_(largest[:, None]).clamp_min_(_LOG_NOTHING).exp_().sum(1)
        log_normaliser[chosen] = largest + total.log()
        torch.threshold_(gamma.div_(total[:, None]), threshold, 0.0)
        kept = gamma.sum(1)
        dropped[chosen] = (1 - kept).clamp_min_(0.0)
        gamma.div_(kept.clamp_min(torch.finfo(kept.dtype).tiny)[:, None])
    has_winner = torch.ones_like(winner, dtype=torch.bool)
    return SparseResponsibilities(None, logits, dropped, winner, has_winner, log_normaliser)


def _row_sum(values: Tensor, across: Collectives | None) -> Tensor:
    total = values.sum(dim=1, keepdim=True)
    return total if across is None else across.start_sum(total).wait()
