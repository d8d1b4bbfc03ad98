"""What a source of images is: a list whose items are loaded one at a time, or left out with a reason."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.writing.duplicates import LabelConflicts


@dataclass(frozen=True)
class SourceSample:
    """One image to be written: a unique key without dots, its members by suffix, its class index if it has one."""

    key: str
    members: dict[str, bytes]
    label: int | None = None


@dataclass(frozen=True)
class Rejected:
    """An image that is left out, and why: `broken`, `duplicate`, ... with a detail and its number in the source."""

    name: str
    kind: str
    detail: str = ""
    index: int = -1


class ImageSource(ABC):
    """A picklable list of images.

    Attributes:
        classes: class names in index order; empty without labels.
        fingerprint: text that changes whenever the images or their treatment do.
        drops_duplicates: leave out images whose bytes occurred before, and report them.
        label_conflicts: what to do when two classes claim the same bytes; see `data.duplicates.find_duplicates`.
    """

    classes: tuple[str, ...] = ()
    fingerprint: str = ""
    drops_duplicates: bool = False
    label_conflicts: LabelConflicts = "error"

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of images."""

    @abstractmethod
    def size(self, index: int) -> int:
        """Returns an image's approximate size in bytes."""

    def name(self, index: int) -> str:
        """Returns by what name a person finds an image in the source."""
        return f"image {index}"

    @abstractmethod
    def load(self, index: int) -> SourceSample | Rejected:
        """Returns an image's bytes; reads it once."""


class ArraySource(ImageSource):
    """Images that lie in memory, as lossless PNG.

    Args:
        images: uint8 [n, H, W] or [n, H, W, 3].
        labels: class index of each.
        classes: names in index order.
        split: begins the samples' keys.
        fingerprint: see `ImageSource`.
        numbers: what ends the keys, where an image is not the one of that position in its set.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.integer],
        *,
        classes: Sequence[str],
        split: str,
        fingerprint: str,
        numbers: NDArray[np.integer] | None = None,
    ) -> None:
        self.images, self.labels, self.split = images, labels, split
        self.classes, self.fingerprint = tuple(classes), fingerprint
        self._numbers = np.arange(len(images)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.images)

    def size(self, index: int) -> int:
        """Returns the uncompressed size, which the PNG hardly ever exceeds."""
        return self.images[index].nbytes

    def load(self, index: int) -> SourceSample:
        """Returns one image and its label."""
        encoded = io.BytesIO()
        Image.fromarray(self.images[index]).save(encoded, format="PNG")
        key = f"{self.split}-{self._numbers[index]:05d}"
        return SourceSample(key, {"png": encoded.getvalue()}, int(self.labels[index]))
