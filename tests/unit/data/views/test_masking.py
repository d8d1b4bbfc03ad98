"""Masks: pure functions of seed and view, in the shapes and with the figures of those whose methods they are."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from data.config import DataConfig, MaskConfig
from data.views.masking import draw_blocks, draw_inverse_block, draw_mask, draw_masks, draw_predicted
from data.views.random_numbers import draw_uniforms
from tests.helpers.masks import describe

BLOCK = MaskConfig(kind="block", patch_size=4)
INVERSE = MaskConfig(kind="inverse_block", patch_size=4)


def make_config(masks, **changes):
    return DataConfig(shards="nowhere", global_crop_size=32, masks=masks, **changes)


# Mean and standard deviation of 20,000 masks of the originals, each method's own code run once, seed 0, CPU:
# facebookresearch/dinov2@b8931f7bf91576930313be2c6d6af376033b35f0 dinov2/data/masking.py (MaskingGenerator with
#   max_num_patches half of the grid), called as dinov2/data/collate.py does for the masked half of 128 crops;
# bytedance/ibot@da316d82636a7a7356835ef224b13d5f3ace0489 loader.py (ImageFolderMask.__getitem__, pred_ratio 0 .3,
#   pred_ratio_var 0 .2), masked crops alone (9,896 and 9,987);
# facebookresearch/capi@98b4fa17ee8eec8810c17022df9a27a44845368b data.py (InverseBlockMasking with roll), share .65.
# fmt: off
ORIGINALS = {
    ("dinov2", 14): {"share": (0.29710, 0.11544), "share_squared": (0.10159, 0.06962), "area": (0.53137, 0.20061), "log_aspect": (-0.00068, 0.31637), "log_aspect_size": (0.24047, 0.20559), "border": (0.12160, 0.09652), "edges": (0.21757, 0.05545)},  # noqa: E501
    ("dinov2", 8): {"share": (0.29139, 0.11559), "share_squared": (0.09827, 0.06833), "area": (0.47171, 0.20875), "log_aspect": (0.00189, 0.38682), "log_aspect_size": (0.29419, 0.25116), "border": (0.17245, 0.11371), "edges": (0.30102, 0.08407)},  # noqa: E501
    ("ibot", 14): {"share": (0.29300, 0.11685), "share_squared": (0.09950, 0.06947), "area": (0.42942, 0.20019), "log_aspect": (0.00539, 0.41665), "log_aspect_size": (0.32443, 0.26148), "border": (0.10774, 0.09746), "edges": (0.17203, 0.05076)},  # noqa: E501
    ("ibot", 8): {"share": (0.29041, 0.11539), "share_squared": (0.09765, 0.06823), "area": (0.45652, 0.20828), "log_aspect": (0.00161, 0.40438), "log_aspect_size": (0.31098, 0.25849), "border": (0.16909, 0.11378), "edges": (0.29304, 0.08569)},  # noqa: E501
    ("capi", 14): {"share": (0.64796, 0.0), "share_squared": (0.41985, 0.0), "area": (0.36710, 0.01140), "log_aspect": (-0.08133, 0.36852), "log_aspect_size": (0.32729, 0.18787), "border": (0.64699, 0.17891), "edges": (0.16339, 0.02086)},  # noqa: E501
    ("capi", 8): {"share": (0.64062, 0.0), "share_squared": (0.41040, 0.0), "area": (0.39107, 0.02264), "log_aspect": (-0.10901, 0.35562), "log_aspect_size": (0.30347, 0.21507), "border": (0.63900, 0.15690), "edges": (0.27858, 0.04436)},  # noqa: E501
}
# fmt: on
NUM_DRAWN = 4000


def draw_like(method, side):
    """As the recipe of a method draws them; iBOT's number of hidden patches is no whole one."""
    if method == "ibot":
        options = dataclasses.replace(BLOCK, min_patches=(side // 3) ** 2)
        shares = 0.1 + 0.4 * draw_uniforms(np.array(0, dtype=np.uint64), NUM_DRAWN)
        return [
            draw_blocks(options, key, (side, side), side * side * share) for key, share in enumerate(shares)
        ]
    options = dataclasses.replace(BLOCK, crops=1.0) if method == "dinov2" else INVERSE
    return [draw_mask(options, key, (side, side)) for key in range(NUM_DRAWN)]


@pytest.mark.parametrize(("method", "side"), ORIGINALS)
def test_figures_are_the_originals_within_sampling_error(method, side, record_property):
    """Five standard errors of a difference of means, for 42 of them; the seeds are fixed."""
    found, other = describe(np.array(draw_like(method, side))), ORIGINALS[method, side]
    assert found.pop("masked")[0] == 1
    num_other = 9896 if method == "ibot" else 20000
    for name, (mean, deviation) in found.items():
        expected, other_deviation = other[name]
        error = math.sqrt(deviation**2 / NUM_DRAWN + other_deviation**2 / num_other)
        record_property(f"{name}, standard errors", (mean - expected) / max(error, 1e-4))
        assert abs(mean - expected) <= 5 * error + 1e-5, (name, mean, expected, error)


def test_a_mask_is_a_function_of_its_samples_seed_and_its_view():
    config = make_config(dataclasses.replace(BLOCK, crops=1.0, predicted=0.5))
    seeds = list(range(5, 45))
    whole = draw_masks(config, seeds)
    assert whole.hidden.shape == whole.predicted.shape == (2, 40, 64)
    assert whole.hidden.dtype == whole.predicted.dtype == torch.bool
    for index, seed in enumerate(seeds[:5]):
        alone = draw_masks(config, [seed])
        assert torch.equal(alone.hidden[:, 0], whole.hidden[:, index])
        assert torch.equal(alone.predicted[:, 0], whole.predicted[:, index])
    rows = whole.hidden.flatten(0, 1)
    assert len(torch.unique(rows, dim=0)) > 70
    # Views are drawn apart from each other: they agree as two samples do.
    views, samples = (whole.hidden[0] == whole.hidden[1]), (whole.hidden[0] == whole.hidden[0].roll(1, 0))
    assert abs(float(views.float().mean() - samples.float().mean())) < 0.05


def test_no_masks_where_none_are_asked_for():
    assert draw_masks(make_config(MaskConfig()), [1, 2]) is None


def test_a_share_of_the_crops_is_masked_whatever_the_other_options():
    few = draw_masks(make_config(dataclasses.replace(BLOCK, crops=0.25)), range(400)).hidden.any(-1)
    assert 0.2 < float(few.float().mean()) < 0.3
    more = draw_masks(make_config(dataclasses.replace(BLOCK, crops=0.75)), range(400)).hidden.any(-1)
    assert bool((more >= few).all())
    assert not draw_masks(make_config(dataclasses.replace(BLOCK, crops=0.0)), range(40)).hidden.any()


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 14, 37])
def test_blocks_hide_no_more_than_asked_for_and_end(side):
    for key in range(60):
        number = int(side * side * (key % 12) / 12)
        mask = draw_blocks(BLOCK, key, (side, side), number)
        assert mask.shape == (side, side) and mask.sum() <= number


@pytest.mark.parametrize("grid", [(2, 2), (2, 3), (2, 6), (2, 14), (14, 2), (3, 14), (4, 6)])
def test_blocks_of_a_low_grid_hide_what_is_asked_for(grid):
    options = MaskConfig(kind="block", crops=1.0, ratio=(0.5, 0.5))
    shares = [draw_mask(options, key, grid).mean() for key in range(300)]
    assert np.mean(shares) > 0.9 * 0.5 and max(shares) <= 0.5


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 14, 37])
@pytest.mark.parametrize("aspect", [(0.5, 2.0), (0.01, 0.02), (3.0, 100.0)])
def test_inverse_blocks_hide_exactly_what_is_asked_for_around_one_rectangle(side, aspect):
    options = dataclasses.replace(INVERSE, aspect=aspect)
    for key in range(60):
        number = int(side * side * (key % 13) / 12)
        mask = draw_inverse_block(options, key, (side, side), number)
        assert mask.sum() == number
        if 0 < number < side * side:
            seen = ~mask
            # On the torus, the rows of a rectangle are one run, and so are its columns.
            for lines in (seen.any(1), seen.any(0)):
                assert (lines & ~np.roll(lines, 1)).sum() <= 1


def test_every_patch_is_as_likely_to_be_hidden_by_an_inverse_block():
    shares = np.mean([draw_mask(INVERSE, key, (8, 8)) for key in range(4000)], axis=0)
    assert np.abs(shares - 41 / 64).max() < 5 * math.sqrt(0.65 * 0.35 / 4000)


def test_a_part_of_the_hidden_patches_is_predicted():
    mask = draw_mask(INVERSE, 3, (14, 14))
    assert mask.sum() == 127
    counts = np.zeros((14, 14))
    for key in range(500):
        predicted = draw_predicted(INVERSE, key, mask)
        assert predicted.sum() == 6 and not (predicted & ~mask).any()  # int(.05 * 127), as CAPI
        counts += predicted
    assert counts[mask].min() > 5 and counts[mask].max() < 50
    assert draw_predicted(BLOCK, 0, mask) is mask
    one = np.zeros((14, 14), dtype=bool)
    assert not draw_predicted(INVERSE, 0, one).any()
    one[3, 3] = True
    assert draw_predicted(INVERSE, 0, one).sum() == 1


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (lambda: MaskConfig(kind="block", ratio=(0.5, 0.1)), r"masks\.ratio is \(0\.5, 0\.1\); expected smallest"),
        (lambda: MaskConfig(kind="inverse_block", ratio=(0.5, 0.6)), r"data\.masks\.ratio .* one number, twice"),
        (lambda: make_config(dataclasses.replace(BLOCK, patch_size=14)), r"crop_size is 32; .*patch_size \(14\)"),
        (lambda: make_config(dataclasses.replace(BLOCK, patch_size=32)), r"crop_size is 32; .* 2 x 2 patches and more"),
        (lambda: DataConfig(shards="x", masks=BLOCK, global_crop_size=(4, 64)), r"of 1 x 16 none is ever hidden"),
        (lambda: make_config(dataclasses.replace(INVERSE, patch_size=32)), r"more patches: of 1 x 1 none is"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        masks()
