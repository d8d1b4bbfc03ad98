"""Which classes a probe takes for which."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.shards import load_manifest
from evaluation.results import read_predictions
from report.tables import Row

_SHOWN = 12


def count_confusions(result: dict[str, Any]) -> NDArray[np.int64] | None:
    """Returns int [C, C]: test images of true class (row) that the probe's headline classified as (column).

    None where the result has no predictions.
    """
    predictions = read_predictions(result)
    name = result["figures"].get("headline", {}).get("predictions")
    if name not in predictions:
        return None
    truth, found = predictions["labels"].numpy(), predictions[name].numpy()
    num_classes = int(max(truth.max(), found.max())) + 1
    return np.bincount(truth * num_classes + found, minlength=num_classes**2).reshape(num_classes, -1)


def class_names(result: dict[str, Any], num_classes: int) -> list[str]:
    """Returns the classes' names from the manifest of the test split; their numbers where it is gone or shorter."""
    data = result["provenance"]["config"].get("data", {})
    try:
        shards = data.get("test_shards") or data["shards"]
        names = list(load_manifest(shards, data["test_split"]).classes) if shards else []
    except (KeyError, OSError, ValueError):
        names = []
    return names[:num_classes] if len(names) >= num_classes else [str(i) for i in range(num_classes)]


def confusion_rows(result: dict[str, Any]) -> list[Row]:
    """Returns the most frequent confusions, one row each: class, what it is taken for, how often."""
    counts = count_confusions(result)
    if counts is None:
        return []
    names = class_names(result, len(counts))
    wrong = counts * (1 - np.eye(len(counts), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_SHOWN]
    return [
        {
            "class": names[row],
            "taken for": names[column],
            "images": f"{wrong[row, column]} of {counts[row].sum()}",
            "share %": f"{100 * wrong[row, column] / counts[row].sum():.1f}",
        }
        for row, column in zip(*np.unravel_index(order, counts.shape), strict=True)
        if wrong[row, column]
    ]
