"""Micro-batches of crops: their type, and how a rank's workers' parts become one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class CropBatch:
    """The crops of one micro-batch of a rank, before the colours are augmented.

    Attributes:
        global_crops: uint8 [V_g, B, C, H, W].
        local_crops: uint8 [V_l, B, C, h, w]; V_l may be 0.
        seeds: int64 [B], each sample's augmentation seed from (seed, epoch, sample); stays on the CPU.
        keys: the samples' names in their shards.
        sample_ids: int64 [B], numbers of the samples in the manifest; stays on the CPU.
        position: where this rank stands after this batch; see `data.stream.pipeline.merge_positions`.
        skipped: names of the samples that were passed over for this batch, with the reason.
        worker_rss_mib: largest resident memory of the processes that loaded this batch.
    """

    global_crops: Tensor
    local_crops: Tensor
    seeds: Tensor
    keys: list[str]
    sample_ids: Tensor
    position: dict[str, Any]
    skipped: list[str] = field(default_factory=list)
    worker_rss_mib: float = 0.0

    def to(self, device: torch.device | str) -> CropBatch:
        """Returns the batch with its crops on a device, copied without waiting where memory is pinned."""
        return dataclasses.replace(
            self,
            global_crops=self.global_crops.to(device, non_blocking=True),
            local_crops=self.local_crops.to(device, non_blocking=True),
        )


@dataclass
class BatchPart:
    """What one worker contributes to a micro-batch.

    Attributes:
        rows: places of its samples in the micro-batch.
        global_crops: uint8 [V_g, n, C, H, W].
        local_crops: uint8 [V_l, n, C, h, w].
        seeds: int64 [n].
        keys: the samples' names.
        sample_ids: int64 [n].
        used: elements used up of each lane of this worker, after this batch.
        skipped: names and reasons.
        rss_mib: the worker's resident memory.
        error: a message that ends the run, instead of samples.
    """

    rows: list[int]
    global_crops: Tensor
    local_crops: Tensor
    seeds: Tensor
    keys: list[str]
    sample_ids: Tensor
    used: dict[int, int]
    skipped: list[str]
    rss_mib: float
    error: str = ""


def collate_parts(
    parts: Sequence[BatchPart], batch_size: int, position: dict[str, Any], pin: bool
) -> CropBatch:
    """Returns the micro-batch that the workers' parts make up, its rows in the plan's order.

    Args:
        parts: one for each worker.
        batch_size: their rows together.
        position: to hand on.
        pin: put the crops into page-locked memory, for copies to a GPU.
    """
    skipped = [name for part in parts for name in part.skipped]
    rss = max(part.rss_mib for part in parts)
    if len(parts) == 1 and not pin:
        part = parts[0]
        global_crops, local_crops = part.global_crops, part.local_crops
        return CropBatch(
            global_crops, local_crops, part.seeds, part.keys, part.sample_ids, position, skipped, rss
        )
    global_crops = _gather_rows([part.global_crops for part in parts], parts, batch_size, pin)
    local_crops = _gather_rows([part.local_crops for part in parts], parts, batch_size, pin)
    seeds = torch.empty(batch_size, dtype=torch.int64)
    sample_ids = torch.empty(batch_size, dtype=torch.int64)
    keys = [""] * batch_size
    for part in parts:
        seeds[part.rows] = part.seeds
        sample_ids[part.rows] = part.sample_ids
        for row, key in zip(part.rows, part.keys, strict=True):
            keys[row] = key
    return CropBatch(global_crops, local_crops, seeds, keys, sample_ids, position, skipped, rss)


def _gather_rows(crops: Sequence[Tensor], parts: Sequence[BatchPart], batch_size: int, pin: bool) -> Tensor:
    num_views, _, *shape = crops[0].shape
    gathered = torch.empty((num_views, batch_size, *shape), dtype=torch.uint8, pin_memory=pin)
    for part, rows in zip(crops, parts, strict=True):
        gathered[:, rows.rows] = part
    return gathered
