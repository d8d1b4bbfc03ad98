"""Finite, labelled streams for evaluation, and what is known of a split's classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.config import MAX_IMAGE_PIXELS, DataConfig
from data.members import EncodedSample
from data.shards import DataError, Manifest, check_shard_files, load_manifest
from data.stream.reader import Failure, ShardReader
from data.stream.remote import ShardCache, open_shards
from data.stream.workers import start_worker
from data.views.decoding import BadImageError, decode_to_pil, find_image
from data.writing.labels import number_classes, number_label, read_label

__all__ = ["DataError", "EvaluationStream", "Manifest", "load_manifest", "require_same_classes"]

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
        transform: Pillow RGB image to float tensor [C, H, W]; must be picklable with workers.
        batch_size: images of a batch; the last one may be smaller.
        num_workers: loader processes; 0 loads in this process.
        rank: of this process.
        world_size: number of processes.

    Raises:
        DataError: shards missing or of another size than in the manifest, or labels that the manifest does not know.
    """

    def __init__(
        self,
        directory: str,
        split: str,
        transform: Callable[[Image.Image], Tensor],
        *,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.manifest, cache = open_shards(DataConfig(shards=directory, split=split))
        if cache is None:
            check_shard_files(self.manifest)
        self.num_samples = self.manifest.num_samples
        part = -(-self.num_samples // (world_size * max(1, num_workers)))
        self.most_batches = max(1, num_workers) * -(-part // batch_size)
        self.skipped: list[str] = []
        self._dataset = _EvaluationDataset(self.manifest, cache, transform, batch_size, rank, world_size)
        self._num_workers = num_workers

    def __iter__(self) -> Iterator[LabelledBatch]:
        """Yields images float [B, C, H, W], labels int64 [B] (-1 without label) and sample ids int64 [B]."""
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


class _EvaluationDataset(IterableDataset):
    """One worker's contiguous part of a split."""

    def __init__(
        self,
        manifest: Manifest,
        cache: ShardCache | None,
        transform: Callable[[Image.Image], Tensor],
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.cache = cache
        self.manifest, self.transform, self.batch_size = manifest, transform, batch_size
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
        numbers = number_classes(self.manifest.classes)
        images: list[Tensor] = []
        labels: list[int] = []
        ids: list[int] = []
        skipped: list[str] = []
        for sample_id, sample in self._read(start, stop):
            try:
                if isinstance(sample, Failure):
                    raise BadImageError(sample.reason)
                encoded = find_image(sample, self.manifest.image_key)
                image = decode_to_pil(encoded, max_pixels=MAX_IMAGE_PIXELS)
            except BadImageError as error:
                skipped.append(f"sample {sample_id}: {error}")
                continue
            images.append(self.transform(image))
            labels.append(number_label(sample.key, read_label(sample.key, sample.members), numbers))
            ids.append(sample_id)
            if len(images) == self.batch_size:
                yield torch.stack(images), torch.tensor(labels), torch.tensor(ids), skipped
                images, labels, ids, skipped = [], [], [], []
        if images or skipped:
            stacked = torch.stack(images) if images else torch.empty(0)
            yield (
                stacked,
                torch.tensor(labels, dtype=torch.int64),
                torch.tensor(ids, dtype=torch.int64),
                skipped,
            )

    def _read(self, start: int, stop: int) -> Iterator[tuple[int, EncodedSample | Failure]]:
        """Yields samples [start, stop) of the split in the manifest's order."""
        reader = ShardReader(self.manifest, cache=self.cache)
        first, first_id = 0, 0
        for index, shard in enumerate(self.manifest.shards):
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
