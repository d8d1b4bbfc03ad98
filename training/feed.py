"""A step's micro-batches: taken from the stream, on the training device, augmented; on a GPU one step ahead."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from data.views.augmentations import Crops, DeviceAugmentation
from data.views.collate import CropBatch


@dataclass(frozen=True)
class StepInput:
    """What one optimizer step trains on.

    Attributes:
        crops: of this rank's micro-batches, equally large, augmented, on the training device.
        position: where the stream stands after them.
        skipped: samples that were passed over for them.
        worker_rss_mib: largest resident memory of the processes that loaded them.
    """

    crops: list[Crops]
    position: dict[str, Any]
    skipped: int
    worker_rss_mib: float


class Feed:
    """Gives step after step its micro-batches. Not collective.

    On a GPU `prepare` copies and augments the next step's on a stream of its own, beside the kernels of the step at
    work; on a CPU, where nothing runs beside it, it does nothing. Either way a step gets the same bits, and the
    position that it brings along is that after its own micro-batches, whatever has been prepared beyond them.

    Args:
        stream: this rank's micro-batches.
        augmentation: on the training device.
        device: where training happens.
        micro_batches: number of them in a step.
    """

    def __init__(
        self,
        stream: Iterable[CropBatch],
        augmentation: DeviceAugmentation,
        device: torch.device,
        micro_batches: int,
    ) -> None:
        self._waited_s = 0.0
        self._stream = stream
        self._iterator: Iterator[CropBatch] | None = None
        self._augmentation = augmentation
        self._device = device
        self._micro_batches = micro_batches
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: StepInput | Exception | None = None

    def prepare(self) -> None:
        """Begins with the next step's input on a GPU. What fails here is raised when that step asks for it."""
        if self._side is None or self._next is not None:
            return
        try:
            with torch.cuda.stream(self._side):
                self._next = self._load()
        except Exception as error:  # the step at work is whole and must be able to end
            self._next = error

    def take(self) -> StepInput:
        """Returns the next step's input.

        Raises:
            DataError: as the stream does.
        """
        self.prepare()
        if self._side is None:
            return self._load()
        prepared, self._next = self._next, None
        if isinstance(prepared, Exception):
            raise prepared
        assert prepared is not None
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._side)
        for crops in prepared.crops:
            # Their memory belongs to the side stream, which must not use it again before this step is done.
            crops.global_crops.record_stream(current)
            crops.local_crops.record_stream(current)
        return prepared

    def read_wait(self) -> float:
        """Returns the seconds waited for the loader since the last call, also those while the device was at work."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def _load(self) -> StepInput:
        started = time.perf_counter()
        if self._iterator is None:
            self._iterator = iter(self._stream)
        batches = [next(self._iterator) for _ in range(self._micro_batches)]
        self._waited_s += time.perf_counter() - started
        return StepInput(
            crops=[self._augmentation(batch.to(self._device)) for batch in batches],
            position=batches[-1].position,
            skipped=sum(len(batch.skipped) for batch in batches),
            worker_rss_mib=max(batch.worker_rss_mib for batch in batches),
        )
