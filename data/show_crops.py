"""A picture of augmented crops, as the networks see them: one image a row, its views side by side.

python -m data.show_crops datasets/fashion-mnist --recipe grayscale-small --global-size 28 --local-size 16 \
        --augment vertical_flip=0.5 global_blur=0,0 --out crops.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.config import RECIPES, AugmentationConfig, DataConfig
from data.usage import Parser

if TYPE_CHECKING:
    from torch import Tensor

    from data.views.augmentations import Crops

_MARGIN = 4
_BACKGROUND = 255


def main(arguments: list[str] | None = None) -> int:
    """Writes the picture that the command line asks for; returns the exit code."""
    options = _parse(arguments)
    try:
        config = DataConfig(
            shards=options.shards,
            split=options.split,
            recipe=options.recipe,
            augmentation=AugmentationConfig(**dict(options.augment)),
            num_local_crops=options.local_crops,
            global_crop_size=options.global_size,
            local_crop_size=options.local_size,
            num_workers=0,
            # One lane a row: the rows come from all over the set.
            num_lanes=options.images,
        )
        crops = draw_crops(config, num_images=options.images, seed=options.seed)
        Image.fromarray(arrange_crops(crops, config)).save(options.out)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"{options.out}: {options.images} images, recipe {options.recipe}")
    return 0


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


def arrange_crops(crops: Crops, config: DataConfig) -> NDArray[np.uint8]:
    """Returns an RGB picture uint8 [height, width, 3]: a row for each image, global crops first.

    Args:
        crops: normalised crops.
        config: whose mean and standard deviation are taken out again.
    """
    views = [*_to_pixels(crops.global_crops, config), *_to_pixels(crops.local_crops, config)]
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


def _to_pixels(crops: Tensor, config: DataConfig) -> NDArray[Any]:
    """Returns uint8 [V, B, H, W, 3 or 1] of normalised crops [V, B, C, H, W]."""
    values = crops.movedim(2, -1).numpy() * np.array(config.std) + np.array(config.mean)
    return np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)


def _parse_augmentation(text: str) -> tuple[str, float | tuple[float, ...]]:
    """Returns name and value of `name=number,number`, as long as the recipes' own; else argparse says what is wrong."""
    name, _, numbers = text.partition("=")
    known = vars(RECIPES["dino"])
    if name not in known:
        raise argparse.ArgumentTypeError(
            f"{text!r} names no augmentation; expected one of {', '.join(known)}"
        )
    values = tuple(float(number) for number in numbers.split(","))
    if isinstance(known[name], tuple):
        return name, values
    if len(values) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} has {len(values)} numbers; expected one")
    return name, values[0]


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
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--local-crops", type=int, default=4)
    parser.add_argument("--global-size", type=int, default=224)
    parser.add_argument("--local-size", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
