"""What a decoded image consists of (channels, type of number, sides), and the published recipes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One published augmentation recipe: a value for each option of `AugmentationConfig`, which says what they mean."""

    global_crop_scale: tuple[float, float]
    local_crop_scale: tuple[float, float]
    flip: float = 0.5
    vertical_flip: float = 0.0
    quarter_turns: float = 0.0
    jitter: float = 0.8
    jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    gray: float = 0.2
    global_blur: tuple[float, ...] = (1.0, 0.1)
    local_blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    global_solarize: tuple[float, ...] = (0.0, 0.2)
    local_solarize: float = 0.0


RECIPES: dict[str, Recipe] = {
    # Caron et al. 2021, "Emerging properties in self-supervised vision transformers", official code's defaults.
    "dino": Recipe(global_crop_scale=(0.4, 1.0), local_crop_scale=(0.05, 0.4)),
    # Silva & Ramirez Rivera 2023, "Representation learning via consistent assignment of views over random
    # partitions", official code's defaults.
    "carp": Recipe(global_crop_scale=(0.2, 1.0), local_crop_scale=(0.05, 0.2)),
    # For grey images of about 28 x 28: no colours to jitter, and a two-pixel blur would leave nothing to see.
    "grayscale-small": Recipe(
        global_crop_scale=(0.3, 1.0),
        local_crop_scale=(0.1, 0.3),
        jitter_strength=(0.4, 0.4, 0.0, 0.0),
        gray=0.0,
        global_blur=(0.5, 0.1),
        local_blur=0.2,
        blur_sigma=(0.1, 1.0),
        global_solarize=(0.0, 0.1),
    ),
    # Geometry only.
    "none": Recipe(
        global_crop_scale=(0.4, 1.0),
        local_crop_scale=(0.05, 0.4),
        jitter=0.0,
        gray=0.0,
        global_blur=(0.0,),
        local_blur=0.0,
        global_solarize=(0.0,),
    ),
}


def left_out(recipe: Recipe, format: PixelFormat) -> dict[str, Any]:
    """Returns options of a recipe that do not apply to images of this format, with the value that does nothing.

    Saturation, hue and grey are about red, green and blue. Solarisation inverts at half of an 8-bit range, which other
    numbers do not fill. Brightness and contrast apply to all.
    """
    out: dict[str, Any] = {}
    if format.is_photograph:
        return out
    if not format.has_colours:
        brightness, contrast, *colours = recipe.jitter_strength
        if any(colours):
            out["jitter_strength"] = (brightness, contrast, 0.0, 0.0)
        if recipe.gray:
            out["gray"] = 0.0
    if any(recipe.global_solarize):
        out["global_solarize"] = (0.0,)
    if recipe.local_solarize:
        out["local_solarize"] = 0.0
    return out
