"""Finite, labelled streams for evaluation, and what is known of a split's classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.config import MAX_IMAGE_PIXELS, DataConfig
from data.members import LABEL_MAP_SUFFIX, EncodedSample
from data.shards import DataError, Manifest, check_shard_files, load_manifest
from data.stream.reader import Failure, ShardReader
from data.stream.remote import ShardCache, open_shards
from data.stream.workers import start_worker
from data.views.config import PixelFormat
from data.views.decoding import BadImageError, decode_label_map, find_image
from data.views.pictures import RGB, Picture, decode_picture
from data.writing.labels import number_classes, number_label, read_label

__all__ = [
    "DataError",
    "DenseTransform",
    "EvaluationStream",
    "Manifest",
    "iterate_samples",
    "load_manifest",
    "require_same_classes",
]

# Picture and its label map to float tensor [C, H, W] and class indices uint8 [H', W'].
DenseTransform = Callable[[Picture, Image.Image], tuple[Tensor, Tensor]]
LabelledBatch = tuple[Tensor, Tensor, Tensor]
_Part = tuple[Tensor, Tensor, Tensor, list[str]]  # with the names of what was skipped


def require_same_classes(train: Manifest, test: Manifest) -> None:
    """Raises DataError unless two splits number the same classes alike: a shifted map ruins accuracy silently."""
    if train.classes == test.classes:
        return
    difference = f"{len(train.classes)} and {len(test.classes)} classes"
    for index, (ours, theirs) in enumerate(zip(train.classes, test.classes, strict=False)):
        if ours != theirs:
            difference = f"class {index} is {ours!r} in one and {theirs!r} in the other"
            break
    raise DataError(
        f"the class maps of {train.directory} ({train.split}) and {test.directory} ({test.split}) differ: "
        f"{difference}; expected the same classes in the same order; write both with the same class file"
    )


class EvaluationStream:
    """Every image of a split once: an iterable over batches (images, labels, sample_ids).

    Ranks get contiguous parts whose sizes differ by at most one, so their numbers of batches may differ: gather by
    sample id, outside of this stream; no rank has more than `most_batches`, which all ranks know alike. Images that
    cannot be decoded are left out and counted in `skipped`.

    Args:
        directory: folder or address of shards.
        split: its name.
        transform: picture to float tensor [C, H, W]; must be picklable with workers.
        batch_size: images of a batch; the last one may be smaller.
        num_workers: loader processes; 0 loads in this process.
        rank: of this process.
        world_size: number of processes.
        dense_transform: given instead of `transform` where labels are label maps; picklable too.
        format: of the pictures that the transform takes.

    Raises:
        DataError: shards missing or of another size than in the manifest, labels that the manifest does not know, or
            samples without label map.
    """

    def __init__(
        self,
        directory: str,
        split: str,
        transform: Callable[[Picture], Tensor] | None = None,
        *,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        dense_transform: DenseTransform | None = None,
        format: PixelFormat = RGB,
    ) -> None:
        self.manifest, cache = open_shards(DataConfig(shards=directory, split=split))
        if cache is None:
            check_shard_files(self.manifest)
        self.num_samples = self.manifest.num_samples
        part = -(-self.num_samples // (world_size * max(1, num_workers)))
        self.most_batches = max(1, num_workers) * -(-part // batch_size)
        self.skipped: list[str] = []
        numbers = number_classes(self.manifest.classes)
        prepare: _WithClass | _WithLabelMap
        if dense_transform is not None:
            prepare = _WithLabelMap(dense_transform, numbers)
        else:
            assert transform is not None
            prepare = _WithClass(transform, numbers)
        self._dataset = _EvaluationDataset(
            self.manifest, cache, prepare, format, batch_size, rank, world_size
        )
        self._num_workers = num_workers

    def __iter__(self) -> Iterator[LabelledBatch]:
        """Yields images float [B, C, H, W], labels and sample ids int64 [B].

        Labels are int64 [B] (-1 without label), or of a dense transform uint8 [B, H', W'].
        """
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            num_workers=self._num_workers,
            worker_init_fn=start_worker if self._num_workers else None,
        )
        self.skipped = []
        for part in loader:
            if isinstance(part, DataError):
                raise part
            images, labels, sample_ids, skipped = part
            self.skipped.extend(skipped)
            if len(labels):
                yield images, labels, sample_ids


@dataclass(frozen=True)
class _WithClass:
    """A sample's image, transformed, and its class index."""

    transform: Callable[[Picture], Tensor]
    numbers: dict[str, int]

    def __call__(self, sample: EncodedSample, image: Picture) -> tuple[Tensor, Tensor]:
        label = number_label(sample.key, read_label(sample.key, sample.members), self.numbers)
        return self.transform(image), torch.tensor(label)


@dataclass(frozen=True)
class _WithLabelMap:
    """A sample's image and its label map, transformed together."""

    transform: DenseTransform
    numbers: dict[str, int]

    def __call__(self, sample: EncodedSample, image: Picture) -> tuple[Tensor, Tensor]:
        encoded = sample.members.get(LABEL_MAP_SUFFIX)
        if encoded is None:
            raise DataError(
                f"sample {sample.key} has no label map ({LABEL_MAP_SUFFIX}); expected one for every image; make the "
                "shards with python -m data.make_shards segmentation"
            )
        label_map = decode_label_map(encoded, image.size, len(self.numbers), sample.key)
        return self.transform(image, label_map)


class _EvaluationDataset(IterableDataset):
    """One worker's contiguous part of a split."""

    def __init__(
        self,
        manifest: Manifest,
        cache: ShardCache | None,
        prepare: Callable[[EncodedSample, Picture], tuple[Tensor, Tensor]],
        format: PixelFormat,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.cache = cache
        self.manifest, self.prepare, self.format, self.batch_size = manifest, prepare, format, batch_size
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[_Part | DataError]:
        try:
            yield from self._iterate()
        except DataError as error:
            # As a value: raised in a worker process it would arrive with a traceback for its message.
            yield error

    def _iterate(self) -> Iterator[_Part]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        total = self.manifest.num_samples
        part, parts = self.rank * num_workers + worker, self.world_size * num_workers
        start, stop = total * part // parts, total * (part + 1) // parts
        images: list[Tensor] = []
        labels: list[Tensor] = []
        ids: list[int] = []
        skipped: list[str] = []
        reader = ShardReader(self.manifest, cache=self.cache)
        for sample_id, sample in iterate_samples(reader, start, stop):
            try:
                if isinstance(sample, Failure):
                    raise BadImageError(sample.reason)
                encoded = find_image(sample, self.manifest.image_key)
                image = decode_picture(encoded, self.format, max_pixels=MAX_IMAGE_PIXELS)
            except BadImageError as error:
                skipped.append(f"sample {sample_id}: {error}")
                continue
            prepared, label = self.prepare(sample, image)
            images.append(prepared)
            labels.append(label)
            ids.append(sample_id)
            if len(images) == self.batch_size:
                yield torch.stack(images), torch.stack(labels), torch.tensor(ids), skipped
                images, labels, ids, skipped = [], [], [], []
        if images or skipped:
            pictures, truths = (torch.stack(part) if part else torch.empty(0) for part in (images, labels))
            yield pictures, truths, torch.tensor(ids, dtype=torch.int64), skipped


def iterate_samples(
    reader: ShardReader, start: int, stop: int
) -> Iterator[tuple[int, EncodedSample | Failure]]:
    """Yields (sample id, sample or failure) of samples [start, stop) of a split in the manifest's order."""
    first, first_id = 0, 0
    for index, shard in enumerate(reader.manifest.shards):
        low, high = max(start - first, 0), min(stop - first, shard.num_selected)
        if low < high:
            ordinals = (
                range(low, high)
                if shard.ordinals is None
                else np.asarray(shard.ordinals[low:high], dtype=np.int64)
            )
            for ordinal, sample in reader.read(index, ordinals):
                yield first_id + ordinal, sample
        first += shard.num_selected
        first_id += shard.samples
