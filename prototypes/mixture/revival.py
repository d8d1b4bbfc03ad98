"""Starved and duplicate components: found, and by choice moved to where they are needed.

Off by default: the paper does not reseed. Every rank moves the same components to the same places: the
choice is a function of the state (equal on all ranks) and of random numbers from (seed, step).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..diagnostics import greedy_leader_index
from ..random_numbers import make_generator
from .config import RevivalConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64
    from torch import Tensor

    from .model import Mixture

_STARVED_SHARE = 0.05
_ROWS_AT_ONCE = 1024


def find_starved(usage: Float[Tensor, " K"]) -> Bool[Tensor, " K"]:
    """Returns which components hold less than 5 % of an even share of the responsibility."""
    return usage * len(usage) < _STARVED_SHARE


def find_duplicates(
    means: Float[Tensor, "K P"], usage: Float[Tensor, " K"], distance: float
) -> Bool[Tensor, " K"]:
    """Returns which means lie within `distance` (cosine) of one in heavier use that is itself no duplicate."""
    heaviest_first = torch.argsort(usage, descending=True, stable=True)
    is_duplicate = torch.ones(len(means), dtype=torch.bool, device=means.device)
    is_duplicate[heaviest_first[greedy_leader_index(means[heaviest_first], distance)]] = False
    return is_duplicate


def revive_(
    mixture: Mixture,
    rows: Float[Tensor, "N P"] | None,
    config: RevivalConfig,
    *,
    seed: int,
    step: int,
) -> int:
    """Moves starved and duplicate components, in place, and returns how many.

    "split": next to the component with the largest pi_j tr(var_j), at mu_j + .5 sqrt(var_j) n, the parent
    moving the other way; the two share the parent's count, mixing weight and usage, and have its variance.
    "reseed": to the rows farthest from every prototype (1 - max cosine > `config.row_distance`), restarting with
    n = 1, an even mixing weight and the rows' variance. At most `config.max_share` of K in one event, the
    emptiest first. Source: ours.

    What no row has room for stays where it is, or, with `config.surplus` "spare", duplicates leave for random
    directions: K prototypes cannot all be used and distinct where the features have fewer than K places
    `duplicate_distance` apart. Spares hold no usage, so they are the first to go where room appears.

    Args:
        mixture: its tables are written.
        rows: candidates for "reseed", the same on all ranks.
        config: method, distance of duplicates, largest share.
        seed: the run's seed.
        step: the current step.
    """
    is_useless = find_starved(mixture.usage)
    is_duplicate = torch.zeros_like(is_useless)
    if config.duplicate_distance > 0:
        is_duplicate = find_duplicates(mixture.means, mixture.usage, config.duplicate_distance)
        is_useless |= is_duplicate
    number = min(int(is_useless.sum()), max(1, int(config.max_share * len(is_useless))))
    if number == 0:
        return 0
    order = torch.argsort(torch.where(is_useless, mixture.usage, torch.inf), stable=True)
    moved = order[:number]
    if config.method == "split":
        return _split_(mixture, moved, is_useless, make_generator("revival", seed, step))
    placed = _reseed_(mixture, moved, rows, config.row_distance)
    if config.surplus == "spare":
        # Rows that took a component are far from every prototype: no new duplicates to look for.
        is_duplicate[placed] = False
        _set_aside_(mixture, is_duplicate.nonzero().squeeze(1), make_generator("revival", seed, step))
    return len(placed)


def _split_(
    mixture: Mixture,
    moved: Int64[Tensor, " R"],
    is_useless: Bool[Tensor, " K"],
    generator: torch.Generator,
) -> int:
    variances = mixture.component_variances()
    score = torch.where(is_useless, -torch.inf, mixture.mixing_weights * variances.sum(1))
    moved = moved[: len(is_useless) - int(is_useless.sum())]
    parents = torch.argsort(score, descending=True, stable=True)[: len(moved)]
    noise = torch.randn(len(moved), mixture.dim, generator=generator).to(mixture.means)
    mixture.split_components_(moved, parents, 0.5 * variances[parents].sqrt() * noise)
    return len(moved)


def _reseed_(
    mixture: Mixture, moved: Int64[Tensor, " R"], rows: Float[Tensor, "N P"] | None, distance: float
) -> Int64[Tensor, " r"]:
    """Moves components to rows that are far from every prototype and returns which were moved."""
    if rows is None or len(rows) == 0:
        return moved[:0]
    unit = nn.functional.normalize(rows, dim=1)
    nearest = unit.new_full((len(unit),), -1.0)
    for means in mixture.means.split(_ROWS_AT_ONCE):
        nearest = torch.maximum(nearest, (unit @ nn.functional.normalize(means, dim=1).T).amax(1))
    farthest = torch.argsort(nearest, stable=True)
    farthest = farthest[1 - nearest[farthest] > distance]
    # Rows that are near each other would only make new duplicates.
    farthest = farthest[greedy_leader_index(unit[farthest], distance)][: len(moved)]
    moved = moved[: len(farthest)]
    mixture.means[moved] = rows[farthest]
    mixture.restart_components_(moved)
    return moved


def _set_aside_(mixture: Mixture, spare: Int64[Tensor, " S"], generator: torch.Generator) -> None:
    """Moves components to random directions, and takes their usage away."""
    directions = torch.randn(len(spare), mixture.dim, generator=generator)
    mixture.means[spare] = nn.functional.normalize(directions, dim=1).to(mixture.means)
    mixture.restart_components_(spare)
    mixture.usage[spare] = 0.0
    mixture.usage /= mixture.usage.sum()
