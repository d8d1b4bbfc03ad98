"""What a loader process does: its lanes' samples, decoded and cropped, as parts of its rank's micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from data.config import DataConfig
from data.members import EncodedSample
from data.shards import DataError, Manifest
from data.stream.lanes import LaneReader
from data.stream.plan import Element, SamplePlan
from data.stream.reader import Failure, ShardReader
from data.stream.remote import ShardCache
from data.stream.workers import measure_rss_mib
from data.views.collate import BatchPart, SharedCrops
from data.views.cropping import Cropper
from data.views.decoding import BadImageError, decode_image, find_image
from data.views.masking import draw_masks

# Decoded images wait together for their crops, whose boxes are drawn in one go; this many bytes of pixels at most.
_GROUP_BYTES = 32 * 1024 * 1024


class LaneDataset(IterableDataset):
    """A worker's parts of its rank's micro-batches, for ever.

    The lanes of rank r are r, r + W, ...; the i-th of them belongs to worker i mod n. Every worker contributes its
    lanes' rows to every micro-batch, so what a micro-batch holds does not depend on n.

    Args:
        config: what to decode and cut.
        manifest: the split.
        plan: the order.
        cache: through which remote shards are had.
        crops: where the crops of the rank's micro-batches are written.
        rank: of this process.
        world_size: number of ranks.
        batch_size: samples of a micro-batch of the rank.
        first: number of the rank's first slot.
        used: elements used up of each lane of the rank.
    """

    def __init__(
        self,
        config: DataConfig,
        manifest: Manifest,
        plan: SamplePlan,
        *,
        cache: ShardCache | None,
        crops: SharedCrops,
        rank: int,
        world_size: int,
        batch_size: int,
        first: int,
        used: dict[int, int],
    ) -> None:
        self.config, self.manifest, self.plan, self.cache = config, manifest, plan, cache
        self.crops = crops
        self.rank, self.world_size, self.batch_size, self.first = rank, world_size, batch_size, first
        self.used = dict(used)
        self.image_key = config.image_key or manifest.image_key

    def __iter__(self) -> Iterator[BatchPart]:
        """Yields this worker's part of micro-batch after micro-batch, whose crops are written by then."""
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        reader = ShardReader(self.manifest, verify_hash=self.config.verify_hash, cache=self.cache)
        lanes = {
            lane: LaneReader(self.plan, lane, used, reader)
            for index, (lane, used) in enumerate(sorted(self.used.items()))
            if index % num_workers == worker
        }
        cropper = Cropper(self.config)
        first = self.first
        for number in itertools.count():
            lane_of_row = self.plan.slots_of(self.rank, self.world_size, first, self.batch_size)
            rows = [(row, lane) for row, lane in enumerate(lane_of_row.tolist()) if lane in lanes]
            try:
                yield self._load(rows, lanes, cropper, self.crops[number])
            except DataError as error:
                # As a value: an exception from a worker process would arrive wrapped in its traceback.
                yield self._fail(str(error))
                return
            first += self.batch_size

    def _load(
        self,
        lane_of_row: list[tuple[int, int]],
        lanes: dict[int, LaneReader],
        cropper: Cropper,
        crops: tuple[Tensor, Tensor],
    ) -> BatchPart:
        rows = [row for row, _ in lane_of_row]
        group: list[Tensor] = []
        group_bytes = 0
        seeds: list[int] = []
        ids: list[int] = []
        keys: list[str] = []
        skipped: list[str] = []
        for _, lane in lane_of_row:
            element, key, image = self._next_good(lanes[lane], skipped)
            seeds.append(self.plan.augmentation_seed(element))
            ids.append(element.sample_id)
            keys.append(key)
            group.append(image)
            group_bytes += image.nbytes
            if group_bytes > _GROUP_BYTES or len(keys) == len(rows):
                done = slice(len(keys) - len(group), len(keys))
                cropper.cut_(group, seeds[done], rows[done], *crops)
                group, group_bytes = [], 0
        return BatchPart(
            rows=rows,
            seeds=torch.tensor(seeds, dtype=torch.int64),
            keys=keys,
            sample_ids=torch.tensor(ids, dtype=torch.int64),
            used={lane: reader.used for lane, reader in lanes.items()},
            skipped=skipped,
            rss_mib=self._check_memory(),
            masks=draw_masks(self.config, seeds),
        )

    def _next_good(self, lane: LaneReader, skipped: list[str]) -> tuple[Element, str, Tensor]:
        """Returns a lane's next decodable sample; the names of those before it go to `skipped`."""
        while True:
            element, sample = lane.next()
            try:
                return element, *self._decode(sample)
            except BadImageError as error:
                name = sample.name if isinstance(sample, Failure) else sample.key
                skipped.append(f"{name} (sample {element.sample_id}): {error}")
            # The trainer judges data.max_skipped_fraction by whole batches; one that cannot be filled never comes.
            if len(skipped) > self.plan.num_samples:
                raise DataError(
                    f"{len(skipped)} samples in a row could not be decoded; the first: {skipped[0]}"
                )

    def _decode(self, sample: EncodedSample | Failure) -> tuple[str, Tensor]:
        if isinstance(sample, Failure):
            raise BadImageError(sample.reason)
        config = self.config
        encoded = find_image(sample, self.image_key)
        return sample.key, decode_image(encoded, config.format, max_pixels=config.max_image_pixels)

    def _check_memory(self) -> float:
        rss = measure_rss_mib()
        limit = self.config.max_worker_memory_gib
        if get_worker_info() is not None and rss > limit * 1024:
            raise DataError(
                f"a loader process holds {rss / 1024:.1f} GiB; expected at most {limit} GiB; lower "
                "data.shuffle_window, data.num_lanes or data.prefetch_factor, or set data.max_worker_memory_gib"
            )
        return rss

    def _fail(self, message: str) -> BatchPart:
        none = torch.empty(0, dtype=torch.int64)
        return BatchPart([], none, [], none, {}, [], 0.0, error=message)
