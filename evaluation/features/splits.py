"""The two splits of an evaluation: the same classes, no common image."""

from __future__ import annotations

from collections.abc import Sequence

from data.datasets import Manifest, load_manifest, require_same_classes
from data.shards import Shard
from evaluation.config import EvaluationDataConfig


class SplitError(ValueError):
    """Splits on which no encoder can be measured; the message is one line."""


def load_splits(config: EvaluationDataConfig, test_key: str = "data.test_split") -> tuple[Manifest, Manifest]:
    """Returns the manifests of the training and of the test split; `test_key`: the option that names the latter.

    Raises:
        ValueError: no such split, no class names, class maps that differ (which would score noise), or images that
            are in both (which would score memory).
    """
    if config.shards is None:
        raise SplitError(
            "data.shards is null; expected a folder of shards, or one of images in data.images; set one"
        )
    train = load_manifest(config.shards, config.train_split, "data.train_split")
    test_folder_key = "data.test_shards" if config.test_shards else "data.shards"
    test = load_manifest(
        config.test_shards or config.shards, config.test_split, test_key, folder_key=test_folder_key
    )
    for manifest, folder_key in ((train, "data.shards"), (test, test_folder_key)):
        if not manifest.classes:
            raise SplitError(
                f"{manifest.directory} has no class names for split {manifest.split!r}; expected labelled shards; "
                f"make them with labels or set {folder_key}"
            )
    require_same_classes(train, test)
    shared = _count_shared(train, test)
    if shared:
        raise SplitError(
            f"{shared} of {test.num_samples} images of {test.directory}:{test.split} are training images too "
            f"({train.directory}:{train.split}); expected splits without a common image; set {test_key}"
        )
    return train, test


def _count_shared(train: Manifest, test: Manifest) -> int:
    """Returns how many images of the test split lie in the same place of the same tar as a training image."""
    seen: dict[str, set[int]] = {}
    for shard in train.shards:
        seen.setdefault(shard.sha256, set()).update(_selected(shard))
    return sum(
        len(seen[shard.sha256].intersection(_selected(shard)))
        for shard in test.shards
        if shard.sha256 in seen
    )


def _selected(shard: Shard) -> Sequence[int]:
    return range(shard.samples) if shard.ordinals is None else shard.ordinals
