"""A picture of augmented crops, as the networks see them: one image a row, its views side by side.

Of images that are no colours, the first three channels (or --bands) are shown as red, green and blue, each stretched
over what the picture holds of it.

python -m data.show_crops datasets/fashion-mnist --recipe grayscale-small --global-size 28 --local-size 16 \
        --augment vertical_flip=0.5 global_blur=0,0 --out crops.png
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.config import AugmentationConfig, DataConfig
from data.local_errors import line_of
from data.usage import Parser, ranges_of, read_number, whole
from data.views.config import FULL_SCALE, RECIPES, PixelFormat

if TYPE_CHECKING:
    from torch import Tensor

    from data.views.augmentations import Crops

_MARGIN = 4
_BACKGROUND = 255
_SHOWN_PERCENTILES = (2, 98)
# What a picture says of its origin: others are not replaced.
_SOFTWARE = ("Software", "data.show_crops")
# Lines about a configuration, of which this program's options are a few, name those.
_OWN_NAMES = {
    "shards": "SHARDS",
    "split": "--split",
    "channels": "--channels",
    "pixels": "--pixels",
    "augmentation.": "--augment ",
}
_KEY = re.compile(rf"(?<![\w/.-])data\.({'|'.join(_OWN_NAMES)})")


def main(arguments: list[str] | None = None) -> int:
    """Writes the picture that the command line asks for; returns the exit code."""
    options = _parse(arguments)
    try:
        _check_place(options.out)
        config = DataConfig(
            shards=options.shards,
            split=options.split,
            recipe=options.recipe,
            augmentation=AugmentationConfig(**dict(options.augment)),
            num_local_crops=options.local_crops,
            global_crop_size=options.global_size,
            local_crop_size=options.local_size,
            channels=options.channels,
            pixels=options.pixels,
            mean=(0.0,),
            std=(1.0,),
            num_workers=0,
            # One lane a row: the rows come from all over the set.
            num_lanes=options.images,
        )
        crops = draw_crops(config, num_images=options.images, seed=options.seed)
        _require_bands(options.bands, config.channels)
        origin = PngInfo()
        origin.add_text(*_SOFTWARE)
        Image.fromarray(arrange_crops(crops, config, options.bands)).save(options.out, pnginfo=origin)
    except (ValueError, OSError) as error:
        said = _KEY.sub(lambda key: _OWN_NAMES[key[1]], line_of(error, options.out))
        print(f"error: {said}", file=sys.stderr)
        return 2
    print(f"{options.out}: {options.images} images, recipe {options.recipe}")
    return 0


def _check_place(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out is {str(path)!r}; expected a name that ends with .png; set --out")
    if not path.exists():
        return
    key, mark = _SOFTWARE
    try:
        with Image.open(path) as picture:
            is_own = picture.info.get(key) == mark
    except OSError:  # no picture
        is_own = False
    if not is_own:
        raise ValueError(
            f"--out is {str(path)!r}, which exists and is no picture of this program; expected a new name; set --out"
        )


def _require_bands(bands: Sequence[int], channels: int) -> None:
    for band in bands:
        if not 0 <= band < channels:
            raise ValueError(
                f"--bands holds {band}; expected 0 to {channels - 1}, as --channels is {channels}; set it"
            )


def draw_crops(config: DataConfig, *, num_images: int, seed: int) -> Crops:
    """Returns the first augmented crops of a run with this configuration and seed."""
    # Here, so that --help needs no torch.
    from data.stream.pipeline import TrainingStream
    from data.views.augmentations import DeviceAugmentation

    stream = TrainingStream(
        config, seed=seed, global_batch_size=num_images, micro_batch_size=num_images, rank=0, world_size=1
    )
    batch = next(iter(stream))
    stream.close()
    return DeviceAugmentation(config)(batch)


def arrange_crops(crops: Crops, config: DataConfig, bands: Sequence[int] = ()) -> NDArray[np.uint8]:
    """Returns an RGB picture uint8 [height, width, 3]: a row for each image, global crops first.

    Args:
        crops: normalised crops.
        config: whose mean and standard deviation are taken out again.
        bands: the three channels that are shown; empty for the first three, or of fewer the first.
    """
    bands = bands or (range(3) if config.channels >= 3 else (0,))
    parts = [_to_values(part, config, bands) for part in (crops.global_crops, crops.local_crops)]
    views = [view for part in _to_pixels(parts, config.format) for view in part]
    row_height = max(view.shape[1] for view in views) + _MARGIN
    width = sum(view.shape[2] + _MARGIN for view in views) + _MARGIN
    picture = np.full((len(views[0]) * row_height + _MARGIN, width, 3), _BACKGROUND, dtype=np.uint8)
    left = _MARGIN
    for view in views:
        for row, image in enumerate(view):
            top = _MARGIN + row * row_height
            picture[top : top + image.shape[0], left : left + image.shape[1]] = image
        left += view.shape[2] + _MARGIN
    return picture


def _to_values(crops: Tensor, config: DataConfig, bands: Sequence[int]) -> NDArray[Any]:
    """Returns the divided numbers [V, B, H, W, 3 or 1] of some channels of normalised crops [V, B, C, H, W]."""
    values = crops.movedim(2, -1).numpy() * np.array(config.std) + np.array(config.mean)
    return values[..., list(bands)]


def _to_pixels(parts: Sequence[NDArray[Any]], format: PixelFormat) -> list[NDArray[np.uint8]]:
    """Returns uint8 of divided numbers: of photographs those themselves, else stretched channel by channel."""
    if not format.is_photograph:
        every = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
        low, high = np.percentile(every, _SHOWN_PERCENTILES, axis=0)
        parts = [(part - low) / np.maximum(high - low, np.finfo(np.float32).tiny) for part in parts]
    return [np.clip(np.rint(part * 255), 0, 255).astype(np.uint8) for part in parts]


def _parse_augmentation(text: str) -> tuple[str, float | tuple[float, ...]]:
    """Returns name and value of `name=number,number`, as long as the recipes' own; else argparse says what is wrong."""
    name, _, numbers = text.partition("=")
    known = vars(RECIPES["dino"])
    if name not in known:
        raise argparse.ArgumentTypeError(
            f"{text!r} names no augmentation; expected one of {', '.join(known)}"
        )
    ranges, given = ranges_of(AugmentationConfig, name), numbers.split(",")
    if (
        isinstance(known[name], tuple) and len(ranges) == 1
    ):  # one for each global view, of which there may be any
        ranges *= len(given)
    if len(given) != len(ranges):
        raise argparse.ArgumentTypeError(f"{text!r} has {len(given)} numbers; expected {len(ranges)}")
    try:
        values = tuple(map(read_number, given, ranges))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} holds {error}") from error
    return name, values if isinstance(known[name], tuple) else values[0]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m data.show_crops",
        description=__doc__,
    )
    parser.add_argument("shards", help="folder of shards")
    parser.add_argument("--split", default="train")
    parser.add_argument("--recipe", default="dino", choices=sorted(RECIPES))
    parser.add_argument(
        "--augment",
        nargs="+",
        type=_parse_augmentation,
        default=(),
        metavar="NAME=NUMBERS",
        help="options of data.augmentation in place of the recipe's: quarter_turns=1 jitter_strength=.2,.2,0,0",
    )
    parser.add_argument("--out", default="crops.png", type=Path)
    parser.add_argument("--channels", type=whole(DataConfig, "channels"), default=3, help="data.channels")
    parser.add_argument("--pixels", choices=tuple(FULL_SCALE), default="uint8", help="data.pixels")
    parser.add_argument(
        "--bands", type=int, nargs=3, default=(), help="which channels are red, green and blue"
    )
    parser.add_argument("--images", type=whole(DataConfig, "num_lanes"), default=8)
    parser.add_argument("--local-crops", type=whole(DataConfig, "num_local_crops"), default=4)
    parser.add_argument("--global-size", type=whole(DataConfig, "global_crop_size"), default=224)
    parser.add_argument("--local-size", type=whole(DataConfig, "local_crop_size"), default=96)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
