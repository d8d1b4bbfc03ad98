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
