"""The endless stream of a rank's micro-batches: any number of workers, resumable at any micro-batch, on any W."""

from __future__ import annotations

import atexit
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

from data.config import DataConfig
from data.shards import DataError, Manifest, check_shard_files
from data.stream.loading import LaneDataset
from data.stream.mixing import measure_mixing, report_mixing
from data.stream.plan import SamplePlan
from data.stream.reader import Failure, ShardReader
from data.stream.remote import open_shards
from data.stream.samplers import build_copies
from data.stream.workers import start_worker
from data.views.collate import BatchPart, CropBatch, SharedCrops, collate_parts
from data.views.decoding import BadImageError, decode_image, find_image
from data.views.kinds import describe_loss

logger = logging.getLogger(__name__)

DataPosition = dict[str, Any]
_NUM_NAMES_IN_MESSAGE = 20


class TrainingStream:
    """An iterable over this rank's micro-batches, for ever.

    Each optimizer step takes `global_batch_size / (micro_batch_size * world_size)` consecutive batches on every
    rank; together they are the slots of one global batch of the plan (`data.stream.plan`), the same samples for any
    number of ranks and workers. In a rank the order is fixed for its world size and does not depend on workers.
    Not collective: ranks never wait for each other here.

    Args:
        config: shards, crops, lanes, workers.
        seed: of the run; the order and the augmentation follow from it.
        global_batch_size: samples of one optimizer step on all ranks.
        micro_batch_size: samples of one batch of this rank.
        rank: of this process.
        world_size: number of processes.
        position: a merged position (`merge_positions`) to go on from, made on any world size.
        pin: put batches into page-locked memory, from which copies to a GPU need not wait; takes a CUDA context.

    Raises:
        DataError: everything that can be wrong with the shards, the batch sizes or the position, before step 0.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        position: DataPosition | None = None,
        pin: bool = False,
    ) -> None:
        self.config = config
        self.manifest, self._cache = open_shards(config)
        if self._cache is None:
            check_shard_files(self.manifest)
        _check_consumers(config, self.manifest, world_size)
        _check_batch(config, global_batch_size, micro_batch_size, world_size)
        self.plan = build_plan(config, self.manifest, seed)
        self.num_samples = self.plan.num_samples
        self._identity = {
            "seed": seed,
            "num_lanes": config.num_lanes,
            "shuffle_window": config.shuffle_window,
            "sampler": config.sampler,
            "manifest": self.manifest.hash,
        }
        self._rank, self._world_size, self._batch_size = rank, world_size, micro_batch_size
        used, self._samples_seen = self._read_position(position)
        self._used = {lane: used[lane] for lane in range(rank, config.num_lanes, world_size)}
        self._pin = pin
        self._skipped_names = list[str]()
        self._close: Callable[[], None] | None = None
        first = check_decodable(ShardReader(self.manifest, cache=self._cache), config)
        if rank == 0 and position is None:
            _report_mixing(config, self.manifest, seed, global_batch_size)
            _report_format(config, first)

    def __iter__(self) -> Iterator[CropBatch]:
        """Yields micro-batches from the stream's position on.

        Raises:
            DataError: more samples than `data.max_skipped_fraction` could not be decoded, or a worker outgrew
                `data.max_worker_memory_gib`.
        """
        num_workers = self.config.num_workers
        # A process has `prefetch_factor` parts under way beyond those received, and of the micro-batch that is being
        # received the first parts are: its slot, and one for each that may have been begun.
        num_slots = 1 if num_workers == 0 else self.config.prefetch_factor + 1
        crops = SharedCrops(self.config, self._batch_size, num_slots, shared=num_workers > 0)
        parts = LaneDataset(
            self.config,
            self.manifest,
            self.plan,
            cache=self._cache,
            crops=crops,
            rank=self._rank,
            world_size=self._world_size,
            batch_size=self._batch_size,
            first=self._samples_seen // self._world_size,
            used=self._used,
        )
        source = self._start(parts)
        for number in itertools.count():
            received = [next(source) for _ in range(max(1, num_workers))]
            for part in received:
                if part.error:
                    raise DataError(part.error)
                self._used.update(part.used)
            self._samples_seen += self._batch_size * self._world_size
            batch = collate_parts(received, crops.take(number, pin=self._pin), self._position())
            self._count_skipped(batch)
            yield batch

    def close(self) -> None:
        """Ends the workers; the stream cannot be iterated any further."""
        if self._close is not None:
            self._close()
            self._close = None

    def _start(self, parts: LaneDataset) -> Iterator[BatchPart]:
        if self.config.num_workers == 0:
            return iter(parts)
        loader = DataLoader(
            parts,
            batch_size=None,
            num_workers=self.config.num_workers,
            prefetch_factor=self.config.prefetch_factor,
            worker_init_fn=start_worker,
        )
        iterator = iter(loader)
        # The workers ignore SIGTERM, by which multiprocessing would end them at exit: end them before it tries.
        self._close = iterator._shutdown_workers  # type: ignore[attr-defined]
        closing = weakref.WeakMethod(self.close)
        atexit.register(lambda: (method := closing()) and method())
        return iterator

    def _position(self) -> DataPosition:
        used = {str(lane): used for lane, used in self._used.items()}
        return {**self._identity, "samples_seen": self._samples_seen, "used": used}

    def _read_position(self, position: DataPosition | None) -> tuple[dict[int, int], int]:
        if position is None:
            return dict.fromkeys(range(self.config.num_lanes), 0), 0
        for name, value in self._identity.items():
            if position.get(name) != value:
                raise DataError(
                    f"the saved data position has {name} {position.get(name)}; expected {value}, as in this run; "
                    "resume with the shards and data settings of the saved run, or start a new one"
                )
        used = {int(lane): int(count) for lane, count in position["used"].items()}
        if sorted(used) != list(range(self.config.num_lanes)):
            raise DataError(
                f"the saved data position has {len(used)} lanes; expected {self.config.num_lanes}; merge the parts "
                "of all ranks before saving"
            )
        if position["samples_seen"] % self._world_size:
            raise DataError(
                f"the saved data position stands at sample {position['samples_seen']}; expected a multiple of the "
                f"world size {self._world_size}; resume on another number of ranks"
            )
        return used, int(position["samples_seen"])

    def _count_skipped(self, batch: CropBatch) -> None:
        """Raises DataError once too many of this rank's samples were skipped, before a resumption or after it."""
        num_seen = self._samples_seen // self._world_size
        # Every slot of the rank took one good element; whatever else its lanes have used up was skipped.
        num_skipped = sum(self._used.values()) - num_seen
        room = _NUM_NAMES_IN_MESSAGE - len(self._skipped_names)
        self._skipped_names.extend(batch.skipped[:room])
        for name in batch.skipped:
            logger.warning("skipped %s", name)
        allowed = self.config.max_skipped_fraction * max(num_seen, self.num_samples / self._world_size)
        if batch.skipped and num_skipped > allowed:
            raise DataError(
                f"{num_skipped} samples could not be decoded; expected at most {allowed:.1f} = "
                f"data.max_skipped_fraction x samples of this rank; mend or remove them (python -m "
                f"data.verify_shards {self.manifest.directory}) or raise data.max_skipped_fraction: "
                + "; ".join(self._skipped_names)
            )


def build_plan(config: DataConfig, manifest: Manifest, seed: int) -> SamplePlan:
    """Returns the order in which a configuration shows the samples of a manifest."""
    copies = build_copies(manifest, config.sampler)
    return SamplePlan(
        manifest, seed=seed, num_lanes=config.num_lanes, window=config.shuffle_window, copies=copies
    )


def merge_positions(parts: Sequence[DataPosition]) -> DataPosition:
    """Returns the position of the whole job from the ranks' parts after the same step; JSON-able.

    It does not depend on the world size: it holds the number of samples seen and one counter a lane.

    Raises:
        DataError: the parts are of different steps or runs.
    """
    merged = {**parts[0], "used": {}}
    for part in parts:
        for name, value in part.items():
            if name != "used" and value != merged[name]:
                raise DataError(f"the ranks' data positions differ in {name}: {value} and {merged[name]}")
        merged["used"].update(part["used"])
    merged["used"] = dict(sorted(merged["used"].items(), key=lambda item: int(item[0])))
    return merged


def check_decodable(reader: ShardReader, config: DataConfig) -> bytes:
    """Returns the first image that can be decoded, of the first samples of the first shard.

    Shards without images, with suffixes that this repository does not know, or of another number or type of bands are
    found before step 0.

    Raises:
        DataError: there is none.
    """
    number, shard = next((n, shard) for n, shard in enumerate(reader.manifest.shards) if shard.num_selected)
    ordinals = range(shard.samples)
    image_key = config.image_key or reader.manifest.image_key
    reason = ""
    for _, sample in reader.read(number, ordinals[:8]):
        if isinstance(sample, Failure):
            reason = reason or f"{sample.name}: {sample.reason}"
            continue
        try:
            encoded = find_image(sample, image_key)
            decode_image(encoded, config.format, max_pixels=config.max_image_pixels)
            return encoded
        except BadImageError as error:
            reason = reason or f"{sample.key}: {error}"
    raise DataError(
        f"{reader.manifest.path_of(shard)} has no image in its first samples ({reason}); expected members such as "
        f".jpg or .png, or .tif and .npy, of data.channels={config.channels} and data.pixels={config.pixels}; set "
        f"those to what python -m data.verify_shards {reader.manifest.directory} --statistics prints, or data.shards "
        "to a folder of image shards"
    )


def _report_format(config: DataConfig, first: bytes) -> None:
    """Says what does not apply to these images, and where they lose bits."""
    if config.left_out_of_recipe:
        logger.info(
            "data.recipe %s: images of %d x %s have no colours, so that %s of it is left out or cut to what applies",
            *(config.recipe, config.channels, config.pixels, ", ".join(config.left_out_of_recipe)),
        )
    for lost in describe_loss(first) if config.format.is_photograph else ():
        logger.warning("data.channels is %d and data.pixels uint8: %s", config.channels, lost)


def _report_mixing(config: DataConfig, manifest: Manifest, seed: int, batch_size: int) -> None:
    mixing = measure_mixing(
        manifest,
        num_lanes=config.num_lanes,
        window=config.shuffle_window,
        batch_size=batch_size,
        sampler=config.sampler,
        seed=seed,
    )
    report_mixing(config.written_shards, config.split, mixing)


def _check_consumers(config: DataConfig, manifest: Manifest, world_size: int) -> None:
    consumers = world_size * max(1, config.num_workers)
    num_shards = sum(1 for shard in manifest.shards if shard.num_selected)
    if num_shards < consumers:
        raise DataError(
            f"{manifest.directory} holds {num_shards} shards of split {manifest.split!r}; expected at least "
            f"{consumers} = world size {world_size} x {max(1, config.num_workers)} workers; write smaller shards "
            "(--samples-per-shard) or lower data.num_workers"
        )
    config.check_ranks(world_size)


def _check_batch(config: DataConfig, global_batch_size: int, micro_batch_size: int, world_size: int) -> None:
    if micro_batch_size < 1 or global_batch_size % (micro_batch_size * world_size):
        raise DataError(
            f"global_batch_size is {global_batch_size}; expected a multiple of micro batch {micro_batch_size} x world "
            f"size {world_size} = {micro_batch_size * world_size}; set global_batch_size or micro_batch_size_per_gpu"
        )
