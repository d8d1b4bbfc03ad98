"""What the prototypes are worth beside the loss: uniqueness, usage, spread of the features.

Uniqueness alone is no evidence of a working mixture: random unit vectors are unique. Read it beside usage. No figure
ends a run: a row that points nowhere (zero, or not finite) is no unit row and counts as none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from .statistics import full_precision

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64
    from torch import Tensor

    from .estimator import Assignment

UNIQUE_THRESHOLDS = (0.025, 0.05, 0.1, 0.25, 0.5)
_BLOCK_ROWS = 1024
_LEADERS_PER_CHUNK = 8192
_BORDER = 1e-5
_SHORTEST_DIRECTION = 1e-12
"""Length that `normalize` divides by at least: a shorter row does not become a unit row."""


def find_directions(rows: Float[Tensor, "N P"]) -> Bool[Tensor, " N"]:
    """Returns which rows have a direction: a finite length of at least 1e-12 in fp32."""
    norms = torch.linalg.vector_norm(rows.float(), dim=1)
    return norms.isfinite() & (norms >= _SHORTEST_DIRECTION)


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
        prototypes: any length; a row without a direction (`find_directions`) is never unique.
        thresholds: cosine distances eps.
    """
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
        rows: any length, any float dtype; a row without a direction leads nowhere.
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
        covered = ~find_directions(block.rows)[:, None].expand(-1, len(thresholds))
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
    """Counts which of all K prototypes are used over an epoch; this rank's part of it.

    Two answers: which component wins a row in the mixture's E-step, and which is the argmax of the logits that the
    encoder's loss sees. A mixture is used where its E-step uses it; learned prototypes have no E-step, their use is
    that of the logits.

    Attributes:
        counts: [3, K] fp64, rows won by logits, rows won in the E-step, mass in the E-step; sum it over ranks.
    """

    def __init__(self, num_prototypes: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(3, num_prototypes, dtype=torch.float64, device=device)
        self.by_logits, self.by_assignment, self.mass = self.counts.unbind()
        self._has_assignments = False

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
        self.by_logits.scatter_add_(0, winner, torch.ones_like(winner, dtype=torch.float64))

    def add_assignment(self, assignment: Assignment) -> None:
        """Adds one step's E-step."""
        self._has_assignments = True
        self.by_assignment += assignment.hits
        self.mass += assignment.mass

    def reset(self) -> None:
        """Starts a new epoch."""
        self.counts.zero_()

    def metrics(self, is_alive: Bool[Tensor, " K"] | None = None) -> dict[str, float]:
        """Returns `prototypes/...` of the epoch; sum `counts` over ranks first.

        `used` is the share of the K prototypes that won at least one row in the E-step (by the logits where there is
        none), `dead` = 1 - used, `usage_perplexity` = exp(entropy of the rows won) / K; `used_by_mass` the share with
        a mass of at least 1, `used_by_logits` that of the logits' argmax. `usage_rows` says over how many rows, and
        `used_ceiling` = min(K, rows) / K what share they could have reached. A mixture that has not begun has had no
        E-step and is neither used nor dead: `used_by_logits` alone.

        Args:
            is_alive: which prototypes point anywhere; the others are dead, whatever they won. None: all.
        """
        won = self.by_assignment if self._has_assignments else self.by_logits
        is_alive = torch.ones_like(won, dtype=torch.bool) if is_alive is None else is_alive.to(won.device)
        number = float(won.sum())
        share = won / max(number, 1.0)
        entropy = -torch.special.xlogy(share, share).sum()

        def part(used: Tensor) -> float:
            return float((used & is_alive).double().mean())

        by_logits = {"prototypes/used_by_logits": part(self.by_logits > 0)}
        if self._has_assignments and not number:
            return by_logits
        by_mass = {"prototypes/used_by_mass": part(self.mass >= 1)} if self._has_assignments else {}
        return {
            "prototypes/used": part(won > 0),
            "prototypes/dead": 1.0 - part(won > 0),
            **by_mass,
            **by_logits,
            "prototypes/usage_perplexity": float(entropy.exp()) / len(won),
            "prototypes/usage_rows": number,
            "prototypes/used_ceiling": min(1.0, number / len(won)),
        }


@torch.no_grad()
def effective_rank(features: Float[Tensor, "N P"]) -> float:
    """Returns exp of the entropy of the normalised singular values of the features (Roy & Vetterli 2007).

    Of the rows of finite length; NaN where there is none.
    """
    features = features.float()
    features = features[torch.linalg.vector_norm(features, dim=1).isfinite()]
    if len(features) == 0:
        return math.nan
    values = torch.linalg.svdvals(features)
    share = values / values.sum().clamp_min(1e-30)
    return float((-torch.special.xlogy(share, share).sum()).exp())


@torch.no_grad()
def mean_cosine(features: Float[Tensor, "N P"]) -> float:
    """Returns the mean cosine over all pairs of different rows: near 1 when the features have collapsed.

    Of the rows with a direction; 1 where there are no two.
    """
    unit = nn.functional.normalize(features[find_directions(features)].float(), dim=1)
    number = len(unit)
    if number < 2:
        return 1.0
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (number * (number - 1)))
