"""Encoders beside each other: accuracies with intervals, and paired differences on the same test images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.confidence import Interval, bootstrap
from evaluation.results import read_predictions
from evaluation.tables import Row

if TYPE_CHECKING:
    from evaluation.report import Run

# The prediction that stands for a probe is the first that it saved besides the labels.
_RESAMPLES, _LEVEL, _SEED = 1000, 0.95, 0


def accuracy_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns one row for each probe and encoder (controls too): `probe`, `encoder`, `value`, `low`, `high`.

    Rows of one probe stand together, so that encoders are read side by side.
    """
    rows = []
    for run in runs:
        for result in [*run.results, *run.controls]:
            right = correctness(result)
            if right is None:
                continue
            name = run.name if result in run.results else f"{run.name}: {result['encoder']['label']}"
            interval = bootstrap(right, resamples=_RESAMPLES, level=_LEVEL, seed=_SEED)
            rows.append({"probe": result["probe"], "encoder": name, **interval.__dict__})
    order = list(dict.fromkeys(row["probe"] for row in rows))
    return sorted(rows, key=lambda row: order.index(row["probe"]))


def difference_rows(runs: Sequence[Run]) -> list[Row]:
    """Returns, for every probe, each other run minus the first one on the same images, in points."""
    if len(runs) < 2:
        return []
    rows = []
    first, *others = runs
    for result in first.results:
        for other in others:
            theirs = other.result(result["probe"])
            difference = paired_difference(result, theirs) if theirs else None
            if difference is None:
                continue
            rows.append(
                {
                    "probe": result["probe"],
                    "difference": f"{other.name} minus {first.name}",
                    "points": f"{100 * difference.value:+.2f}",
                    "interval": f"{100 * difference.low:+.2f} to {100 * difference.high:+.2f}",
                }
            )
    return rows


def paired_difference(first: dict[str, Any], second: dict[str, Any]) -> Interval | None:
    """Returns accuracy of `second` minus `first` with its paired bootstrap interval.

    None where one has no predictions, or they are of different test images.
    """
    ours, theirs = correctness(first), correctness(second)
    same_data = _test_hash(first) == _test_hash(second)
    if ours is None or theirs is None or len(ours) != len(theirs) or not same_data:
        return None
    return bootstrap(theirs.astype(float) - ours, resamples=_RESAMPLES, level=_LEVEL, seed=_SEED)


def correctness(result: dict[str, Any]) -> np.ndarray | None:
    """Returns whether each test image was classified rightly by the probe's headline, or None without predictions."""
    predictions = read_predictions(result)
    name = result["figures"].get("headline", {}).get("predictions")
    if name not in predictions:
        return None
    return (predictions[name] == predictions["labels"]).numpy()


def _test_hash(result: dict[str, Any]) -> str:
    return str(list(result["provenance"]["manifest_hashes"].values())[-1:])
