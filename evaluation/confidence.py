"""How sure a figure is: percentile bootstrap over test images, paired where two encoders saw the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# Resamples drawn at once: bounds memory at 64 x images indices.
_CHUNK = 64


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its interval."""

    value: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """Returns [low, high] for a results file."""
        return [self.low, self.high]


def bootstrap(
    values: Float[np.ndarray, " B"] | Bool[np.ndarray, " B"], *, resamples: int, level: float, seed: int
) -> Interval:
    """Returns the mean of `values` over images with its percentile bootstrap interval.

    Args:
        values: one number for each image, e.g. whether it was classified rightly, or the difference of two such.
        resamples: bootstrap resamples.
        level: of the interval, 0..1.
        seed: of the resampling; the same seed pairs the resamples of two calls.
    """
    numbers = np.asarray(values, dtype=np.float64)

    def mean_of(index: np.ndarray) -> np.ndarray:
        return numbers[index].mean(axis=1)

    return bootstrap_statistic(
        mean_of, len(numbers), float(numbers.mean()), resamples=resamples, level=level, seed=seed
    )


def bootstrap_statistic(
    statistic: Callable[[np.ndarray], np.ndarray],
    num_images: int,
    value: float,
    *,
    resamples: int,
    level: float,
    seed: int,
) -> Interval:
    """Returns the percentile bootstrap interval of any statistic of images.

    Args:
        statistic: image indices [resamples, images] to one number for each resample.
        num_images: how many images there are.
        value: the statistic of the images themselves.
        resamples: bootstrap resamples.
        level: of the interval.
        seed: of the resampling.
    """
    drawn = [statistic(index) for index in _draw_resamples(num_images, resamples, seed)]
    tail = (1.0 - level) / 2.0
    low, high = np.nanquantile(np.concatenate(drawn), [tail, 1.0 - tail])
    return Interval(value=value, low=float(low), high=float(high))


def draw_weights(num_images: int, *, resamples: int, seed: int) -> Float[np.ndarray, "R B"]:
    """Returns how often each image occurs in every resample: a weighted sum over images is the resample's sum.

    For statistics of sums, such as an intersection over a union. The images are those that `bootstrap` draws.
    """
    drawn = [
        np.bincount(row, minlength=num_images)
        for index in _draw_resamples(num_images, resamples, seed)
        for row in index
    ]
    return np.stack(drawn).astype(np.float64)


def _draw_resamples(num_images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields image indices [n, images] of a few resamples at a time, `resamples` in all."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        yield generator.integers(num_images, size=(min(_CHUNK, resamples - start), num_images))
