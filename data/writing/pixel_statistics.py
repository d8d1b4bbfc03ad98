"""Mean and standard deviation of every channel of a split, as `data.mean` and `data.std` want them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.config import MAX_IMAGE_PIXELS
from data.shards import DataError, Manifest, load_manifest, split_names
from data.views.config import FULL_SCALE, PixelFormat, PixelType
from data.views.kinds import ImageKind, choose_format, kind_of

_DIGITS = 6
_SMALLEST_STD = 1e-6  # that data.std takes
_OF_ALPHA = "# the last channel is transparency; with data.channels=3 (1 for grey) images are read without it"


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

    def repeat(self, channels: int) -> Moments:
        """Returns those of so many channels, as training repeats a grey one."""
        mean, squares = (np.broadcast_to(part, channels) for part in (self.mean, self.squares))
        return replace(self, mean=mean, squares=squares)

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
        by_kind: of the images that could be read, as they lie.
        as_photographs: the same of those that can be read as 8 bits in grey or RGB.
        unread: how many could not.
    """

    by_kind: dict[ImageKind, Moments] = field(default_factory=dict)
    as_photographs: dict[ImageKind, Moments] = field(default_factory=dict)
    unread: int = 0

    def add(self, other: SplitMoments) -> None:
        """Joins other images."""
        for ours, theirs in ((self.by_kind, other.by_kind), (self.as_photographs, other.as_photographs)):
            for kind, moments in theirs.items():
                own = ours.get(kind)
                ours[kind] = moments if own is None else own.join(moments)
        self.unread += other.unread

    def read_as(self, format: PixelFormat) -> Moments:
        """Returns the moments of the images that training reads with a format, as it reads them."""
        measured = self.as_photographs if format.is_photograph else self.by_kind
        return reduce(
            Moments.join,
            (m.repeat(format.channels) for kind, m in measured.items() if kind.fits(format)),
        )


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
    if not measured.by_kind:
        raise DataError(f"{directory} holds no image that can be read; expected some; pass another folder")
    format = choose_format({kind: moments.images for kind, moments in measured.by_kind.items()})
    chosen = measured.read_as(format)
    std = np.sqrt(chosen.squares / chosen.pixels)
    flat = [str(number) for number in np.flatnonzero(std < _SMALLEST_STD)]
    std = np.where(std < _SMALLEST_STD, 1.0, std)
    left_out = [f"{measured.unread} that cannot be read"] if measured.unread else []
    for kind, moments in sorted(measured.by_kind.items(), key=lambda item: -item[1].images):
        if not kind.fits(format):
            left_out.append(f"{moments.images} of {kind}, the first {moments.first}")
    alpha = any(kind.has_alpha and kind.fits(format) for kind in measured.by_kind)
    seen = f"{chosen.images:,} of {manifest.num_samples:,} images of {manifest.split}"
    return [
        f"# {'; left out: '.join([seen, *filter(None, [', '.join(left_out)])])}",
        *([_OF_ALPHA] if alpha and not format.is_photograph else []),
        *([f"# one number in all of channel {', '.join(flat)} (from 0): std is 1 there"] if flat else []),
        "data:",
        f"  channels: {format.channels}",
        f"  pixels: {format.pixels}",
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
    from data.views.decoding import BadImageError, find_image

    shard = manifest.shards[number]
    selected: Sequence[int] = range(shard.samples) if shard.ordinals is None else shard.ordinals
    if num_decoded is not None:
        selected = selected[:: max(1, len(selected) // max(1, num_decoded))]
    total = SplitMoments()
    for _, sample in ShardReader(manifest).read(number, np.asarray(selected, dtype=np.int64)):
        try:
            if isinstance(sample, Failure):
                raise BadImageError(sample.reason)
            _measure(find_image(sample, manifest.image_key), f"{shard.name}: {sample.key}", total)
        except BadImageError:
            total.unread += 1
    return total


def _measure(encoded: bytes, name: str, total: SplitMoments) -> None:
    """Adds one image, as it lies and as a photograph: training converts what can be one to what it is told."""
    from data.views.decoding import decode_any, decode_bands, decode_image

    pixels = decode_any(encoded, max_pixels=MAX_IMAGE_PIXELS)
    kind = kind_of(encoded, pixels)
    found = SplitMoments()
    if kind.is_photograph:
        photograph = decode_image(encoded, max_pixels=MAX_IMAGE_PIXELS).numpy()
        found.as_photographs[kind] = _moments(photograph, "uint8", name)
    bands = photograph if kind.is_plain else decode_bands(encoded, max_pixels=MAX_IMAGE_PIXELS)
    found.by_kind[kind] = _moments(bands, kind.pixels, name)
    total.add(found)


def _moments(bands: NDArray[Any], pixels: PixelType, name: str) -> Moments:
    values = bands.reshape(len(bands), -1) / FULL_SCALE[pixels]
    mean = values.mean(axis=1, dtype=np.float64)
    squares = np.square(values - mean[:, None]).sum(axis=1, dtype=np.float64)
    return Moments(1, values.shape[1], mean, squares, name)


def _as_yaml(values: NDArray[np.float64]) -> str:
    return f"[{', '.join(f'{value:.{_DIGITS}g}' for value in values)}]"
