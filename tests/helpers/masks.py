"""Figures of many masks, computed alike for ours and for those of other projects' code."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def describe(masks: NDArray[np.bool_]) -> dict[str, tuple[float, float]]:
    """Returns mean and standard deviation over masks [n, side, side] of figures of each mask.

    `masked` whether anything is hidden; the others of masked ones alone: `share` of the hidden patches and its square;
    `area` and `log_aspect`, of the box around what is hidden or, where that reaches all borders, around what is seen,
    rolled into the middle; `border`, the share of hidden patches among those of the border; `edges`, neighbours of
    which one is hidden, by patches.
    """
    masked = masks.any((1, 2))
    chosen = masks[masked]
    share = chosen.mean((1, 2))
    boxes = np.array([_find_box(mask) for mask in chosen])
    rim = np.ones(masks.shape[1:], dtype=bool)
    rim[1:-1, 1:-1] = False
    edges = (chosen[:, 1:] ^ chosen[:, :-1]).sum((1, 2)) + (chosen[:, :, 1:] ^ chosen[:, :, :-1]).sum((1, 2))
    figures = {
        "masked": masked,
        "share": share,
        "share_squared": share**2,
        "area": boxes.prod(1) / masks[0].size,
        "log_aspect": np.log(boxes[:, 0] / boxes[:, 1]),
        "log_aspect_size": np.abs(np.log(boxes[:, 0] / boxes[:, 1])),
        "border": chosen[:, rim].mean(1),
        "edges": edges / masks[0].size,
    }
    return {name: (float(values.mean()), float(values.std())) for name, values in figures.items()}


def _find_box(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Returns the numbers of rows and of columns with hidden patches; with seen ones, where those are all."""
    lengths = mask.any(1).sum(), mask.any(0).sum()
    if min(lengths) == len(mask):
        lengths = (~mask).any(1).sum(), (~mask).any(0).sum()
    return int(lengths[0]), int(lengths[1])
