"""Colours, blur, solarisation and normalisation of whole batches, on the training device, from per-sample seeds.

The loader ships uint8 crops; everything per pixel happens here. What a view goes through is drawn on the CPU from
its sample's seed, so that it depends neither on the worker that loaded it nor on its neighbours in the batch, and
the device never waits for the CPU to read a mask.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from data.config import DataConfig
from data.views.collate import CropBatch
from data.views.random_numbers import draw_uniforms, hash_array

# Rec. 601 luma as torchvision rounds it.
_LUMA = (0.2989, 0.587, 0.114)
_SOLARIZE_THRESHOLD = 128 / 255
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
    """

    global_crops: Tensor
    local_crops: Tensor


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
    """Turns uint8 crops into normalised float32 crops by the configuration's augmentation. No gradient; no state.

    The result is the same bits for the same crops and seeds on one kind of device.

    Args:
        config: names recipe and augmentation, the mean and the standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: DataConfig) -> None:
        super().__init__()
        self.recipe = config.resolved_augmentation
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
        num_views, _, channels = crops.shape[:3]
        images = crops.to(torch.float32).div_(255)
        for view in range(num_views):
            draws = self.draw(seeds, first_view + view)
            self._jitter_(images[view], draws, channels)
            if channels == 3:
                _apply_(images[view], draws.gray, _to_gray)
            self._blur_(images[view], draws.sigma)
            _apply_(images[view], draws.solarize, _solarize)
        return images.sub_(self.mean).div_(self.std)

    def _jitter_(self, images: Tensor, draws: ColourDraws, channels: int) -> None:
        kinds = [kind for kind in range(4 if channels == 3 else 2) if self.recipe.jitter_strength[kind] > 0]
        for place, kind in itertools.product(range(4), kinds):
            chosen = draws.jitter & (draws.order[:, place] == kind)
            _apply_(
                images, chosen, functools.partial(_JITTER_STEPS[kind], factors=draws.factors[chosen, kind])
            )

    def _blur_(self, images: Tensor, sigma: NDArray[np.float64]) -> None:
        radius = math.ceil(_BLUR_REACH * self.recipe.blur_sigma[1])
        radius = min(radius, (min(images.shape[-2:]) - 1))
        if radius > 0:
            _apply_(images, sigma > 0, lambda x: _gaussian_blur(x, sigma[sigma > 0], radius))


def _apply_(images: Tensor, chosen: NDArray[np.bool_], change: Callable[[Tensor], Tensor]) -> None:
    """Replaces the chosen images by what `change` makes of them."""
    if not chosen.any():
        return
    rows = torch.from_numpy(np.flatnonzero(chosen)).to(images.device, non_blocking=True)
    images.index_copy_(0, rows, change(images.index_select(0, rows)))


def _per_image(values: NDArray[np.float64], images: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(images.device, non_blocking=True).view(-1, 1, 1, 1)


def _stretch(numbers: NDArray[np.float64], probability: float) -> NDArray[np.float64]:
    """Returns numbers that were below a probability, uniform in [0, 1) again."""
    return numbers / max(probability, 1e-12)


def _luma(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(dim=1)
    return (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]).unsqueeze(1)


def _to_gray(images: Tensor) -> Tensor:
    return _luma(images).expand_as(images)


def _solarize(images: Tensor) -> Tensor:
    return torch.where(images >= _SOLARIZE_THRESHOLD, 1 - images, images)


def _adjust_brightness(images: Tensor, factors: NDArray[np.float64]) -> Tensor:
    return (images * _per_image(factors, images)).clamp_(0, 1)


def _adjust_contrast(images: Tensor, factors: NDArray[np.float64]) -> Tensor:
    mean = _luma(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, _per_image(factors, images)).clamp_(0, 1)


def _adjust_saturation(images: Tensor, factors: NDArray[np.float64]) -> Tensor:
    return torch.lerp(_luma(images), images, _per_image(factors, images)).clamp_(0, 1)


def _shift_hue(images: Tensor, factors: NDArray[np.float64]) -> Tensor:
    """Turns the hue of RGB images in [0, 1] in HSV space, as torchvision's adjust_hue does."""
    red, green, blue = images.unbind(dim=1)
    highest, lowest = images.amax(dim=1), images.amin(dim=1)
    spread = highest - lowest
    flat = spread == 0
    saturation = spread / torch.where(flat, torch.ones_like(highest), highest)
    divisor = torch.where(flat, torch.ones_like(spread), spread)
    red_part, green_part, blue_part = ((highest - c) / divisor for c in (red, green, blue))
    from_red = blue_part - green_part
    from_green = 2 + red_part - blue_part
    from_blue = 4 + green_part - red_part
    hue = torch.where(highest == red, from_red, torch.where(highest == green, from_green, from_blue))
    hue = torch.where(flat, torch.zeros_like(hue), hue) / 6
    hue = (hue + _per_image(factors, images).squeeze(1)) % 1.0
    # RGB from HSV without cases: f(n) = v - v*s*max(0, min(k, 4-k, 1)) with k = (n + 6h) mod 6, n = 5, 3, 1.
    channels = []
    for offset in (5, 3, 1):
        k = (offset + 6 * hue) % 6
        channels.append(highest - highest * saturation * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, dim=1)


# In the order of `Recipe.jitter_strength`.
_JITTER_STEPS = (_adjust_brightness, _adjust_contrast, _adjust_saturation, _shift_hue)


def _gaussian_blur(images: Tensor, sigma: NDArray[np.float64], radius: int) -> Tensor:
    """Blurs every image with its own standard deviation: two passes of a separable kernel, reflected borders."""
    offsets = np.arange(-radius, radius + 1, dtype=np.float64)
    weights = np.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    num_images, channels, height, width = images.shape
    taps = torch.from_numpy(weights.astype(np.float32)).to(images.device, non_blocking=True)
    taps = taps.repeat_interleave(channels, dim=0)
    groups = num_images * channels
    flat = F.pad(images, (radius, radius, radius, radius), mode="reflect").view(
        1, groups, height + 2 * radius, -1
    )
    flat = F.conv2d(flat, taps.view(groups, 1, 1, -1), groups=groups)
    flat = F.conv2d(flat, taps.view(groups, 1, -1, 1), groups=groups)
    return flat.view(num_images, channels, height, width)
