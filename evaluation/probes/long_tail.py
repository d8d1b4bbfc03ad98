"""Accuracy by how often a class was seen in training: head, medium, tail, and every class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from evaluation.confidence import bootstrap_statistic

if TYPE_CHECKING:
    from jaxtyping import Int64

GROUPS = ("head", "medium", "tail")


@dataclass(frozen=True)
class LongTailRule:
    """When a class is head, medium or tail.

    Attributes:
        few_at_most: a class of at most so many training images is tail.
        many_above: a class of more training images than this is head. 20 and 100: the rule of Liu et al. 2019.
    """

    few_at_most: int = 20
    many_above: int = 100

    def group(self, count: int) -> str:
        """Returns the group of a class with `count` training images."""
        if count > self.many_above:
            return "head"
        return "tail" if count <= self.few_at_most else "medium"


def report_long_tail(
    predictions: Int64[Tensor, " B"],
    labels: Int64[Tensor, " B"],
    train_counts: Int64[Tensor, " C"],
    classes: tuple[str, ...],
    *,
    rule: LongTailRule,
    resamples: int,
    level: float,
    seed: int,
) -> dict[str, Any]:
    """Returns top-1 overall and by group, balanced accuracy and the tail - head gap, each with an interval.

    A group's accuracy is over the test images of its classes; balanced accuracy is the mean over classes that
    have test images. Intervals are percentile bootstrap over test images.

    Args:
        predictions: predicted classes of the test images.
        labels: their classes.
        train_counts: training images of each class.
        classes: names.
        rule: thresholds.
        resamples: bootstrap resamples.
        level: of the intervals.
        seed: of the resampling.
    """
    right = (predictions == labels).numpy()
    truth = labels.numpy()
    group_of_class = np.array([rule.group(int(count)) for count in train_counts])
    group_of_image = group_of_class[truth]
    options = {"resamples": resamples, "level": level, "seed": seed}
    groups: dict[str, Any] = {}
    for name in ("overall", *GROUPS):
        member = np.ones(len(truth), dtype=bool) if name == "overall" else group_of_image == name
        classes_in = len(classes) if name == "overall" else int((group_of_class == name).sum())
        groups[name] = {"classes": classes_in, "images": int(member.sum()), **_share(right, member, options)}
    return {
        "groups": groups,
        "balanced_accuracy": _balanced(right, truth, len(classes), options),
        "tail_minus_head": _gap(right, group_of_image == "tail", group_of_image == "head", options),
        "rule": {"few_at_most": rule.few_at_most, "many_above": rule.many_above},
        "per_class": _per_class(right, truth, train_counts, classes, group_of_class),
    }


def imbalanced_subset(
    labels: Int64[Tensor, " B"], num_classes: int, ratio: float, seed: int
) -> Int64[Tensor, " N"]:
    """Returns indices of a training split thinned to an exponential profile (Cui et al. 2019).

    Class c keeps n_max * ratio^(-c / (C - 1)) images, rounded, at least 1; n_max is the size of the smallest class that
    has images. A class without images keeps none and shortens no other.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = torch.bincount(labels, minlength=num_classes)
    largest = int(counts[counts > 0].min())
    kept: list[Tensor] = []
    for label in range(num_classes):
        members = (labels == label).nonzero()[:, 0]
        count = max(1, round(largest * ratio ** (-label / max(num_classes - 1, 1))))
        kept.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(kept).sort().values


def _share(right: np.ndarray, member: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    if not member.any():
        return {"top1": None, "interval": [None, None]}

    def statistic(index: np.ndarray) -> np.ndarray:
        chosen = member[index]
        return _ratio((right[index] & chosen).sum(axis=1), chosen.sum(axis=1))

    value = float(right[member].mean())
    return {"top1": value, "interval": bootstrap_statistic(statistic, len(right), value, **options).as_list()}


def _gap(right: np.ndarray, tail: np.ndarray, head: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    if not tail.any() or not head.any():
        return {"value": None, "interval": [None, None]}

    def statistic(index: np.ndarray) -> np.ndarray:
        correct, in_tail, in_head = right[index], tail[index], head[index]
        return _ratio((correct & in_tail).sum(1), in_tail.sum(1)) - _ratio(
            (correct & in_head).sum(1), in_head.sum(1)
        )

    value = float(right[tail].mean() - right[head].mean())
    return {
        "value": value,
        "interval": bootstrap_statistic(statistic, len(right), value, **options).as_list(),
    }


def _balanced(
    right: np.ndarray, truth: np.ndarray, num_classes: int, options: dict[str, Any]
) -> dict[str, Any]:
    def statistic(index: np.ndarray) -> np.ndarray:
        means = []
        for chosen in index:
            images = np.bincount(truth[chosen], minlength=num_classes)
            hits = np.bincount(truth[chosen], weights=right[chosen], minlength=num_classes)
            means.append((hits[images > 0] / images[images > 0]).mean())
        return np.array(means)

    value = float(statistic(np.arange(len(truth))[None])[0])
    return {
        "value": value,
        "interval": bootstrap_statistic(statistic, len(right), value, **options).as_list(),
    }


def _per_class(
    right: np.ndarray, truth: np.ndarray, counts: Tensor, classes: tuple[str, ...], groups: np.ndarray
) -> list[dict[str, Any]]:
    images = np.bincount(truth, minlength=len(classes))
    hits = np.bincount(truth, weights=right, minlength=len(classes))
    return [
        {
            "class": name,
            "group": str(groups[index]),
            "train_images": int(counts[index]),
            "test_images": int(images[index]),
            "top1": float(hits[index] / images[index]) if images[index] else None,
        }
        for index, name in enumerate(classes)
    ]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    # A resample without an image of the group says nothing about it: nan, which the quantiles leave out.
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)
