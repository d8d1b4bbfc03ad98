"""Which patches of a global crop are hidden from the student: blocks (BEiT, iBOT, DINOv2), all but a block (CAPI).

A mask is a pure function of its sample's augmentation seed, so of (seed, epoch, sample), and of its view: the same for
any number of ranks and workers, and drawn again by a run that goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.config import DataConfig, MaskConfig
from data.views.random_numbers import draw_permutation, draw_uniforms, hash_key

# Beside those of `cropping` and `augmentations`.
_MASK_PURPOSE = 2
_NUM_TRIES = 10
# What is drawn under a crop's key; its blocks are numbered from the last one on.
_WHETHER, _PREDICTED, _FIRST_BLOCK = range(3)

Mask = NDArray[np.bool_]
Grid = tuple[int, int]  # rows and columns of patches


@dataclass(frozen=True)
class Masks:
    """The masks of n samples.

    Attributes:
        hidden: bool [V_g, n, N], the patches that the student does not see, row by row of the crop's grid.
        predicted: bool [V_g, n, N], those of them that are predicted.
    """

    hidden: Tensor
    predicted: Tensor


def draw_masks(config: DataConfig, seeds: Sequence[int]) -> Masks | None:
    """Returns the masks of samples' global crops by `config.masks`; None where none are asked for.

    Args:
        config: with the masks' options and the crops' number and size.
        seeds: the samples' augmentation seeds.
    """
    options = config.masks
    if options.kind == "none":
        return None
    grid = config.mask_grid
    hidden = np.zeros((config.num_global_crops, len(seeds), *grid), dtype=bool)
    predicted = np.zeros_like(hidden)
    for index, seed in enumerate(seeds):
        for view in range(config.num_global_crops):
            key = hash_key(seed, _MASK_PURPOSE, view)
            hidden[view, index] = draw_mask(options, key, grid)
            predicted[view, index] = draw_predicted(options, key, hidden[view, index])
    return Masks(*(torch.from_numpy(part).flatten(2) for part in (hidden, predicted)))


def join_masks(parts: Sequence[Masks | None], rows: Sequence[Sequence[int]]) -> Masks | None:
    """Returns the masks of a micro-batch whose parts' samples have the places `rows`; None where parts have none."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    order = torch.argsort(torch.tensor([row for part in rows for row in part]))
    hidden = torch.cat([part.hidden for part in given], dim=1)[:, order]
    predicted = torch.cat([part.predicted for part in given], dim=1)[:, order]
    return Masks(hidden, predicted)


def draw_mask(options: MaskConfig, key: int, grid: Grid) -> Mask:
    """Returns one crop's hidden patches, bool [rows, columns] of the grid.

    A part `crops` of all crops is masked, by a draw for each crop and not by a count for each batch as in DINOv2: a
    crop's mask must not depend on its neighbours. The hidden share is uniform in `ratio`, for which DINOv2 deals a
    batch's crops out evenly over that range.
    """
    whether, share = draw_uniforms(_key_of(key, _WHETHER), 2).tolist()
    if whether >= options.resolved_crops:
        return np.zeros(grid, dtype=bool)
    low, high = options.resolved_ratio
    num_hidden = int(grid[0] * grid[1] * (low + (high - low) * share))
    draw = draw_blocks if options.kind == "block" else draw_inverse_block
    return draw(options, key, grid, num_hidden)


def draw_blocks(options: MaskConfig, key: int, grid: Grid, num_hidden: float) -> Mask:
    """Returns a union of rectangles of at most `num_hidden` patches, and mostly a few fewer.

    Rectangles are added one after the other, each of an area uniform between `min_patches` and what is missing (half of
    the grid at most) and of a log-uniform aspect ratio. One that does not fit into the grid, adds nothing or adds too
    much is drawn again, ten times at most, whereupon the mask is done: BEiT (Bao et al. 2022), algorithm 1, as iBOT
    (least area (side / 3)^2, a fraction of a patch too many allowed) and DINOv2 (4 patches, whole ones) have it. A
    rectangle is lower and narrower than the grid, as theirs, unless that has two rows or columns: of single rows the
    usual aspect ratios hide a fifth of what is asked for.
    """
    mask = np.zeros(grid, dtype=bool)
    number, missing = 0, num_hidden
    while missing > 0:
        added = _add_block_(mask, options, _key_of(key, _FIRST_BLOCK + number), missing)
        if added == 0:
            break
        missing -= added
        number += 1
    return mask


def _add_block_(mask: Mask, options: MaskConfig, key: NDArray[np.uint64], missing: float) -> int:
    """Hides one more rectangle, in place; returns by how many patches the mask grew, 0 where no try would do."""
    rows, columns = mask.shape
    largest = min(missing, mask.size // 2)
    low, high = (math.log(aspect) for aspect in options.resolved_aspect)
    tries = draw_uniforms(key, 4 * _NUM_TRIES).reshape(_NUM_TRIES, 4)
    areas = options.min_patches + (largest - options.min_patches) * tries[:, 0]
    ratios = np.exp(low + (high - low) * tries[:, 1])
    heights = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    widths = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    tops = (tries[:, 2] * (rows - heights + 1)).astype(np.int64)
    lefts = (tries[:, 3] * (columns - widths + 1)).astype(np.int64)
    room = int(min(rows, columns) == 2)
    fits = (heights < rows + room) & (widths < columns + room)
    for index in np.flatnonzero(fits):
        top, left, height, width = tops[index], lefts[index], heights[index], widths[index]
        block = mask[top : top + height, left : left + width]
        added = block.size - int(block.sum())
        if 0 < added <= largest:
            block[:] = True
            return added
    return 0


def draw_inverse_block(options: MaskConfig, key: int, grid: Grid, num_hidden: int) -> Mask:
    """Returns exactly `num_hidden` patches: all but a rectangle that lies anywhere on the torus.

    The rectangle's aspect ratio is log-uniform within what fits into the grid; its last row may be incomplete. Rolled
    over the borders, every patch is as likely to be hidden as any other; CAPI (Darcet et al. 2025), section 3 and its
    code.
    """
    num_rows, num_columns = grid
    num_seen = num_rows * num_columns - num_hidden
    mask = np.ones(grid, dtype=bool)
    if num_seen == 0:
        return mask
    numbers = draw_uniforms(_key_of(key, _FIRST_BLOCK), 5)
    # Height by width with which the rectangle is as wide, or as high, as the grid.
    bounds = (-math.log(num_columns**2 / num_seen), math.log(num_rows**2 / num_seen))
    low, high = (min(max(math.log(aspect), bounds[0]), bounds[1]) for aspect in options.resolved_aspect)
    ratio = math.exp(low + (high - low) * numbers[0])
    # Rounding may put a length that is the grid's a little above it.
    height = min(num_rows, math.ceil(math.sqrt(num_seen * ratio)))
    width = min(num_columns, math.ceil(math.sqrt(num_seen * (1 / ratio))))
    top, left = int(numbers[1] * (num_rows - height + 1)), int(numbers[2] * (num_columns - width + 1))
    down, right = int(numbers[3] * num_rows), int(numbers[4] * num_columns)
    rows, columns = np.divmod(np.arange(num_seen), width)
    mask[(top + down + rows) % num_rows, (left + right + columns) % num_columns] = False
    return mask


def draw_predicted(options: MaskConfig, key: int, hidden: Mask) -> Mask:
    """Returns the part `predicted` of the hidden patches, drawn without replacement; one at least of any."""
    if options.resolved_predicted == 1:
        return hidden
    places = np.flatnonzero(hidden)
    number = min(len(places), max(1, int(len(places) * options.resolved_predicted)))
    predicted = np.zeros(hidden.size, dtype=bool)
    predicted[places[draw_permutation(hash_key(key, _PREDICTED), len(places))[:number]]] = True
    return predicted.reshape(hidden.shape)


def _key_of(key: int, purpose: int) -> NDArray[np.uint64]:
    return np.array(hash_key(key, purpose), dtype=np.uint64)
