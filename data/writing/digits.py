"""Scikit-learn's 1,797 handwritten digits: real images that come with a package, small enough for any machine.

Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits" (UCI), test part; 8 x 8 grey, 17 levels.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from data.shards import DataError
from data.writing.sources import ImageSource, SourceSample

SIDE = 28
# Every fifth of a fixed permutation is for the test: 1,437 + 360 images.
_TEST_EVERY = 5
_LARGEST_LEVEL = 16


class DigitsSource(ImageSource):
    """One split's images, enlarged to 28 x 28, as lossless PNG.

    Args:
        split: `train` or `test`.

    Raises:
        DataError: scikit-learn is not installed.
    """

    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, split: str) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise DataError(
                "scikit-learn is not installed; expected it, for its images; pip install scikit-learn"
            ) from None
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        is_test = np.arange(len(order)) % _TEST_EVERY == 0
        self.split = split
        self._chosen = order[is_test if split == "test" else ~is_test]
        self._images, self._labels = digits.images, digits.target
        self.fingerprint = f"scikit-learn digits, {split}, side {SIDE}"

    def __len__(self) -> int:
        return len(self._chosen)

    def size(self, index: int) -> int:
        """Returns the uncompressed size, which the PNG hardly ever exceeds."""
        return SIDE * SIDE

    def load(self, index: int) -> SourceSample:
        """Returns one image and its label."""
        number = int(self._chosen[index])
        grey = (self._images[number] * (255 / _LARGEST_LEVEL)).astype(np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(encoded, format="PNG")
        return SourceSample(
            f"{self.split}-{number:05d}", {"png": encoded.getvalue()}, int(self._labels[number])
        )
