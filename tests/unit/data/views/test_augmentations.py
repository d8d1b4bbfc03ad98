"""Crops and colours against torchvision, and seeds that decide everything."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from torchvision.transforms.v2 import InterpolationMode

from data.config import AugmentationConfig, DataConfig
from data.views import augmentations
from data.views.augmentations import DeviceAugmentation
from data.views.collate import CropBatch
from data.views.config import RECIPES, Recipe
from data.views.cropping import Cropper, allocate_crops, draw_boxes
from tests.helpers.counting import DeviceCounter


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
    ("is_contrast", "is_saturation", "theirs"),
    [
        (0.0, 0.0, reference.adjust_brightness),
        (1.0, 0.0, reference.adjust_contrast),
        (0.0, 1.0, reference.adjust_saturation),
    ],
)
def test_jitter_equals_torchvision(is_contrast, is_saturation, theirs):
    expected = torch.stack([theirs(image, factor) for image, factor in zip(images, FACTORS, strict=True)])
    ours = images.clone()
    masks = (torch.full((5,), is_contrast), torch.full((5,), is_saturation))
    augmentations._blend_(ours, torch.from_numpy(FACTORS).float(), *masks)
    assert torch.allclose(ours, expected, atol=2e-6)
    assert torch.equal(ours[2], images[2])  # its factor is 1: it takes no step


def test_hue_equals_torchvision():
    turns = np.array([-0.5, -0.1, 0.0, 0.03, 0.1])
    expected = torch.stack(
        [reference.adjust_hue(image, turn) for image, turn in zip(images, turns, strict=True)]
    )
    turns = torch.from_numpy(turns).float()
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


def augment_alone(picture, draws, index, radius):
    """One view of one image, step by step with torchvision's functions; what batches of views must equal."""
    steps = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    )
    image = picture.float() / 255
    num_steps = 4 if len(image) == 3 else 2
    for kind in draws.order[index] if draws.jitter[index] else ():
        if kind < num_steps:
            image = steps[kind](image, float(draws.factors[index, kind]))
    if draws.gray[index] and len(image) == 3:
        image = reference.rgb_to_grayscale(image, num_output_channels=3)
    if draws.sigma[index] > 0:
        image = reference.gaussian_blur(image, [2 * radius + 1] * 2, [float(draws.sigma[index])] * 2)
    # In bytes, where the threshold is a number of its own.
    return reference.solarize(image, 128 / 255) if draws.solarize[index] else image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("recipe", ["dino", "carp"])
def test_a_batch_equals_its_images_one_by_one(recipe, channels):
    """Every draw reaches its own view, in its own order, whatever the others of the batch go through."""
    config = config_of(recipe, channels=channels, mean=(0.5,), std=(0.2,))
    augment, batch = DeviceAugmentation(config), make_batch(size=20, batch=24, channels=channels)
    found = augment(batch)
    seeds = batch.seeds.numpy().astype(np.uint64)
    radius = -int(-3 * augment.recipe.blur_sigma[1] // 1)
    seen = set()
    for crops, ours, first in (
        (batch.global_crops, found.global_crops, 0),
        (batch.local_crops, found.local_crops, 2),
    ):
        for view in range(len(crops)):
            draws = augment.draw(seeds, first + view)
            for row, picture in enumerate(crops[view]):
                alone = augment_alone(picture, draws, row, min(radius, crops.shape[-1] - 1))
                error = (ours[view, row] - (alone - 0.5) / 0.2).abs()
                # A pixel at the threshold of solarisation may be inverted by rounding.
                assert float((error > 2e-4).float().mean()) <= 0.01 * draws.solarize[row]
                seen |= {tuple(draws.order[row])} if draws.jitter[row] else set()
    assert len(seen) > 15 or recipe == "none"


def test_a_step_of_64_images_launches_at_most_400_kernels(record_property):
    config = config_of("dino", num_local_crops=8)
    generator = torch.Generator().manual_seed(0)
    crops = [
        torch.randint(0, 256, (views, 64, 3, side, side), generator=generator, dtype=torch.uint8)
        for views, side in ((2, 24), (8, 16))
    ]
    ids = torch.arange(64)
    batch = CropBatch(*crops, seeds=ids * 7919 + 13, keys=[""] * 64, sample_ids=ids, position={})
    augment = DeviceAugmentation(config)
    with DeviceCounter() as counter:
        augment(batch)
    record_property("kernels", counter.kernels.total())
    assert 100 < counter.kernels.total() <= 400
    assert not counter.waits
    with DeviceCounter() as smaller:
        augment(make_batch(size=24, batch=32))
    assert counter.kernels.total() - smaller.kernels.total() <= 10


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
    cropper.cut_(pictures, seeds, range(len(pictures)), global_crops, local_crops)
    recipe = config.resolved_augmentation
    scales = np.array([recipe.global_crop_scale] * 2 + [recipe.local_crop_scale] * 2)
    sizes = np.array([picture.shape[-2:] for picture in pictures])
    boxes = draw_boxes(np.array(seeds, dtype=np.uint64), sizes, scales, recipe)
    for index, picture in enumerate(pictures):
        for view in range(4):
            top, left, height, width, flip = boxes[index, view].tolist()[:5]
            size = [12, 12] if view < 2 else [6, 6]
            crop = reference.resized_crop(
                picture, top, left, height, width, size, InterpolationMode.BICUBIC, antialias=True
            )
            ours = global_crops[view, index] if view < 2 else local_crops[view - 2, index]
            assert torch.equal(ours, crop.flip(-1) if flip else crop)


def test_boxes_lie_inside_and_cover_the_asked_area():
    seeds = np.arange(4000, dtype=np.uint64)
    sizes = np.tile([[60, 80]], (4000, 1))
    boxes = draw_boxes(seeds, sizes, np.array([[0.2, 0.6], [0.05, 0.2]]), RECIPES["dino"])
    top, left, height, width, flip, *_ = np.moveaxis(boxes, -1, 0)
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
    boxes = draw_boxes(
        np.arange(50, dtype=np.uint64), np.tile([size], (50, 1)), np.array([[0.4, 1.0]]), RECIPES["dino"]
    )
    top, left, height, width, *_ = np.moveaxis(boxes, -1, 0)
    assert (height >= 1).all() and (width >= 1).all()
    assert (top + height <= size[0]).all() and (left + width <= size[1]).all()


def boxes_of(seeds, **augmentation):
    config = config_of("dino", augmentation=AugmentationConfig(**augmentation))
    recipe = config.resolved_augmentation
    scales = np.array([recipe.global_crop_scale, recipe.local_crop_scale])
    sizes = np.tile([[60, 80]], (len(seeds), 1))
    return draw_boxes(seeds, sizes, scales, recipe)


def test_the_crops_of_the_recipes_stay_what_they_were():
    """Drawn before there were vertical flips and turns: a seed's crops are what runs go on with after an update."""
    boxes = boxes_of(np.arange(3, dtype=np.uint64))
    assert boxes[..., :5].tolist() == [
        [[1, 7, 59, 71, 0], [9, 20, 40, 38, 0]],
        [[14, 8, 39, 50, 1], [4, 0, 35, 35, 0]],
        [[2, 3, 55, 58, 0], [9, 0, 45, 36, 1]],
    ]
    assert not boxes[..., 5:].any()
    for name in RECIPES:
        assert (RECIPES[name].vertical_flip, RECIPES[name].quarter_turns) == (0.0, 0.0)
        draws = DeviceAugmentation(config_of(name)).draw(np.arange(3, dtype=np.uint64), 1)
        assert draws.order.tolist() == [[2, 3, 0, 1], [3, 2, 1, 0], [3, 2, 1, 0]]
    draws = DeviceAugmentation(config_of("dino")).draw(np.arange(3, dtype=np.uint64), 1)
    assert np.allclose(draws.sigma, [0, 1.1758233, 0]) and draws.gray.tolist() == [False, False, True]


def test_flips_and_turns_are_drawn_apart_from_everything_else():
    seeds = np.arange(20_000, dtype=np.uint64) * np.uint64(31)
    plain = boxes_of(seeds)
    turned = boxes_of(seeds, vertical_flip=0.5, quarter_turns=0.6)
    assert np.array_equal(plain[..., :5], turned[..., :5])
    flip, vertical, turns = np.moveaxis(turned[..., 4:], -1, 0)
    assert abs(vertical.mean() - 0.5) < 0.015
    shares = np.bincount(turns.ravel(), minlength=4) / turns.size
    assert np.abs(shares - [0.4, 0.2, 0.2, 0.2]).max() < 0.015
    # Independent of each other, and of the other view's.
    pairs = ((flip, vertical), (vertical, turns > 0), (flip, turns > 0), (vertical[:, :1], vertical[:, 1:]))
    assert all(abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03 for a, b in pairs)
    always = boxes_of(seeds, quarter_turns=1.0)[..., 6]
    assert set(np.unique(always)) == {1, 2, 3}
    assert not boxes_of(seeds, flip=0.0)[..., 4].any()


@pytest.mark.parametrize("augmentation", [{"vertical_flip": 1.0}, {"quarter_turns": 1.0}, {"flip": 1.0}])
def test_flips_and_turns_move_whole_crops(augmentation):
    """Against the crop of the same seed without them, view by view."""
    picture = torch.randint(
        0, 256, (3, 40, 52), generator=torch.Generator().manual_seed(4), dtype=torch.uint8
    )
    seeds = list(range(12))
    cut = {}
    for name, options in (("without", {"flip": 0.0}), ("with", {"flip": 0.0, **augmentation})):
        config = config_of("none", augmentation=AugmentationConfig(**options))
        cut[name] = allocate_crops(config, len(seeds))
        Cropper(config).cut_([picture] * len(seeds), seeds, range(len(seeds)), *cut[name])
    for plain, moved in zip(cut["without"], cut["with"], strict=True):
        for before, after in zip(plain.flatten(0, 1), moved.flatten(0, 1), strict=True):
            if "quarter_turns" in augmentation:
                candidates = [before.rot90(k, (-2, -1)) for k in (1, 2, 3)]
            else:
                candidates = [before.flip(-2 if "vertical_flip" in augmentation else -1)]
            assert any(torch.equal(after, candidate) for candidate in candidates)


def test_options_replace_the_recipes_values_one_by_one():
    assert {f.name for f in dataclasses.fields(AugmentationConfig)} == {
        f.name for f in dataclasses.fields(Recipe)
    }
    assert config_of("carp").resolved_augmentation == RECIPES["carp"]
    changed = config_of("dino", augmentation=AugmentationConfig(global_blur=(0.0, 0.0), gray=0.0))
    assert changed.resolved_augmentation == dataclasses.replace(
        RECIPES["dino"], global_blur=(0.0, 0.0), gray=0.0
    )
    draws = DeviceAugmentation(changed).draw(np.arange(500, dtype=np.uint64), 0)
    assert not draws.sigma.any() and not draws.gray.any() and draws.jitter.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blur_sigma": (2.0, 1.0)}, "data.augmentation.blur_sigma is .*; expected smallest <= largest"),
        ({"global_crop_scale": (0.5, 0.4)}, "data.augmentation.global_crop_scale is"),
        ({"global_blur": ()}, "data.augmentation.global_blur is empty"),
    ],
)
def test_values_that_do_not_go_together_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        AugmentationConfig(**options)
    assert "\n" not in str(error.value)
