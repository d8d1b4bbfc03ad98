"""How the means start: random directions, or the first features that come by."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..diagnostics import greedy_leader_index
from .config import InitialisationConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Collected(NamedTuple):
    """Progress of a start from features: rows looked at and rows that became means; plain integers."""

    seen: int = 0
    placed: int = 0


def is_standing(config: InitialisationConfig, num_prototypes: int, collected: Collected) -> bool:
    """Returns whether the mixture stands still: a start from features, of which K rows were not yet looked at."""
    return config.method != "sphere" and collected.seen < num_prototypes


def is_collecting(config: InitialisationConfig, step: int, total_steps: int) -> bool:
    """Returns whether the rows of `step` may become means of a mixture that stands still."""
    return step >= config.first_step(total_steps)


def place_rows_(
    means: Float[Tensor, "K P"],
    rows: Float[Tensor, "N P"],
    config: InitialisationConfig,
    collected: Collected,
) -> Collected:
    """Writes rows over the next means, in place, and returns the progress.

    "data" takes the first K rows as they come; "data_spread" looks at K rows and takes those at cosine
    distance >= `spread_distance` from every row taken before; the other means stay random directions. The
    rows are all ranks' in rank order, so every rank places the same.

    Args:
        means: overwritten from `collected.placed` on.
        rows: the step's rows of all ranks.
        config: method and distance.
        collected: progress so far.
    """
    rows = rows[: len(means) - collected.seen]
    num_seen = collected.seen + len(rows)
    if config.method == "data_spread":
        rows = rows[greedy_leader_index(rows, config.spread_distance, means[: collected.placed])]
    means[collected.placed : collected.placed + len(rows)] = rows
    return Collected(num_seen, collected.placed + len(rows))
