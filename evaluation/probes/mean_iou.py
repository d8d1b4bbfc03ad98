"""Intersection over union from counts of pixels per image, so that figures can be resampled over images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data.members import VOID_INDEX
from evaluation.confidence import Interval, draw_weights
from evaluation.probes.config import ConfidenceConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, UInt8

# Images whose patches are counted at once.
_CHUNK = 32


@dataclass(frozen=True)
class PixelCounts:
    """Pixels of every image by class; void pixels count nowhere.

    Attributes:
        intersections: of a class where that class was predicted, [B, C].
        unions: of a class, or where it was predicted, [B, C].
    """

    intersections: Int64[np.ndarray, "B C"]
    unions: Int64[np.ndarray, "B C"]

    def iou(self) -> Float[np.ndarray, " C"]:
        """Returns the intersection over union of every class over all images; NaN for one that does not occur."""
        return _ratio(self.intersections.sum(axis=0), self.unions.sum(axis=0))

    def mean_iou(self) -> float:
        """Returns the mean over the classes that occur in labels or predictions (as scikit-learn's macro Jaccard)."""
        return float(np.nanmean(self.iou()))

    def intervals(self, *, resamples: int, level: float, seed: int) -> tuple[Interval, list[Interval]]:
        """Returns the mean and every class with percentile bootstrap intervals over images."""
        drawn = self._resampled(draw_weights(len(self.unions), resamples=resamples, seed=seed))
        tails = [(1 - level) / 2, (1 + level) / 2]
        # A class that no resample holds has no interval, and no mean counts it.
        absent = np.isnan(drawn).all(axis=0)
        low, high = np.nanquantile(np.where(absent, -1.0, drawn), tails, axis=0)
        ends = np.nanquantile(np.nanmean(drawn, axis=1), tails)
        classes = zip(self.iou().tolist(), low.tolist(), high.tolist(), absent, strict=True)
        nan = float("nan")
        by_class = [Interval(value, nan if gone else a, nan if gone else b) for value, a, b, gone in classes]
        return Interval(self.mean_iou(), float(ends[0]), float(ends[1])), by_class

    def resampled_means(self, weights: Float[np.ndarray, "R B"]) -> Float[np.ndarray, " R"]:
        """Returns the mean IoU of every resample of `draw_weights`."""
        return np.nanmean(self._resampled(weights), axis=1)

    def _resampled(self, weights: Any) -> Any:
        return _ratio(weights @ self.intersections, weights @ self.unions)


def describe_counts(
    counts: Mapping[str, PixelCounts],
    classes: Sequence[str],
    pixels: Sequence[int],
    *,
    confidence: ConfidenceConfig,
    seed: int,
) -> dict[str, Any]:
    """Returns `classifiers` and `per_class` of a result: IoU in 0..1 with intervals; None for a class that is nowhere.

    Args:
        counts: of every classifier by name.
        classes: names in index order.
        pixels: of every class in the test split.
        confidence: of the intervals.
        seed: of the resampling.
    """
    classifiers: dict[str, Any] = {}
    rows: list[dict[str, Any]] = [
        {"class": name, "test_pixels": number} for name, number in zip(classes, pixels, strict=True)
    ]
    for name, found in counts.items():
        mean, by_class = found.intervals(resamples=confidence.resamples, level=confidence.level, seed=seed)
        classifiers[name] = {"miou": mean.value, "interval": mean.as_list()}
        for row, own in zip(rows, by_class, strict=True):
            row[f"{name}_iou"] = None if np.isnan(own.value) else own.value
            row[f"{name}_interval"] = None if np.isnan(own.value) else own.as_list()
    return {"classifiers": classifiers, "per_class": rows}


def _ratio(part: Any, whole: Any) -> Any:
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def patch_histograms(
    label_maps: UInt8[Tensor, "B H W"], grid: tuple[int, int], num_classes: int
) -> Int64[Tensor, "B N C+1"]:
    """Returns how many pixels of each class every patch holds, void last; int32, patches in row order.

    Args:
        label_maps: class indices and `VOID_INDEX`.
        grid: rows and columns of patches; they divide H and W.
        num_classes: C.
    """
    rows, columns = grid
    height, width = label_maps.shape[1] // rows, label_maps.shape[2] // columns
    found = []
    for maps in label_maps.split(_CHUNK):
        cells = (
            maps.view(-1, rows, height, columns, width).transpose(2, 3).reshape(len(maps), rows * columns, -1)
        )
        indices = torch.where(cells == VOID_INDEX, num_classes, cells.long())
        counts = torch.zeros(len(maps), rows * columns, num_classes + 1, dtype=torch.int32)
        found.append(counts.scatter_add_(2, indices, torch.ones_like(indices, dtype=torch.int32)))
    return torch.cat(found)


def count_patches(histograms: Int64[Tensor, "B N C+1"], predictions: Int64[Tensor, "B N"]) -> PixelCounts:
    """Returns the counts of predictions that hold for all pixels of a patch: the patch map upsampled to pixels.

    Args:
        histograms: from `patch_histograms`.
        predictions: a class for every patch.
    """
    pixels = histograms[..., :-1].long()
    chosen = predictions.long()[..., None]
    intersections = torch.zeros(len(pixels), pixels.shape[2], dtype=torch.int64)
    intersections.scatter_add_(1, predictions.long(), pixels.gather(2, chosen)[..., 0])
    predicted = torch.zeros_like(intersections).scatter_add_(1, predictions.long(), pixels.sum(dim=2))
    unions = pixels.sum(dim=1) + predicted - intersections
    return PixelCounts(intersections.numpy(), unions.numpy())


def count_pixels(
    label_map: UInt8[Tensor, "H W"], predictions: Int64[Tensor, "H W"], num_classes: int
) -> tuple[Int64[np.ndarray, " C"], ...]:
    """Returns (intersections, unions, pixels of the label) by class of one image's predicted pixels."""
    kept = label_map != VOID_INDEX
    truth, found = label_map[kept].long(), predictions[kept].long()
    true, predicted, both = (
        torch.bincount(values, minlength=num_classes) for values in (truth, found, truth[truth == found])
    )
    return both.numpy(), (true + predicted - both).numpy(), true.numpy()
