"""Label maps: a class for every pixel, from others' PNGs to the one form in which shards keep them.

In a shard a label map is an 8-bit grey PNG of the image's size: class indices, and `VOID_INDEX` where there is none.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.config import MAX_IMAGE_PIXELS
from data.local_errors import raise_if_local
from data.members import VOID_INDEX, readable
from data.shards import DataError
from data.views.decoding import DECODE_ERRORS

# What files of classes call pixels that count for nothing.
_VOID_NAMES = ("void", "unlabelled", "unlabeled", "ignore")
_GREY_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")
_UNKNOWN = -1
_NUM_VALUES = 2**16

Colour = tuple[int, ...]


@dataclass(frozen=True)
class LabelRule:
    """What the values of a set's label files mean.

    Attributes:
        classes: names in index order, void not among them.
        indices: value to class index, or to `VOID_INDEX`.
        palette: value to colour where the files are palette PNGs: of two files with different palettes, the indices
            cannot both be classes. Empty for other files.
    """

    classes: tuple[str, ...]
    indices: Mapping[int, int]
    palette: Mapping[int, Colour] = field(default_factory=dict)


def make_rule(
    names: Sequence[str], *, first_class: int = 0, void: Sequence[int] = (VOID_INDEX,)
) -> LabelRule:
    """Returns the rule of a set whose label value `first_class + i` is class `names[i]`.

    Names such as `void` are no classes: their values are void, and the classes behind them move up.

    Raises:
        DataError: no class, too many, one twice, or a void value that is a class.
    """
    named = {first_class + number: name for number, name in enumerate(names)}
    is_class = {value: name for value, name in named.items() if name.lower() not in _VOID_NAMES}
    classes = tuple(is_class.values())
    if not 1 <= len(classes) <= VOID_INDEX or len(set(classes)) < len(classes):
        raise DataError(
            f"the set has {len(set(classes))} different classes of {len(classes)}; expected 1 to {VOID_INDEX} names, "
            "each once; mend the file of classes, or set --classes"
        )
    for value in void:
        if value in is_class:
            raise DataError(
                f"--void is {value}, which is class {is_class[value]!r}; expected a value that no class has; set "
                "--void or --first-class"
            )
    indices = {value: index for index, value in enumerate(is_class)}
    others = {value: VOID_INDEX for value in (*named, *void) if value not in indices}
    if min({**indices, **others}) < 0 or max({**indices, **others}) >= _NUM_VALUES:
        raise DataError(
            f"--first-class {first_class} and --void {list(void)} give values outside 0 to {_NUM_VALUES - 1}; expected "
            "values that a PNG can hold; set them"
        )
    return LabelRule(classes, {**indices, **others})


def read_label_map(path: Path, rule: LabelRule, size: tuple[int, int]) -> bytes:
    """Returns a label file as the PNG that shards keep.

    Args:
        path: an image of one channel: grey, 16-bit, or a palette, of which the indices count.
        rule: what its values mean.
        size: (width, height) of its image.

    Raises:
        DataError: it is missing, damaged, in colour, of another size or palette, or holds a value that is neither a
            class nor void.
    """
    what = f"label {readable(str(path))}"
    image = open_label(path)
    if image.size != size:
        raise DataError(
            f"{what} has {image.width} x {image.height} pixels and its image {size[0]} x {size[1]}; expected the same "
            "size; mend one of them"
        )
    values = np.asarray(image).astype(np.int64)
    table = np.full(_NUM_VALUES, _UNKNOWN)
    table[list(rule.indices)] = list(rule.indices.values())
    indices = table[values.clip(0, _NUM_VALUES - 1)]
    if (indices == _UNKNOWN).any():
        row, column = (int(place) for place in np.argwhere(indices == _UNKNOWN)[0])
        of_palette = "; of a palette PNG the indices count" if image.mode == "P" else ""
        raise DataError(
            f"{what} holds {values[row, column]} at row {row}, column {column}; expected {_describe(rule)}"
            f"{of_palette}; set --void, --first-class or --classes"
        )
    if rule.palette:
        _require_same_palette(what, image, values, rule.palette)
    return encode_label_map(indices.astype(np.uint8))


def encode_label_map(indices: NDArray[np.uint8]) -> bytes:
    """Returns class indices [H, W] as an 8-bit grey PNG."""
    encoded = io.BytesIO()
    Image.fromarray(indices).save(encoded, format="PNG")
    return encoded.getvalue()


def open_label(path: Path) -> Image.Image:
    """Returns a label file, decoded.

    Raises:
        DataError: it is missing, damaged or in colour.
    """
    what = f"label {readable(str(path))}"
    try:
        image = Image.open(path)
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_IMAGE_PIXELS}")
        image.load()
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise_if_local(error, what)
        said = (error.strerror if isinstance(error, OSError) else "") or type(error).__name__
        raise DataError(
            f"{what} cannot be read ({said}); expected a PNG of class indices; mend it"
        ) from error
    if image.mode not in _GREY_MODES:
        raise DataError(
            f"{what} is a colour image ({image.mode}); expected one channel of class indices; convert its colours to "
            "indices"
        )
    return image


def palette_of(image: Image.Image) -> dict[int, Colour]:
    """Returns the colours of a palette image by index; empty for other images."""
    flat = image.getpalette("RGB") if image.mode == "P" else None
    return {index: tuple(flat[3 * index : 3 * index + 3]) for index in range(len(flat) // 3)} if flat else {}


def _require_same_palette(
    what: str, image: Image.Image, values: NDArray[np.int64], expected: Mapping[int, Colour]
) -> None:
    found = palette_of(image)
    for value in np.unique(values).tolist():
        if value in found and value in expected and found[value] != expected[value]:
            raise DataError(
                f"{what} gives index {value} the colour {found[value]}, other labels give it {expected[value]}; "
                "expected one palette, as indices are classes; write the labels again as class indices"
            )


def _describe(rule: LabelRule) -> str:
    classes = sorted(value for value, index in rule.indices.items() if index != VOID_INDEX)
    void = sorted(value for value, index in rule.indices.items() if index == VOID_INDEX)
    text = f"a class, {classes[0]} to {classes[-1]}"
    return text + (f", or void, {', '.join(map(str, void))}" if void else "")
