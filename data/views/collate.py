"""Micro-batches of crops: their type, where they are loaded, and how a rank's workers' parts become one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.config import DataConfig
from data.views.cropping import allocate_crops
from data.views.masking import Masks, join_masks


@dataclass
class CropBatch:
    """The crops of one micro-batch of a rank, before the colours are augmented.

    Attributes:
        global_crops: [V_g, B, C, H, W] of `data.pixels`.
        local_crops: [V_l, B, C, h, w], likewise; V_l may be 0.
        seeds: int64 [B], each sample's augmentation seed from (seed, epoch, sample); stays on the CPU.
        keys: the samples' names in their shards.
        sample_ids: int64 [B], numbers of the samples in the manifest; stays on the CPU.
        position: where this rank stands after this batch; see `data.stream.pipeline.merge_positions`.
        skipped: names of the samples that were passed over for this batch, with the reason.
        worker_rss_mib: largest resident memory of the processes that loaded this batch.
        masks: which patches of the global crops are hidden and predicted, where `data.masks` asks for some; they stay
            on the CPU, where hidden patches are counted without waiting for a device.
    """

    global_crops: Tensor
    local_crops: Tensor
    seeds: Tensor
    keys: list[str]
    sample_ids: Tensor
    position: dict[str, Any]
    skipped: list[str] = field(default_factory=list)
    worker_rss_mib: float = 0.0
    masks: Masks | None = None

    def to(self, device: torch.device | str) -> CropBatch:
        """Returns the batch with its crops on a device, copied without waiting where memory is pinned."""
        return dataclasses.replace(
            self,
            global_crops=self.global_crops.to(device, non_blocking=True),
            local_crops=self.local_crops.to(device, non_blocking=True),
        )


@dataclass
class BatchPart:
    """What one worker tells of its samples in a micro-batch; their crops stand in their rows of `SharedCrops`.

    Attributes:
        rows: places of its samples in the micro-batch.
        seeds: int64 [n].
        keys: the samples' names.
        sample_ids: int64 [n].
        used: elements used up of each lane of this worker, after this batch.
        skipped: names and reasons.
        rss_mib: the worker's resident memory.
        error: a message that ends the run, instead of samples.
        masks: of its samples, if any are asked for.
    """

    rows: list[int]
    seeds: Tensor
    keys: list[str]
    sample_ids: Tensor
    used: dict[int, int]
    skipped: list[str]
    rss_mib: float
    error: str = ""
    masks: Masks | None = None


class SharedCrops:
    """The crops of the micro-batches that are being loaded, in memory that a rank's loader processes share with it.

    Every process cuts its samples straight into their rows: nothing is sent, and nothing is left to put together.
    Micro-batch n stands in slot n mod `num_slots`, so it must be taken out before the first process begins with
    micro-batch n + num_slots.

    Args:
        config: numbers and sizes of the crops.
        batch_size: rows of a micro-batch.
        num_slots: micro-batches that may be unfinished, or not taken out, at once.
        shared: whether other processes write; they must inherit this object.
    """

    def __init__(self, config: DataConfig, batch_size: int, num_slots: int, *, shared: bool) -> None:
        self._slots = [allocate_crops(config, batch_size) for _ in range(num_slots)]
        for crops in itertools.chain(*self._slots) if shared else ():
            if crops.numel():  # no memory can be shared of no local crops
                crops.share_memory_()

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """Returns the global [V_g, B, C, H, W] and local [V_l, B, C, h, w] crops of a micro-batch, to be written."""
        return self._slots[number % len(self._slots)]

    def take(self, number: int, *, pin: bool) -> tuple[Tensor, Tensor]:
        """Returns a copy of a whole micro-batch's crops, in page-locked memory if `pin`."""
        copies = [torch.empty(crops.shape, dtype=crops.dtype, pin_memory=pin) for crops in self[number]]
        for copy, crops in zip(copies, self[number], strict=True):
            copy.copy_(crops)
        return copies[0], copies[1]


def collate_parts(
    parts: Sequence[BatchPart], crops: tuple[Tensor, Tensor], position: dict[str, Any]
) -> CropBatch:
    """Returns the micro-batch that the workers' parts make up, its rows in the plan's order.

    Args:
        parts: one for each worker.
        crops: its global and local crops.
        position: to hand on.
    """
    batch_size = sum(len(part.rows) for part in parts)
    seeds = torch.empty(batch_size, dtype=torch.int64)
    sample_ids = torch.empty(batch_size, dtype=torch.int64)
    keys = [""] * batch_size
    for part in parts:
        seeds[part.rows] = part.seeds
        sample_ids[part.rows] = part.sample_ids
        for row, key in zip(part.rows, part.keys, strict=True):
            keys[row] = key
    skipped = [name for part in parts for name in part.skipped]
    rss = max(part.rss_mib for part in parts)
    masks = join_masks([part.masks for part in parts], [part.rows for part in parts])
    return CropBatch(*crops, seeds, keys, sample_ids, position, skipped, rss, masks)
