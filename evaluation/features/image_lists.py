"""Images by number, out of a folder or out of shards, in batches that a loader's processes prepare."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.config import MAX_IMAGE_PIXELS, DataConfig
from data.datasets import iterate_samples
from data.local_errors import raise_if_local
from data.members import readable
from data.shards import MANIFEST_NAME, DataError, check_shard_files
from data.stream.reader import Failure, ShardReader
from data.stream.remote import is_remote, open_shards
from data.stream.workers import start_worker
from data.views.decoding import BadImageError, find_image
from data.views.pictures import decode_picture
from data.writing.folder_walk import walk_images
from evaluation.encoders.preprocessing import PictureTransform

if TYPE_CHECKING:
    from jaxtyping import Float

Encoded = bytes | BadImageError


class FolderImages:
    """The images under a folder, sorted by path; names are paths that open from the same place.

    Attributes:
        fingerprint: a hash that changes with the images and with their order.
        passed_over: what else lies there, a line for each reason.

    Raises:
        DataError: no such folder, or no image in it.
    """

    def __init__(self, root: str) -> None:
        found, passed = walk_images(root)
        self.passed_over = passed.lines()
        if not found:
            seen = f" ({'; '.join(self.passed_over)})" if self.passed_over else ""
            raise DataError(
                f"IMAGES is {root!r}, which holds no image{seen}; expected a folder of images, or shards with "
                f"{MANIFEST_NAME}; pass another"
            )
        self._paths = [path for path, _ in found]
        digest = hashlib.sha256()
        for path in self._paths:
            state = path.stat()
            described = f"{path.relative_to(root)}\0{state.st_size}\0{state.st_mtime_ns}\n"
            digest.update(described.encode("utf-8", "surrogateescape"))
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, start: int, stop: int) -> Iterator[tuple[str, Encoded]]:
        """Yields path and bytes of images [start, stop)."""
        for path in self._paths[start:stop]:
            name = readable(str(path))
            try:
                yield name, path.read_bytes()
            except OSError as error:
                raise_if_local(error, name)
                yield name, BadImageError(error.strerror or type(error).__name__)


class ShardImages:
    """The images of a split of shards in the manifest's order; names are `SHARD.tar/KEY`.

    Raises:
        DataError: no such shards or split, or shards of another size than the manifest says.
    """

    def __init__(self, address: str, split: str) -> None:
        self.passed_over: list[str] = []
        self._manifest, self._cache = open_shards(DataConfig(shards=address, split=split))
        if self._cache is None:
            check_shard_files(self._manifest)
        self.fingerprint = self._manifest.hash
        self._first_ids = self._manifest.first_ids
        self._reader: ShardReader | None = None

    def __len__(self) -> int:
        return self._manifest.num_samples

    def read(self, start: int, stop: int) -> Iterator[tuple[str, Encoded]]:
        """Yields name and bytes of samples [start, stop)."""
        if self._reader is None:  # made where it reads: open files do not survive a fork
            self._reader = ShardReader(self._manifest, cache=self._cache)
        for sample_id, sample in iterate_samples(self._reader, start, stop):
            index = bisect_right(self._first_ids, sample_id) - 1
            shard = self._manifest.shards[index].name
            if isinstance(sample, Failure):
                yield sample.name, BadImageError(sample.reason)
                continue
            name = f"{shard}/{sample.key}"
            try:
                yield name, find_image(sample, self._manifest.image_key)
            except BadImageError as error:
                yield name, error


ImageList = FolderImages | ShardImages


def open_images(images: str, split: str) -> ImageList:
    """Returns the images of a folder, or of one split of a folder or address of shards."""
    has_manifest = (Path(images) / MANIFEST_NAME).is_file()
    return ShardImages(images, split) if has_manifest or is_remote(images) else FolderImages(images)


@dataclass
class ImageBatch:
    """Some images of one part.

    Attributes:
        part: its number.
        images: preprocessed, those that could be decoded.
        names: of those.
        bad: name and reason of the others.
    """

    part: int
    images: Float[Tensor, "B C H W"]
    names: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)


class _Batches(Dataset):
    """Batch number i; a batch lies in one part."""

    def __init__(
        self,
        images: ImageList,
        transform: PictureTransform,
        bounds: Sequence[tuple[int, int, int]],
    ) -> None:
        self.images, self.transform, self.bounds = images, transform, bounds

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> ImageBatch | DataError:
        part, start, stop = self.bounds[index]
        batch, tensors = ImageBatch(part, torch.empty(0)), []
        try:
            for name, encoded in self.images.read(start, stop):
                try:
                    if isinstance(encoded, BadImageError):
                        raise encoded
                    format = self.transform.format
                    tensors.append(
                        self.transform(decode_picture(encoded, format, max_pixels=MAX_IMAGE_PIXELS))
                    )
                    batch.names.append(name)
                except BadImageError as error:
                    batch.bad.append((name, str(error)))
        except DataError as error:
            return error  # as a value: raised in a worker process it would arrive with a traceback for its message
        if tensors:
            batch.images = torch.stack(tensors)
        return batch


def iterate_batches(
    images: ImageList,
    transform: PictureTransform,
    parts: Sequence[int],
    *,
    part_images: int,
    batch_size: int,
    num_workers: int,
) -> Iterator[ImageBatch]:
    """Yields the batches of some parts in order; part p holds images [p * part_images, (p + 1) * part_images).

    Raises:
        DataError: this machine does not let the images be read.
    """
    bounds = []
    for part in parts:
        end = min((part + 1) * part_images, len(images))
        bounds += [
            (part, start, min(start + batch_size, end))
            for start in range(part * part_images, end, batch_size)
        ]
    loader = DataLoader(
        _Batches(images, transform, bounds),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=start_worker if num_workers else None,
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch
