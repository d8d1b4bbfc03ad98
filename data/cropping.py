"""Random resized crops and flips in uint8, in the loader: the geometry half of the augmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop_image

from data.config import RECIPES, DataConfig
from data.random_numbers import draw_uniforms, hash_array

# torchvision's RandomResizedCrop: ten tries for a box that fits, then the largest central one.
_NUM_TRIES = 10
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))

# Purposes under a sample's seed; colours use another range (data.augmentations).
GEOMETRY_PURPOSE = 0


@dataclass(frozen=True)
class CropBoxes:
    """Where the crops of one image lie: int64 [V] each, and flips bool [V]."""

    top: NDArray[np.int64]
    left: NDArray[np.int64]
    height: NDArray[np.int64]
    width: NDArray[np.int64]
    flip: NDArray[np.bool_]


def draw_boxes(
    seed: int, height: int, width: int, scales: NDArray[np.float64], flip_probability: float
) -> CropBoxes:
    """Returns the boxes of an image's crops, drawn as torchvision's RandomResizedCrop draws them.

    Args:
        seed: the sample's augmentation seed; the boxes depend on it, on the image's size and on the view's number.
        height: of the image.
        width: of the image.
        scales: float64 [V, 2], smallest and largest part of the area for each view.
        flip_probability: of a horizontal flip.
    """
    num_views = len(scales)
    keys = hash_array(hash_array(seed, np.array([GEOMETRY_PURPOSE])), range(num_views))
    numbers = draw_uniforms(keys, 2 * _NUM_TRIES + 3)
    low, high = scales[:, :1], scales[:, 1:]
    areas = height * width * (low + (high - low) * numbers[:, :_NUM_TRIES])
    logs = _LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * numbers[:, _NUM_TRIES : 2 * _NUM_TRIES]
    ratios = np.exp(logs)
    widths = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    heights = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.argmax(axis=1)
    rows = np.arange(num_views)
    found = fits[rows, first]
    fallback_height, fallback_width = _largest_box(height, width)
    box_height = np.where(found, heights[rows, first], fallback_height)
    box_width = np.where(found, widths[rows, first], fallback_width)
    place_y, place_x, flip = numbers[:, -3], numbers[:, -2], numbers[:, -1]
    top = np.where(found, np.floor(place_y * (height - box_height + 1)), (height - box_height) // 2)
    left = np.where(found, np.floor(place_x * (width - box_width + 1)), (width - box_width) // 2)
    return CropBoxes(
        top.astype(np.int64), left.astype(np.int64), box_height, box_width, flip < flip_probability
    )


class Cropper:
    """Cuts an image's global and local crops; see `data.config.DataConfig` for their numbers and sizes."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        global_scales = [config.resolved_global_crop_scale] * config.num_global_crops
        local_scales = [config.resolved_local_crop_scale] * config.num_local_crops
        self._scales = np.array(global_scales + local_scales, dtype=np.float64)
        self._flip = RECIPES[config.recipe].flip
        self._interpolation = InterpolationMode(config.interpolation)

    def cut_(self, image: Tensor, seed: int, global_crops: Tensor, local_crops: Tensor) -> None:
        """Writes an image's crops in place.

        Args:
            image: uint8 [1 or C, H, W].
            seed: the sample's augmentation seed.
            global_crops: uint8 [V_g, C, size, size], overwritten.
            local_crops: uint8 [V_l, C, size, size], overwritten.
        """
        height, width = image.shape[-2:]
        boxes = draw_boxes(seed, height, width, self._scales, self._flip)
        num_global = self.config.num_global_crops
        for view, (top, left, box_height, box_width, flip) in enumerate(
            zip(
                boxes.top.tolist(),
                boxes.left.tolist(),
                boxes.height.tolist(),
                boxes.width.tolist(),
                boxes.flip.tolist(),
                strict=True,
            )
        ):
            target = global_crops[view] if view < num_global else local_crops[view - num_global]
            crop = resized_crop_image(
                image,
                top,
                left,
                box_height,
                box_width,
                list(target.shape[-2:]),
                self._interpolation,
                antialias=True,
            )
            # copy_ repeats a grey image's one channel where the target has three.
            target.copy_(crop.flip(-1) if flip else crop)


def allocate_crops(config: DataConfig, batch_size: int) -> tuple[Tensor, Tensor]:
    """Returns uninitialised uint8 global [V_g, B, C, H, W] and local [V_l, B, C, h, w] crops."""
    shape = (batch_size, config.channels)
    size, local_size = config.global_crop_size, config.local_crop_size
    return (
        torch.empty((config.num_global_crops, *shape, size, size), dtype=torch.uint8),
        torch.empty((config.num_local_crops, *shape, local_size, local_size), dtype=torch.uint8),
    )


def _largest_box(height: int, width: int) -> tuple[int, int]:
    """Returns the largest box of an allowed aspect ratio that fits into an image."""
    smallest, largest = math.exp(_LOG_RATIO[0]), math.exp(_LOG_RATIO[1])
    if width / height < smallest:
        return min(height, max(1, round(width / smallest))), width
    if width / height > largest:
        return height, min(width, max(1, round(height * largest)))
    return height, width
