"""Crops and colours against torchvision, and seeds that decide everything."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from torchvision.transforms.v2 import InterpolationMode

from data.config import RECIPES, DataConfig
from data.views import augmentations
from data.views.augmentations import DeviceAugmentation
from data.views.collate import CropBatch
from data.views.cropping import Cropper, allocate_crops, draw_boxes


def make_batch(size=12, batch=6, channels=3, seed=0) -> CropBatch:
    generator = torch.Generator().manual_seed(seed)
    crops = [
        torch.randint(0, 256, (views, batch, channels, side, side), generator=generator, dtype=torch.uint8)
        for views, side in ((2, size), (3, size // 2))
    ]
    ids = torch.arange(batch)
    return CropBatch(*crops, seeds=ids * 7919 + 13, keys=[""] * batch, sample_ids=ids, position={})


def config_of(recipe="dino", **changes):
    values = {
        "shards": "x",
        "recipe": recipe,
        "num_local_crops": 3,
        "global_crop_size": 12,
        "local_crop_size": 6,
    }
    return DataConfig(**{**values, **changes})


images = torch.rand(5, 3, 9, 11, generator=torch.Generator().manual_seed(1))
FACTORS = np.array([0.6, 0.9, 1.0, 1.2, 1.4])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (augmentations._adjust_brightness, reference.adjust_brightness),
        (augmentations._adjust_contrast, reference.adjust_contrast),
        (augmentations._adjust_saturation, reference.adjust_saturation),
    ],
)
def test_jitter_equals_torchvision(ours, theirs):
    expected = torch.stack([theirs(image, factor) for image, factor in zip(images, FACTORS, strict=True)])
    assert torch.allclose(ours(images, FACTORS), expected, atol=2e-6)


def test_hue_equals_torchvision():
    turns = np.array([-0.5, -0.1, 0.0, 0.03, 0.1])
    expected = torch.stack(
        [reference.adjust_hue(image, turn) for image, turn in zip(images, turns, strict=True)]
    )
    assert torch.allclose(augmentations._shift_hue(images, turns), expected, atol=2e-5)
    gray = images[:, :1].expand(-1, 3, -1, -1)
    assert torch.allclose(augmentations._shift_hue(gray, turns), gray, atol=1e-6)


def test_blur_equals_torchvision():
    sigma = np.array([0.1, 0.5, 1.0, 1.5, 2.0])
    blurred = augmentations._gaussian_blur(images, sigma, radius=6)
    expected = [
        reference.gaussian_blur(image, [13, 13], [float(s)] * 2)
        for image, s in zip(images, sigma, strict=True)
    ]
    assert torch.allclose(blurred, torch.stack(expected), atol=1e-5)


def test_solarize_and_gray_equal_torchvision():
    bytes_ = (images * 255).round().to(torch.uint8)
    ours = augmentations._solarize(bytes_.float() / 255)
    assert torch.allclose(ours, reference.solarize(bytes_, 128).float() / 255, atol=1e-6)
    expected = reference.rgb_to_grayscale(images, num_output_channels=3)
    assert torch.allclose(augmentations._to_gray(images), expected, atol=1e-6)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_runs_and_is_bit_exact(recipe):
    for channels in (1, 3):
        augment = DeviceAugmentation(config_of(recipe, channels=channels, mean=(0.5,), std=(0.2,)))
        first, again = (augment(make_batch(channels=channels)) for _ in range(2))
        assert first.global_crops.shape == (2, 6, channels, 12, 12)
        assert first.local_crops.shape == (3, 6, channels, 6, 6)
        assert torch.equal(first.global_crops, again.global_crops)
        assert torch.equal(first.local_crops, again.local_crops)
        assert first.global_crops.isfinite().all()


def test_a_samples_result_does_not_depend_on_its_neighbours():
    augment = DeviceAugmentation(config_of())
    batch = make_batch()
    whole = augment(batch)
    rows = [4, 1]
    part = dataclasses.replace(
        batch,
        global_crops=batch.global_crops[:, rows],
        local_crops=batch.local_crops[:, rows],
        seeds=batch.seeds[rows],
    )
    assert torch.allclose(augment(part).global_crops, whole.global_crops[:, rows], atol=1e-6)


def test_probabilities_are_the_recipes():
    augment = DeviceAugmentation(config_of("dino"))
    seeds = np.arange(20_000, dtype=np.uint64) * np.uint64(977)
    first, second, local = (augment.draw(seeds, view) for view in (0, 1, 2))
    assert (first.sigma > 0).all() and not first.solarize.any()
    assert abs((second.sigma > 0).mean() - 0.1) < 0.01 and abs(second.solarize.mean() - 0.2) < 0.01
    assert abs((local.sigma > 0).mean() - 0.5) < 0.015 and not local.solarize.any()
    for draws in (first, second, local):
        assert abs(draws.jitter.mean() - 0.8) < 0.01 and abs(draws.gray.mean() - 0.2) < 0.01
        assert draws.factors[:, 0].min() >= 0.6 and draws.factors[:, 0].max() <= 1.4
        assert abs(draws.factors[:, 3]).max() <= 0.1
        used = draws.sigma[draws.sigma > 0]
        assert used.min() >= 0.1 and used.max() <= 2.0 and abs(used.mean() - 1.05) < 0.05
        assert len({tuple(order) for order in draws.order}) == 24
    assert not np.array_equal(first.jitter, second.jitter)


def test_none_only_normalises():
    config = config_of("none")
    batch = make_batch()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    expected = (batch.global_crops.float() / 255 - mean) / std
    assert torch.allclose(DeviceAugmentation(config)(batch).global_crops, expected, atol=1e-6)


def test_crops_equal_torchvisions_resized_crop():
    config = config_of("dino", num_local_crops=2)
    generator = torch.Generator().manual_seed(3)
    pictures = [
        torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8)
        for h, w in ((30, 41), (50, 22))
    ]
    seeds = [5, 6]
    cropper = Cropper(config)
    global_crops, local_crops = allocate_crops(config, 2)
    cropper.cut_(pictures, seeds, global_crops, local_crops)
    scales = np.array([config.resolved_global_crop_scale] * 2 + [config.resolved_local_crop_scale] * 2)
    sizes = np.array([picture.shape[-2:] for picture in pictures])
    boxes = draw_boxes(np.array(seeds, dtype=np.uint64), sizes, scales, 0.5)
    for index, picture in enumerate(pictures):
        for view in range(4):
            top, left, height, width, flip = boxes[index, view].tolist()
            size = [12, 12] if view < 2 else [6, 6]
            crop = reference.resized_crop(
                picture, top, left, height, width, size, InterpolationMode.BICUBIC, antialias=True
            )
            ours = global_crops[view, index] if view < 2 else local_crops[view - 2, index]
            assert torch.equal(ours, crop.flip(-1) if flip else crop)


def test_boxes_lie_inside_and_cover_the_asked_area():
    seeds = np.arange(4000, dtype=np.uint64)
    sizes = np.tile([[60, 80]], (4000, 1))
    boxes = draw_boxes(seeds, sizes, np.array([[0.2, 0.6], [0.05, 0.2]]), 0.5)
    top, left, height, width, flip = np.moveaxis(boxes, -1, 0)
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 60).all() and (left + width <= 80).all()
    area = height * width / 4800
    assert area[:, 0].min() > 0.19 and area[:, 0].max() < 0.62 and abs(area[:, 0].mean() - 0.4) < 0.02
    assert area[:, 1].min() > 0.045 and area[:, 1].max() < 0.21
    ratio = width / height
    assert ratio.min() > 0.65 and ratio.max() < 1.5
    assert abs(flip.mean() - 0.5) < 0.03


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_boxes_of_odd_images_fit(size):
    boxes = draw_boxes(np.arange(50, dtype=np.uint64), np.tile([size], (50, 1)), np.array([[0.4, 1.0]]), 0.5)
    top, left, height, width, _ = np.moveaxis(boxes, -1, 0)
    assert (height >= 1).all() and (width >= 1).all()
    assert (top + height <= size[0]).all() and (left + width <= size[1]).all()
