"""The figures of the sets of prototypes for the record: the names of the patches' own set begin with `patch_`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from prototypes.diagnostics import UNIQUE_THRESHOLDS, count_unique, effective_rank, mean_cosine
from prototypes.statistics import Handle
from training.prototype_sets import PrototypeSet, SetOutcome

# Rows of a rank of which features are described: patches are many, and their spread is that of a few thousand.
_MOST_ROWS = 4096


def describe_step(
    one: PrototypeSet, outcome: SetOutcome, gather_rows: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Returns the teacher's features of the step and the estimator's own figures. Collective.

    Args:
        one: the set.
        outcome: what the step did to it.
        gather_rows: all ranks' rows: a rank's share can be fewer than the features have dimensions.
    """
    rows = outcome.projections
    rows = gather_rows(rows[:: -(-len(rows) // _MOST_ROWS)] if len(rows) > _MOST_ROWS else rows)
    values = {
        "features/norm": float(rows.norm(dim=1).mean()),
        "features/effective_rank": float(effective_rank(rows)),
        "features/mean_cosine": float(mean_cosine(rows)),
    }
    return _named(one, values | one.estimator.metrics())


def close_epoch(
    one: PrototypeSet, outcome: SetOutcome, reduce_sum: Callable[[Tensor], Handle]
) -> dict[str, float]:
    """Returns the usage of the epoch that ends here and starts the next count. Collective."""
    reduce_sum(one.usage.counts).wait()
    values = one.usage.metrics(~outcome.vanished)
    one.usage.reset()
    return _named(one, values)


def count_unique_shares(one: PrototypeSet, prototypes: Tensor, *, is_main: bool) -> dict[str, float]:
    """Returns the unique prototypes per threshold as shares of K; rank 0 counts, nobody waits for it.

    Args:
        one: the set.
        prototypes: those of the K that have not vanished.
        is_main: whether this is rank 0.
    """
    counts = count_unique(prototypes) if is_main else dict.fromkeys(UNIQUE_THRESHOLDS, 0)
    num_prototypes = one.estimator.num_prototypes
    return _named(one, {f"prototypes/unique_{t:g}": counts[t] / num_prototypes for t in UNIQUE_THRESHOLDS})


def compare_with_start(one: PrototypeSet, prototypes: Tensor, *, is_main: bool) -> dict[str, float]:
    """Returns how near the prototypes are to where they started: the mean cosine, and the smallest.

    Uniqueness of prototypes that have not moved is that of the start.

    Args:
        one: the set.
        prototypes: all K of the teacher.
        is_main: whether this is rank 0; the others return {}.
    """
    if not is_main:
        return {}
    cosines = one.estimator.cosines_to_start(prototypes)
    values = {
        "prototypes/cosine_to_start": float(cosines.mean()),
        "prototypes/cosine_to_start_min": float(cosines.min()),
    }
    return _named(one, values)


def _named(one: PrototypeSet, values: Mapping[str, float]) -> dict[str, float]:
    return {one.prefix + name: value for name, value in values.items()}
