"""Colours, blur, solarisation and normalisation of whole batches, on the training device, from per-sample seeds.

The loader ships crops of the images' own type; everything per pixel happens here. What a view goes through is drawn on
the CPU from its sample's seed, so that it depends neither on the worker that loaded it nor on its neighbours in the
batch. A step is done for all images at once, with parameters that leave those alone that do not take it: the number of
kernels is that of the recipe, and the device never waits for the CPU to read a mask.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from data.config import DataConfig
from data.views.collate import CropBatch
from data.views.masking import Masks
from data.views.random_numbers import draw_uniforms, hash_array

# Rec. 601 luma as torchvision rounds it.
_LUMA = (0.2989, 0.587, 0.114)
_SOLARIZE_THRESHOLD = 128 / 255
# Steps of the jitter, in the order of `Recipe.jitter_strength`; the first one is brightness.
_CONTRAST, _SATURATION, _HUE = 1, 2, 3
_NO_STEP = -1
# Below the least difference of two bytes' quotients: divides what is 0.
_SMALLEST_SPREAD = 1e-12
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int64)
# A kernel reaches three standard deviations.
_BLUR_REACH = 3.0
_COLOUR_PURPOSE = 1
_NUM_NUMBERS = 9


@dataclass
class Crops:
    """Augmented, normalised crops.

    Attributes:
        global_crops: float32 [V_g, B, C, H, W].
        local_crops: float32 [V_l, B, C, h, w].
        masks: which patches of the global crops are hidden and predicted, on the CPU; None where none are.
    """

    global_crops: Tensor
    local_crops: Tensor
    masks: Masks | None = None


@dataclass(frozen=True)
class ColourDraws:
    """What each of n views goes through; NumPy arrays of length n.

    Attributes:
        jitter: whether its colours are jittered.
        order: int64 [n, 4], in which order (0 brightness, 1 contrast, 2 saturation, 3 hue).
        factors: float64 [n, 4], the four strengths; hue as a shift in turns.
        gray: whether it loses its colours.
        sigma: standard deviation of its blur in pixels; 0 for none.
        solarize: whether its bright pixels are inverted.
    """

    jitter: NDArray[np.bool_]
    order: NDArray[np.int64]
    factors: NDArray[np.float64]
    gray: NDArray[np.bool_]
    sigma: NDArray[np.float64]
    solarize: NDArray[np.bool_]


class DeviceAugmentation(nn.Module):
    """Turns crops of `data.pixels` into normalised float32 ones by the configuration's augmentation.

    No gradient; no state.
    The result is the same bits for the same crops and seeds on one kind of device.

    Args:
        config: names recipe and augmentation, the mean and the standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: DataConfig) -> None:
        super().__init__()
        self.recipe = config.resolved_augmentation
        self.full_scale = config.format.full_scale
        # Numbers of any unit have no white to be clamped to.
        self.largest = None if config.pixels == "float32" else 1.0
        self.num_global_crops = config.num_global_crops
        self.register_buffer("mean", torch.tensor(config.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(-1, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, batch: CropBatch) -> Crops:
        """Returns a batch's crops augmented, on the device on which its crops are."""
        seeds = batch.seeds.numpy().astype(np.uint64)
        return Crops(
            self._augment(batch.global_crops, seeds, first_view=0),
            self._augment(batch.local_crops, seeds, first_view=self.num_global_crops),
            batch.masks,
        )

    def draw(self, seeds: NDArray[np.uint64], view: int) -> ColourDraws:
        """Returns what a view of every sample goes through; views count global crops first."""
        recipe = self.recipe
        if view < self.num_global_crops:
            blur = recipe.global_blur[min(view, len(recipe.global_blur) - 1)]
            solarize = recipe.global_solarize[min(view, len(recipe.global_solarize) - 1)]
        else:
            blur, solarize = recipe.local_blur, recipe.local_solarize
        keys = hash_array(hash_array(seeds, np.array([_COLOUR_PURPOSE])), np.array([view]))
        numbers = draw_uniforms(keys, _NUM_NUMBERS)
        strengths = np.array(recipe.jitter_strength)
        factors = (numbers[:, 2:6] * 2 - 1) * strengths
        factors[:, :3] += 1
        low, high = recipe.blur_sigma
        return ColourDraws(
            jitter=numbers[:, 0] < recipe.jitter,
            order=_ORDERS[(numbers[:, 1] * len(_ORDERS)).astype(np.int64)],
            factors=factors,
            gray=numbers[:, 6] < recipe.gray,
            sigma=np.where(numbers[:, 7] < blur, low + (high - low) * _stretch(numbers[:, 7], blur), 0.0),
            solarize=numbers[:, 8] < solarize,
        )

    def _augment(self, crops: Tensor, seeds: NDArray[np.uint64], first_view: int) -> Tensor:
        """Returns the views of one size, augmented together: the kernels launched do not grow with the images."""
        images = crops.flatten(0, 1).to(torch.float32, copy=True).div_(self.full_scale)
        if len(images):
            draws = _join([self.draw(seeds, first_view + view) for view in range(len(crops))])
            self._jitter_(images, draws)
            thresholds = np.where(draws.solarize, _SOLARIZE_THRESHOLD, np.inf)
            gray, thresholds_there = _send([draws.gray.astype(np.float32), thresholds], images.device)
            if draws.gray.any() and images.shape[1] == 3:
                torch.lerp(images, _luma(images), _per_image(gray), out=images)
            self._blur_(images, draws.sigma)
            if draws.solarize.any():
                _solarize_(images, thresholds_there)
        return images.sub_(self.mean).div_(self.std).view(crops.shape)

    def _jitter_(self, images: Tensor, draws: ColourDraws) -> None:
        """Jitters colours: each image's own steps in its own order, place by place over all images."""
        num_steps = 4 if images.shape[1] == 3 else 2
        taken = [kind for kind in range(num_steps) if self.recipe.jitter_strength[kind] > 0]
        kinds = np.where(draws.jitter[:, None] & np.isin(draws.order, taken), draws.order, _NO_STEP)
        drawn = np.take_along_axis(draws.factors, np.maximum(kinds, 0), axis=1)
        blends = (kinds != _NO_STEP) & (kinds != _HUE)
        rows = [np.flatnonzero(kinds[:, place] == _HUE) for place in range(kinds.shape[1])]
        turns = [drawn[rows_of_place, place] for place, rows_of_place in enumerate(rows)]
        factors = np.where(blends, drawn, 1.0).T
        masks = [(kinds == kind).T for kind in (_CONTRAST, _SATURATION)]
        on_device = _send([factors, *masks, *turns], images.device)
        rows_on_device = _send(rows, images.device, np.int64)
        for place in range(kinds.shape[1]):
            if blends[:, place].any():
                _blend_(images, *(values[place] for values in on_device[:3]), largest=self.largest)
            if len(rows[place]):
                chosen = rows_on_device[place]
                turned = _shift_hue(images.index_select(0, chosen), on_device[3 + place])
                images.index_copy_(0, chosen, turned)

    def _blur_(self, images: Tensor, sigma: NDArray[np.float64]) -> None:
        radius = math.ceil(_BLUR_REACH * self.recipe.blur_sigma[1])
        radius = min(radius, (min(images.shape[-2:]) - 1))
        rows = np.flatnonzero(sigma > 0)
        if radius > 0 and len(rows):
            (chosen,) = _send([rows], images.device, np.int64)
            images.index_copy_(0, chosen, _gaussian_blur(images.index_select(0, chosen), sigma[rows], radius))


def _join(draws: Sequence[ColourDraws]) -> ColourDraws:
    """Returns what the views of all go through, in order."""
    names = [field.name for field in dataclasses.fields(ColourDraws)]
    return ColourDraws(**{name: np.concatenate([getattr(part, name) for part in draws]) for name in names})


def _send(
    arrays: Sequence[NDArray[Any]], device: torch.device, dtype: type[np.generic] = np.float32
) -> list[Tensor]:
    """Returns arrays as tensors of one type on a device, in a single copy that the CPU does not wait for."""
    flat = torch.from_numpy(np.concatenate([array.reshape(-1).astype(dtype) for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _stretch(numbers: NDArray[np.float64], probability: float) -> NDArray[np.float64]:
    """Returns numbers that were below a probability, uniform in [0, 1) again."""
    return numbers / max(probability, 1e-12)


def _luma(images: Tensor) -> Tensor:
    """Returns [n, 1, H, W] of RGB images; the images themselves where channels are no colours."""
    if images.shape[1] != 3:
        return images
    red, green, blue = images.unbind(dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2]).unsqueeze(1)


def _blend_(
    images: Tensor,
    factors: Tensor,
    is_contrast: Tensor,
    is_saturation: Tensor,
    *,
    largest: float | None = 1.0,
) -> None:
    """Moves images away from black (brightness), their mean luma (contrast) or their luma (saturation), in place.

    clamp(base + factor * (image - base), 0, 1), as torchvision's adjust_brightness, _contrast and _saturation. Bands
    that are no colours differ in level, so that each keeps its own mean.

    Args:
        images: [n, C, H, W].
        factors: [n]; 1 leaves an image as it is, bit for bit.
        is_contrast: [n], 1 where the base is the mean luma, else 0.
        is_saturation: [n], 1 where it is the luma, else 0; where both are 0 it is black.
        largest: value of white; None where there is none, and nothing is clamped.
    """
    luma = _luma(images)
    axes = (1, 2, 3) if luma.shape[1] == 1 else (2, 3)
    mean = luma.mean(dim=axes, keepdim=True) * _per_image(is_contrast)
    base = torch.addcmul(mean, luma, _per_image(is_saturation))
    torch.lerp(base, images, _per_image(factors), out=images)
    if largest is not None:
        images.clamp_(0, largest)


def _solarize_(images: Tensor, thresholds: Tensor) -> None:
    """Inverts pixels at or above each image's threshold [n] in place."""
    torch.where(images >= _per_image(thresholds), 1 - images, images, out=images)


def _shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Returns RGB images in [0, 1] with their hue turned in HSV space, as torchvision's adjust_hue does.

    Args:
        images: [n, 3, H, W].
        turns: [n], in whole turns.
    """
    highest, brightest = images.max(dim=1, keepdim=True)
    spread = highest - images.amin(dim=1, keepdim=True)
    red, green, blue = images.unbind(dim=1)
    differences = torch.stack([green - blue, blue - red, red - green], dim=1)
    # Six times the hue: 0, 2 or 4 for the brightest colour and what the other two differ by. Where none is
    # brightest that difference is 0, and whatever hue comes out has no weight below.
    hue = differences.gather(1, brightest).div_(spread.clamp_min(_SMALLEST_SPREAD))
    hue = hue.add_(brightest, alpha=2).add_(_per_image(6 * turns))
    # RGB from HSV without cases: f(n) = v - v*s*max(0, min(k, 4-k, 1)) with k = (n + 6h) mod 6, n = 5, 3, 1.
    k = torch.cat([hue + offset for offset in (5, 3, 1)], dim=1).remainder_(6)
    return torch.addcmul(highest, spread, torch.minimum(k, 4 - k).clamp_(0, 1), value=-1)


def _gaussian_blur(images: Tensor, sigma: NDArray[np.float64], radius: int) -> Tensor:
    """Blurs every image with its own standard deviation: two passes of a separable kernel, reflected borders."""
    offsets = np.arange(-radius, radius + 1, dtype=np.float64)
    weights = np.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    num_images, channels, height, width = images.shape
    (taps,) = _send([weights.repeat(channels, axis=0)], images.device)
    groups = num_images * channels
    flat = F.pad(images, (radius, radius, radius, radius), mode="reflect").view(
        1, groups, height + 2 * radius, -1
    )
    flat = F.conv2d(flat, taps.view(groups, 1, 1, -1), groups=groups)
    flat = F.conv2d(flat, taps.view(groups, 1, -1, 1), groups=groups)
    return flat.view(num_images, channels, height, width)
