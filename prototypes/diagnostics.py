"""What the prototypes are worth beside the loss: uniqueness, usage, spread of the features.

Uniqueness alone is no evidence of a working mixture: random unit vectors are unique. Read it beside usage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from prototypes.statistics import full_precision

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64
    from torch import Tensor

UNIQUE_THRESHOLDS = (0.025, 0.05, 0.1, 0.25, 0.5)
_BLOCK_ROWS = 1024
_LEADERS_PER_CHUNK = 8192
_BORDER = 1e-5


@torch.no_grad()
def count_unique(
    prototypes: Float[Tensor, "K P"], thresholds: Sequence[float] = UNIQUE_THRESHOLDS
) -> dict[float, int]:
    """Returns the number of unique prototypes at each threshold eps.

    The greedy leader cover of Definition 2.1 (Govindarajan et al. 2024; Arteaga et al. 2026): scan k = 0 ..
    K - 1; c_k becomes a representative iff no earlier representative r has 1 - c_k . r < eps; the number of
    representatives is returned. Deterministic; a permutation of the rows may change it. Pairs within 1e-5 of
    the threshold are decided in fp64. Not collective.

    Args:
        prototypes: any length but zero.
        thresholds: cosine distances eps.

    Raises:
        ValueError: a row is zero or not finite.
    """
    norms = torch.linalg.vector_norm(prototypes.float(), dim=1)
    bad = ~(norms.isfinite() & (norms > 0))
    if bool(bad.any()):
        raise ValueError(
            f"prototype {int(bad.nonzero()[0])} is zero or not finite; expected a direction; "
            "inspect the checkpoint"
        )
    leads = find_leaders(prototypes, tuple(thresholds))
    return dict(zip(thresholds, leads.sum(0).tolist(), strict=True))


def greedy_leader_index(
    rows: Float[Tensor, "N P"], eps: float, leaders: Float[Tensor, "M P"] | None = None
) -> Int64[Tensor, " L"]:
    """Returns the indices of the greedy leader cover of `rows`, beside existing `leaders`."""
    return find_leaders(rows, (eps,), leaders)[:, 0].nonzero().squeeze(1)


@torch.no_grad()
def find_leaders(
    rows: Float[Tensor, "N P"], thresholds: Sequence[float], leaders: Float[Tensor, "M P"] | None = None
) -> Bool[Tensor, "N E"]:
    """Returns which rows lead their own group, at each threshold, in one pass; see `count_unique`.

    Blocks of 1,024 rows meet chunks of all rows that lead at some threshold, then a scan runs inside the
    block. All thresholds share the products: N * L * P of them for L leaders, and no [N, N] tensor.

    Args:
        rows: any length but zero, any float dtype.
        thresholds: cosine distances eps.
        leaders: leaders at every threshold that were there before; they count for covering only.
    """
    known = rows[:0] if leaders is None else leaders.to(rows)
    found = _Directions(torch.cat([known, torch.empty_like(rows)]))
    leads = torch.ones(len(found), len(thresholds), dtype=torch.bool, device=rows.device)
    num_found = len(known)
    result = torch.empty(len(rows), len(thresholds), dtype=torch.bool, device=rows.device)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = _Directions(rows[start : start + _BLOCK_ROWS])
        covered = torch.zeros(len(block), len(thresholds), dtype=torch.bool, device=rows.device)
        for first in range(0, num_found, _LEADERS_PER_CHUNK):
            chunk = slice(first, min(first + _LEADERS_PER_CHUNK, num_found))
            _mark_covered_(covered, block, found[chunk], leads[chunk], thresholds)
        is_leader = _scan(block, covered, thresholds)
        new = is_leader.any(1).nonzero().squeeze(1)
        found.put_(num_found, block[new])
        leads[num_found : num_found + len(new)] = is_leader[new]
        num_found += len(new)
        result[start : start + len(block)] = is_leader
    return result


class _Directions:
    """Rows as they came beside their fp32 directions: the one for pairs near the threshold, the other else."""

    def __init__(self, rows: Tensor, unit: Tensor | None = None) -> None:
        self.rows = rows
        self.unit = nn.functional.normalize(rows, dim=1).float() if unit is None else unit

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice) -> _Directions:
        return _Directions(self.rows[index], self.unit[index])

    def put_(self, start: int, other: _Directions) -> None:
        self.rows[start : start + len(other)] = other.rows
        self.unit[start : start + len(other)] = other.unit


def _mark_covered_(
    covered: Tensor, block: _Directions, leaders: _Directions, leads: Tensor, thresholds: Sequence[float]
) -> None:
    """Sets covered[i, e] where a leader at threshold e lies within eps_e of row i, in place."""
    cosine = _products(block, leaders)
    nearest = cosine.amax(dim=1)
    for column, eps in enumerate(thresholds):
        # Only rows that have some leader near need a closer look: none of a codebook of random directions.
        close = (nearest > 1 - eps - _BORDER).nonzero().squeeze(1)
        if len(close):
            within = _within(cosine[close], block[close], leaders, eps)
            covered[close, column] |= (within & leads[:, column]).any(dim=1)


def _scan(block: _Directions, covered: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Returns which rows of one block lead, given which are covered from outside: in order, row by row."""
    cosine = _products(block, block).fill_diagonal_(-2.0)
    nearest = float(cosine.max())
    result = ~covered
    for column, eps in enumerate(thresholds):
        if nearest < 1 - eps - _BORDER:
            continue
        alive = result[:, column].cpu()
        within = _within(cosine, block, block, eps).cpu()
        # A row without an earlier neighbour is decided already.
        for position in (within & alive).any(dim=1).nonzero().squeeze(1).tolist():
            if alive[position]:
                alive[position + 1 :] &= ~within[position, position + 1 :]
        result[:, column] = alive.to(covered.device)
    return result


def _products(rows: _Directions, leaders: _Directions) -> Tensor:
    with full_precision(rows.unit.device):
        return rows.unit @ leaders.unit.T


def _within(cosine: Tensor, rows: _Directions, leaders: _Directions, eps: float) -> Tensor:
    """Returns 1 - cosine < eps for all pairs; pairs near the threshold are decided in fp64."""
    within = cosine > 1 - eps
    left, right = ((cosine - (1 - eps)).abs() < _BORDER).nonzero(as_tuple=True)
    if len(left):
        exact = nn.functional.cosine_similarity(rows.rows[left].double(), leaders.rows[right].double(), dim=1)
        within[left, right] = 1 - exact < eps
    return within


class UsageCounter:
    """Counts which of all K prototypes is the argmax of the teacher's logits, over an epoch.

    The same code for every mode. `used` is the share of prototypes hit at least once, `dead` = 1 - used,
    `usage_perplexity` = exp(entropy of the hits) / K.
    """

    def __init__(self, num_prototypes: int, device: torch.device | str = "cpu") -> None:
        self.hits = torch.zeros(num_prototypes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, rows: Float[Tensor, "*batch Q"], prototypes: Float[Tensor, "K Q"]) -> None:
        """Adds the argmax of rows . prototypes for every row, a chunk of prototypes at a time.

        Args:
            rows: teacher projections as `logit_operands` gives them.
            prototypes: its second operand.
        """
        rows = rows.flatten(0, -2).float()
        best = rows.new_full((len(rows),), -torch.inf)
        winner = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for start in range(0, len(prototypes), _LEADERS_PER_CHUNK):
            values, index = (rows @ prototypes[start : start + _LEADERS_PER_CHUNK].float().T).max(dim=1)
            winner = torch.where(values > best, index + start, winner)
            best = torch.maximum(values, best)
        self.hits += torch.bincount(winner, minlength=len(self.hits))

    def reset(self) -> None:
        """Starts a new epoch."""
        self.hits.zero_()

    def metrics(self) -> dict[str, float]:
        """Returns `prototypes/{used,dead,usage_perplexity}`; sum `hits` over ranks first."""
        share = self.hits.double() / self.hits.sum().clamp_min(1)
        entropy = -torch.special.xlogy(share, share).sum()
        used = float((self.hits > 0).double().mean())
        return {
            "prototypes/used": used,
            "prototypes/dead": 1.0 - used,
            "prototypes/usage_perplexity": float(entropy.exp()) / len(self.hits),
        }


@torch.no_grad()
def effective_rank(features: Float[Tensor, "N P"]) -> float:
    """Returns exp of the entropy of the normalised singular values of the features (Roy & Vetterli 2007)."""
    values = torch.linalg.svdvals(features.float())
    share = values / values.sum().clamp_min(1e-30)
    return float((-torch.special.xlogy(share, share).sum()).exp())


@torch.no_grad()
def mean_cosine(features: Float[Tensor, "N P"]) -> float:
    """Returns the mean cosine over all pairs of different rows: near 1 when the features have collapsed."""
    unit = nn.functional.normalize(features.float(), dim=1)
    number = len(unit)
    if number < 2:
        return 1.0
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (number * (number - 1)))
