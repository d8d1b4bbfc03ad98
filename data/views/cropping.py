"""Random resized crops, flips and turns in the images' own type, in the loader: the augmentation's geometry."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data.config import DataConfig
from data.views.config import FULL_SCALE, Recipe
from data.views.random_numbers import draw_uniforms, hash_array

# torchvision's RandomResizedCrop: ten tries for a box that fits, then the largest central one.
_NUM_TRIES = 10
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))

# Purposes under a sample's seed; colours use another range (`augmentations`).
GEOMETRY_PURPOSE = 0


def draw_boxes(
    seeds: NDArray[np.uint64],
    sizes: NDArray[np.int64],
    scales: NDArray[np.float64],
    flips: Recipe,
    aspects: NDArray[np.float64] | None = None,
) -> NDArray[np.int64]:
    """Returns the boxes of the crops of n images, drawn as torchvision's RandomResizedCrop draws them, and their flips.

    A box is 3/4 to 4/3 times as wide, by its height, as the crop that is made of it: wider crops come of wider boxes,
    and of higher ones where they are turned on their side afterwards.

    Args:
        seeds: uint64 [n], augmentation seeds; a box depends on its image's seed and size and on its view's number.
        sizes: int64 [n, 2], heights and widths of the images.
        scales: float64 [V, 2], smallest and largest part of the area for each view.
        flips: with the probabilities of flips and turns; no other number depends on them, but the shape of boxes of
            crops that are not square and turned.
        aspects: float64 [V], width by height of each view; None for squares.

    Returns:
        int64 [n, V, 7]: top, left, height, width, whether to flip horizontally and vertically, and quarter turns.
    """
    keys = hash_array(hash_array(seeds, np.array([GEOMETRY_PURPOSE]))[:, None], range(len(scales)))
    numbers = draw_uniforms(keys, 2 * _NUM_TRIES + 5)
    height, width = sizes[:, 0, None, None], sizes[:, 1, None, None]
    low, high = scales[:, :1], scales[:, 1:]
    areas = height * width * (low + (high - low) * numbers[..., :_NUM_TRIES])
    place_y, place_x, flip, vertical, turn = np.moveaxis(numbers[..., 2 * _NUM_TRIES :], -1, 0)
    # Below its probability p, a uniform number is uniform in [0, p): thirds of it are the three turns.
    turns = np.where(
        turn < flips.quarter_turns, 1 + (turn * 3 / max(flips.quarter_turns, 1e-12)).astype(int), 0
    )
    turns = np.minimum(turns, 3)
    aspects = np.ones(len(scales)) if aspects is None else aspects
    shapes = np.where(turns % 2 == 1, 1 / aspects, aspects)
    logs = _LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * numbers[..., _NUM_TRIES : 2 * _NUM_TRIES]
    ratios = np.exp(logs) * shapes[..., None]
    widths = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    heights = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.argmax(axis=-1)[..., None]
    found = np.take_along_axis(fits, first, -1)[..., 0]
    largest = np.zeros((*found.shape, 2), dtype=np.int64)
    for image, view in np.argwhere(~found).tolist():
        largest[image, view] = _largest_box(sizes[image, 0], sizes[image, 1], shapes[image, view])
    box_height = np.where(found, np.take_along_axis(heights, first, -1)[..., 0], largest[..., 0])
    box_width = np.where(found, np.take_along_axis(widths, first, -1)[..., 0], largest[..., 1])
    room_y, room_x = height[..., 0] - box_height, width[..., 0] - box_width
    # An image without a fitting box gives its centre.
    top = np.where(found, np.floor(place_y * (room_y + 1)), room_y // 2).astype(np.int64)
    left = np.where(found, np.floor(place_x * (room_x + 1)), room_x // 2).astype(np.int64)
    flipped = (flip < flips.flip, vertical < flips.vertical_flip)
    return np.stack([top, left, box_height, box_width, *flipped, turns], axis=-1)


class Cropper:
    """Cuts images' global and local crops; see `data.config.DataConfig` for their numbers and sizes."""

    def __init__(self, config: DataConfig) -> None:
        self._recipe = config.resolved_augmentation
        global_scales = [self._recipe.global_crop_scale] * config.num_global_crops
        local_scales = [self._recipe.local_crop_scale] * config.num_local_crops
        self._scales = np.array(global_scales + local_scales, dtype=np.float64)
        sizes = [config.global_size] * config.num_global_crops + [config.local_size] * config.num_local_crops
        self._aspects = np.array([width / height for height, width in sizes], dtype=np.float64)
        self._interpolation = config.interpolation

    def cut_(
        self,
        images: Sequence[Tensor],
        seeds: Sequence[int],
        rows: Sequence[int],
        global_crops: Tensor,
        local_crops: Tensor,
    ) -> None:
        """Writes the crops of n images in place.

        Args:
            images: n times [1 or C, H, W] of the crops' type.
            seeds: their augmentation seeds.
            rows: their places in the crops.
            global_crops: [V_g, B, C, H, W]; these rows are overwritten.
            local_crops: [V_l, B, C, h, w]; these rows are overwritten.
        """
        sizes = np.array([image.shape[-2:] for image in images], dtype=np.int64)
        drawn = draw_boxes(np.array(seeds, dtype=np.uint64), sizes, self._scales, self._recipe, self._aspects)
        boxes = drawn.tolist()
        targets = [*global_crops.unbind(0), *local_crops.unbind(0)]
        for image, row, boxes_of_image in zip(images, rows, boxes, strict=True):
            for target, box in zip(targets, boxes_of_image, strict=True):
                # copy_ repeats a grey image's one channel where the target has three.
                target[row].copy_(self._cut(image, box, target.shape[-2:]))

    def _cut(self, image: Tensor, box: list[int], size: Sequence[int]) -> Tensor:
        top, left, height, width, flip, vertical, turns = box
        crop = image[None, :, top : top + height, left : left + width]
        # What torchvision's v2 resized_crop calls for uint8 images, without its dispatch, which costs as much as a
        # small crop. "bicubic" and uint8 round and clamp inside the kernel, which knows no uint16.
        is_deep = crop.dtype == torch.uint16
        crop = crop.float() if is_deep else crop
        # What is turned on its side afterwards is cut lying down.
        size = size[::-1] if turns % 2 else size
        resized = F.interpolate(crop, size=list(size), mode=self._interpolation, antialias=True)[0]
        resized = resized.round_().clamp_(0, FULL_SCALE["uint16"]) if is_deep else resized
        axes = [axis for axis, flipped in ((-1, flip), (-2, vertical)) if flipped]
        resized = resized.flip(axes) if axes else resized
        return resized.rot90(turns, (-2, -1)) if turns else resized


def allocate_crops(config: DataConfig, batch_size: int) -> tuple[Tensor, Tensor]:
    """Returns uninitialised global [V_g, B, C, H, W] and local [V_l, B, C, h, w] crops of the images' own type."""
    shape = (batch_size, config.channels)
    dtype: torch.dtype = getattr(torch, config.pixels)
    return (
        torch.empty((config.num_global_crops, *shape, *config.global_size), dtype=dtype),
        torch.empty((config.num_local_crops, *shape, *config.local_size), dtype=dtype),
    )


def _largest_box(height: int, width: int, shape: float) -> tuple[int, int]:
    """Returns the largest box of an allowed aspect ratio, by that of the crop, that fits into an image."""
    smallest, largest = (math.exp(log) * shape for log in _LOG_RATIO)
    if width / height < smallest:
        return min(height, max(1, round(width / smallest))), width
    if width / height > largest:
        return height, min(width, max(1, round(height * largest)))
    return height, width
