"""Scikit-learn's 1,797 handwritten digits: real images that come with a package, small enough for any machine.

Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits" (UCI), test part; 8 x 8 grey, 17 levels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.shards import DataError
from data.writing.sources import ArraySource

SIDE = 28
# Every fifth of a fixed permutation is for the test: 1,437 + 360 images.
_TEST_EVERY = 5
_LARGEST_LEVEL = 16


def open_digits(split: str) -> ArraySource:
    """Returns the images of the split `train` or `test`, enlarged to 28 x 28.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "scikit-learn is not installed; expected it, for its images; pip install scikit-learn"
        ) from None
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    is_test = np.arange(len(order)) % _TEST_EVERY == 0
    chosen = order[is_test if split == "test" else ~is_test]
    grey = (digits.images[chosen] * (255 / _LARGEST_LEVEL)).astype(np.uint8)
    return ArraySource(
        np.stack([_enlarge(image) for image in grey]),
        digits.target[chosen],
        classes=[str(digit) for digit in range(10)],
        split=split,
        fingerprint=f"scikit-learn digits, {split}, side {SIDE}",
        numbers=chosen,
    )


def _enlarge(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
