"""Class shares of an epoch, and long-tailed sub-samples of a set."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.shards import DataError, Manifest, load_index
from data.stream.plan import CopyCounts
from data.views.random_numbers import hash_array, hash_key

_SUBSAMPLE = 21  # purpose of the random key


class ClassShares(CopyCounts):
    """Shows each class a fixed number of times an epoch, and its images as evenly as that number allows.

    Which images of a class are shown once more than the others is drawn anew every epoch.

    Args:
        labels: class index of every selected sample.
        num_classes: C.
        power: a class of n images gets a share proportional to n ** power: 0 is class-balanced, 0.5 square root,
            1 uniform (Mahajan et al. 2018, "Exploring the limits of weakly supervised pretraining").
    """

    def __init__(self, labels: NDArray[np.int64], num_classes: int, power: float) -> None:
        self.num_samples = len(labels)
        self._labels = labels
        self._images = np.bincount(labels, minlength=num_classes)
        present = self._images > 0
        weights = np.where(present, np.maximum(self._images, 1).astype(np.float64) ** power, 0.0)
        self.quotas = _round_to_sum(weights / weights.sum() * self.num_samples, self.num_samples)

    def draw(self, epoch: int, key: int) -> NDArray[np.int64]:
        """Returns the copies of every sample in an epoch; see `CopyCounts`."""
        order = np.lexsort((hash_array(key, range(self.num_samples)), self._labels))
        starts = np.concatenate([[0], np.cumsum(self._images)])
        place = np.empty(self.num_samples, dtype=np.int64)
        place[order] = np.arange(self.num_samples) - starts[self._labels[order]]
        every, once_more = np.divmod(self.quotas, np.maximum(self._images, 1))
        return every[self._labels] + (place < once_more[self._labels])


def build_copies(manifest: Manifest, sampler: str) -> ClassShares | None:
    """Returns how often an epoch shows each sample under `data.sampler`; None for each once.

    Raises:
        DataError: the sampler needs labels and the shards have none.
    """
    if sampler == "uniform":
        return None
    labels = selected_labels(manifest)
    if labels is None or (labels < 0).any():
        raise DataError(
            f"data.sampler is {sampler}; expected shards with a class for every image and an index; "
            f"{manifest.directory} has none; set data.sampler=uniform, or write the index with "
            "python -m data.verify_shards DIR --write"
        )
    power = {"class_balanced": 0.0, "square_root": 0.5}[sampler]
    return ClassShares(labels, max(len(manifest.classes), int(labels.max()) + 1), power)


def selected_labels(manifest: Manifest) -> NDArray[np.int64] | None:
    """Returns the class index of every selected sample in the manifest's order; None without an index."""
    index = load_index(manifest)
    if index is None:
        return None
    labels = index["label"].astype(np.int64)
    parts = []
    for start, shard in zip(manifest.first_ids, manifest.shards, strict=False):
        ordinals = (
            np.arange(shard.samples) if shard.ordinals is None else np.asarray(shard.ordinals, dtype=np.int64)
        )
        parts.append(labels[start + ordinals])
    return np.concatenate(parts)


def select_long_tail(labels: NDArray[np.int64], imbalance: float, seed: int) -> NDArray[np.bool_]:
    """Returns which samples make up a long-tailed sub-sample: exponentially fewer from class to class.

    The class of rank r (a random order of the classes) keeps n_max * imbalance ** (-r / (C - 1)) images, at least
    one, where n_max is the size of the smallest class that would have to keep all (Cui et al. 2019, "Class-balanced
    loss based on effective number of samples", section 5, with classes in random order).

    Args:
        labels: class index of every sample, none negative.
        imbalance: images of the first class over images of the last.
        seed: of the order of the classes and of the choice within them.
    """
    images = np.bincount(labels)
    classes = np.flatnonzero(images)
    order = classes[np.argsort(hash_array(hash_key(seed, _SUBSAMPLE, 0), classes), kind="stable")]
    decay = imbalance ** (-np.arange(len(order)) / max(1, len(order) - 1))
    largest = (images[order] / decay).min()
    keep = np.zeros(len(images), dtype=np.int64)
    keep[order] = np.maximum(1, np.floor(largest * decay + 1e-9)).astype(np.int64)
    ranking = np.lexsort((hash_array(hash_key(seed, _SUBSAMPLE, 1), range(len(labels))), labels))
    starts = np.concatenate([[0], np.cumsum(images)])
    place = np.empty(len(labels), dtype=np.int64)
    place[ranking] = np.arange(len(labels)) - starts[labels[ranking]]
    return place < keep[labels]


def _round_to_sum(shares: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Returns integers near the shares that sum to the total: the largest remainders are rounded up."""
    rounded = np.floor(shares).astype(np.int64)
    order = np.argsort(-(shares - rounded), kind="stable")
    rounded[order[: total - int(rounded.sum())]] += 1
    return rounded
