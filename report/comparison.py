"""Encoders beside each other: accuracies with intervals, and paired differences on the same test images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.confidence import Interval, bootstrap
from evaluation.results import read_predictions
from report.runs import Run
from report.tables import Row

# The prediction that stands for a probe is the first that it saved besides the labels.
_RESAMPLES, _LEVEL, _SEED = 1000, 0.95, 0
_LONGEST_VALUE = 60


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
    """Returns, for every probe with predictions, each other run minus the first one on the same images, in points.

    Where the two were not measured alike, the row says why there is no difference.
    """
    if len(runs) < 2:
        return []
    rows = []
    first, *others = runs
    for result in first.results:
        if "predictions" not in result["figures"].get("headline", {}):
            continue
        for other in others:
            theirs = other.result(result["probe"])
            if theirs is not None:
                names = {"probe": result["probe"], "difference": f"{other.name} minus {first.name}"}
                rows.append({**names, **_difference_cells(result, theirs)})
    return rows


def _difference_cells(first: dict[str, Any], second: dict[str, Any]) -> Row:
    reason = why_not_comparable(first, second)
    if reason:
        return {"points": "none", "interval": f"not compared: {reason}"}
    difference = paired_difference(first, second)
    if difference is None:
        return {
            "points": "none",
            "interval": "not compared: predictions are missing or damaged; evaluate again",
        }
    return {
        "points": f"{100 * difference.value:+.2f}",
        "interval": f"{100 * difference.low:+.2f} to {100 * difference.high:+.2f}",
    }


def why_not_comparable(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Returns in what two results of one probe were not measured alike; empty where their figures may be subtracted.

    The same images (manifests and limits), the same protocol (options of the probe, precision, k), and for two
    checkpoints of runs the same step. The features that a probe reads are part of its protocol, except beside a
    control, which is compared feature by feature, and in k-NN, whose figure is the first feature's.
    """
    ours, theirs = _conditions(first), _conditions(second)
    if "control" in (first["encoder"]["role"], second["encoder"]["role"]):
        ours.pop("features", None), theirs.pop("features", None)
    if None in (first["encoder"].get("step"), second["encoder"].get("step")):
        ours.pop("step"), theirs.pop("step")
    different = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    return "; ".join(f"{name} {_short(ours.get(name))} and {_short(theirs.get(name))}" for name in different)


def _conditions(result: dict[str, Any]) -> dict[str, Any]:
    """Returns by name what two results must share."""
    provenance, figures = result["provenance"], result["figures"]
    config = provenance.get("config", {})
    data = config.get("data", {})
    options = dict(config.get(result["probe"], {}))
    if result["probe"] == "long_tail":
        options |= {"of": dict(config.get(options.get("classifier", ""), {}))}
    features = options.pop("features", options.pop("feature", None))
    if result["probe"] == "knn":
        features = figures.get("headline", {}).get("feature")
        options["k"] = figures.get("headline", {}).get("k")
    return {
        "images (manifests of train and test)": list(provenance["manifest_hashes"].values()),
        "max_train_images": data.get("max_train_images"),
        "max_test_images": data.get("max_test_images"),
        "precision": config.get("features", {}).get("precision"),
        "features": features,
        **{f"{result['probe']}.{key}": value for key, value in options.items()},
        "step": result["encoder"].get("step"),
    }


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def paired_difference(first: dict[str, Any], second: dict[str, Any]) -> Interval | None:
    """Returns accuracy of `second` minus `first` with its paired bootstrap interval.

    None where one has no predictions, or they are of different test images.
    """
    return mean_difference([(first, second)])


def mean_difference(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> Interval | None:
    """Returns the second results' accuracies minus the first ones', averaged over pairs such as seeds.

    Its interval is over the test images, which all share, and holds nothing of how pairs vary. None where
    `paired_difference` is None for one of them, or there is none.
    """
    differences = []
    for first, second in pairs:
        ours, theirs = correctness(first), correctness(second)
        if ours is None or theirs is None or len(ours) != len(theirs) or why_not_comparable(first, second):
            return None
        differences.append(theirs.astype(float) - ours)
    if not differences or len({len(difference) for difference in differences}) > 1:
        return None
    return bootstrap(np.mean(differences, axis=0), resamples=_RESAMPLES, level=_LEVEL, seed=_SEED)


def correctness(result: dict[str, Any]) -> np.ndarray | None:
    """Returns whether each test image was classified rightly by the probe's headline, or None without predictions."""
    predictions = read_predictions(result)
    name = result["figures"].get("headline", {}).get("predictions")
    if name not in predictions:
        return None
    return (predictions[name] == predictions["labels"]).numpy()
