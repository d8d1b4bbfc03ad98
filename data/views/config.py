"""What a decoded image consists of: so many channels, of numbers of one type, and sides. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PixelType = Literal["uint8", "uint16", "float32"]
# The value that becomes 1.
FULL_SCALE: dict[PixelType, float] = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}


@dataclass(frozen=True)
class PixelFormat:
    """What is asked of a decoded image: so many channels, of numbers of this type."""

    channels: int = 3
    pixels: PixelType = "uint8"

    @property
    def is_photograph(self) -> bool:
        """Whether whatever Pillow opens is converted to this: 8 bits, RGB or grey."""
        return self.pixels == "uint8" and self.channels in (1, 3)

    @property
    def has_colours(self) -> bool:
        """Whether the channels are red, green and blue."""
        return self.pixels != "float32" and self.channels == 3

    @property
    def full_scale(self) -> float:
        """The value that becomes 1 before mean and standard deviation."""
        return FULL_SCALE[self.pixels]


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns both sides of what is one number for squares."""
    return (size, size) if isinstance(size, int) else size


def rule_of_masks(size: tuple[int, int], patch_size: int, blocks: bool, share: float) -> str:
    """Returns what a crop must be so that masks hide patches of it; empty where it is.

    A term on patches that are never hidden would learn nothing, without a word.

    Args:
        size: height and width of the crop.
        patch_size: side of a patch.
        blocks: whether rectangles are hidden, which are lower and narrower than the crop; else all but one.
        share: of the patches that is hidden at most; 0 where none is meant to be.
    """
    if any(side % patch_size for side in size):
        return f"a multiple of data.masks.patch_size ({patch_size})"
    rows, columns = size[0] // patch_size, size[1] // patch_size
    if not share or (int(rows * columns * share) >= 1 and (not blocks or min(rows, columns) >= 2)):
        return ""
    return (
        f"{'2 x 2 patches and more' if blocks else 'more patches'}: of {rows} x {columns} none is ever hidden"
    )
