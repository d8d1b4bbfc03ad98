"""Mean and standard deviation of every channel of a split, as `data.mean` and `data.std` want them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.config import MAX_IMAGE_PIXELS
from data.shards import DataError, Manifest, load_manifest, split_names
from data.views.config import FULL_SCALE, PixelType

# Channels of an image and the type of its numbers, by the name that `data.pixels` has for it.
Kind = tuple[int, PixelType]
_DIGITS = 6
_SMALLEST_STD = 1e-6  # that data.std takes


@dataclass
class Moments:
    """Sums over pixels of one kind of images, float64 [C]: mean and squared deviations from it, in the divided unit.

    Chan, Golub & LeVeque 1983: parts are joined without the cancellation of sums of squares.
    """

    images: int
    pixels: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]
    first: str

    def join(self, other: Moments) -> Moments:
        """Returns both as one."""
        pixels = self.pixels + other.pixels
        step = other.mean - self.mean
        return Moments(
            self.images + other.images,
            pixels,
            self.mean + step * (other.pixels / pixels),
            self.squares + other.squares + step**2 * (self.pixels * other.pixels / pixels),
            self.first,
        )


@dataclass
class SplitMoments:
    """What was measured of a split.

    Attributes:
        by_kind: of the images that could be read.
        unread: how many could not.
    """

    by_kind: dict[Kind, Moments] = field(default_factory=dict)
    unread: int = 0

    def add(self, other: SplitMoments) -> None:
        """Joins other images."""
        for kind, moments in other.by_kind.items():
            own = self.by_kind.get(kind)
            self.by_kind[kind] = moments if own is None else own.join(moments)
        self.unread += other.unread


def describe_statistics(directory: str, *, num_decoded: int | None, num_processes: int = 1) -> list[str]:
    """Returns lines of YAML with the channels, type, mean and deviation of a folder's images.

    They are those of the split `train`, else of the first one.

    Args:
        directory: of the shards.
        num_decoded: images of each shard, evenly spread; None for all.
        num_processes: that read.

    Raises:
        DataError: no manifest, or no image that can be read.
    """
    names = split_names(directory)
    manifest = load_manifest(directory, "train" if "train" in names else names[0])
    measured = measure_split(manifest, num_decoded=num_decoded, num_processes=num_processes)
    gray, colour = ((1, "uint8"), (3, "uint8"))
    if gray in measured.by_kind and colour in measured.by_kind:  # grey images among RGB are read as RGB
        of_gray = measured.by_kind.pop(gray)
        of_gray.mean, of_gray.squares = of_gray.mean.repeat(3), of_gray.squares.repeat(3)
        measured.by_kind[colour] = measured.by_kind[colour].join(of_gray)
    if not measured.by_kind:
        raise DataError(f"{directory} holds no image that can be read; expected some; pass another folder")
    kinds = sorted(measured.by_kind, key=lambda kind: -measured.by_kind[kind].images)
    (channels, pixels), *others = kinds
    chosen = measured.by_kind[kinds[0]]
    std = np.sqrt(chosen.squares / chosen.pixels)
    flat = [str(number) for number in np.flatnonzero(std < _SMALLEST_STD)]
    std = np.where(std < _SMALLEST_STD, 1.0, std)
    left_out = [f"{measured.unread} that cannot be read"] if measured.unread else []
    for kind in others:
        moments = measured.by_kind[kind]
        left_out.append(f"{moments.images} of {kind[0]} x {kind[1]}, the first {moments.first}")
    seen = f"{chosen.images:,} of {manifest.num_samples:,} images of {manifest.split}"
    return [
        f"# {'; left out: '.join([seen, *filter(None, [', '.join(left_out)])])}",
        *([f"# one number in all of channel {', '.join(flat)} (from 0): std is 1 there"] if flat else []),
        "data:",
        f"  channels: {channels}",
        f"  pixels: {pixels}",
        f"  mean: {_as_yaml(chosen.mean)}",
        f"  std: {_as_yaml(std)}",
    ]


def measure_split(manifest: Manifest, *, num_decoded: int | None, num_processes: int = 1) -> SplitMoments:
    """Returns the moments of a split's images by kind; see `describe_statistics`."""
    total = SplitMoments()
    numbers = [number for number, shard in enumerate(manifest.shards) if shard.num_selected]
    measure = partial(_measure_shard, manifest, num_decoded)
    if num_processes <= 1 or len(numbers) <= 1:
        _join(total, map(measure, numbers))
        return total
    with ProcessPoolExecutor(min(num_processes, len(numbers))) as pool:
        _join(total, pool.map(measure, numbers))
    return total


def _join(total: SplitMoments, parts: Iterable[SplitMoments]) -> None:
    for part in parts:
        total.add(part)


def _measure_shard(manifest: Manifest, num_decoded: int | None, number: int) -> SplitMoments:
    # Here, so that the program answers --help without torch.
    from data.stream.reader import Failure, ShardReader
    from data.views.decoding import BadImageError, decode_bands, find_image

    shard = manifest.shards[number]
    selected: Sequence[int] = range(shard.samples) if shard.ordinals is None else shard.ordinals
    if num_decoded is not None:
        selected = selected[:: max(1, len(selected) // max(1, num_decoded))]
    total = SplitMoments()
    for _, sample in ShardReader(manifest).read(number, np.asarray(selected, dtype=np.int64)):
        try:
            if isinstance(sample, Failure):
                raise BadImageError(sample.reason)
            bands = decode_bands(find_image(sample, manifest.image_key), max_pixels=MAX_IMAGE_PIXELS)
            with np.errstate(over="ignore"):  # as training refuses what float32 cannot hold
                if not np.isfinite(bands.astype(np.float32)).all():
                    raise BadImageError("values that are not finite")
        except BadImageError:
            total.unread += 1
            continue
        total.add(SplitMoments(dict([_measure(bands, f"{shard.name}: {sample.key}")])))
    return total


def _measure(bands: NDArray[Any], name: str) -> tuple[Kind, Moments]:
    pixels: PixelType = "float32"
    if bands.dtype == np.uint8:
        pixels = "uint8"
    elif bands.dtype == np.uint16:
        pixels = "uint16"
    values = bands.reshape(len(bands), -1) / FULL_SCALE[pixels]
    mean = values.mean(axis=1, dtype=np.float64)
    squares = np.square(values - mean[:, None]).sum(axis=1, dtype=np.float64)
    return (len(bands), pixels), Moments(1, values.shape[1], mean, squares, name)


def _as_yaml(values: NDArray[np.float64]) -> str:
    return f"[{', '.join(f'{value:.{_DIGITS}g}' for value in values)}]"
