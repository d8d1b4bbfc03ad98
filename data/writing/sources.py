"""What a source of images is: a list whose items are loaded one at a time, or left out with a reason."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

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
