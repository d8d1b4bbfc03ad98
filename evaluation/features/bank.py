"""Features and labels of one split, and the names by which probes ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.datasets import Manifest

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


class FeatureError(ValueError):
    """Features that cannot be what a probe needs; the message is one line."""


class NonFiniteFeatureError(FeatureError):
    """A feature holds NaN or infinity: every probe would still give a plausible figure."""


@dataclass(frozen=True)
class FeatureBank:
    """Features and labels of one split, sorted by sample.

    Attributes:
        tensors: on the CPU: `embedding` [B, D]; `cls` [B, blocks, D] and `mean` [B, D] where they exist, fp32. Or
            `patch_tokens` [B, N, D] of the last block, fp16 or fp32.
        labels: class indices [B]; or beside patch tokens label maps uint8 [B, S, S].
        sample_ids: index of each sample in its split.
        manifest: of the split.
        seconds: that extraction took (0 when read from the cache).
    """

    tensors: dict[str, Tensor]
    labels: Tensor
    sample_ids: Int64[Tensor, " B"]
    manifest: Manifest
    seconds: float = 0.0

    @property
    def num_classes(self) -> int:
        """C, the number of classes in the manifest."""
        return len(self.manifest.classes)

    def available(self) -> list[str]:
        """Returns the names that `select` accepts."""
        return available_features(self.tensors)

    def select(self, name: str) -> Float[Tensor, "B D"]:
        """Returns one feature per image; see `select_feature`."""
        return select_feature(self.tensors, name)


def available_features(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names that `select_feature` accepts for the features of one encoder."""
    names = ["embedding"]
    names += [name for name in ("cls", "mean") if name in tensors]
    if "cls" in tensors and "mean" in tensors:
        names += ["both", "blocks", "blocks_mean"]
    return names


def select_feature(tensors: Mapping[str, Tensor], name: str) -> Float[Tensor, "B D"]:
    """Returns one feature per image.

    Args:
        tensors: `embedding` [B, D]; `cls` [B, blocks, D] and `mean` [B, D] where they exist.
        name: `embedding` (the encoder's own pooling), `cls`, `mean` (of patch tokens), `both` (cls and mean side by
            side), `blocks` (CLS of the last blocks), `blocks_mean` (those and the mean).

    Raises:
        FeatureError: the encoder has no such feature.
    """
    if name not in available_features(tensors):
        raise FeatureError(
            f"feature is {name!r}; expected one of {', '.join(available_features(tensors))} for this encoder; "
            "set the probe's features"
        )
    if name in ("embedding", "mean"):
        return tensors[name]
    cls = tensors["cls"]
    classes = cls.flatten(1) if name.startswith("blocks") else cls[:, -1]
    return classes if name in ("cls", "blocks") else torch.cat([classes, tensors["mean"]], dim=1)
