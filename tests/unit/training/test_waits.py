"""Nothing is copied to a GPU while the CPU stands by: on fake CUDA tensors, which have devices and no numbers."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from data.config import DataConfig
from data.views.augmentations import DeviceAugmentation
from data.views.collate import CropBatch
from prototypes.objectives.partitions import draw_partition
from tests.helpers.counting import DeviceCounter

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="fake CUDA tensors need a torch that was built with CUDA"
)


@pytest.fixture
def pinned(monkeypatch):
    """Sizes of what was put into page-locked memory, which a machine without a GPU cannot have."""
    sizes = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: sizes.append(tensor.numel()) or tensor)
    return sizes


def count():
    return FakeTensorMode(allow_non_fake_inputs=True), DeviceCounter()


def test_the_counter_sees_what_waits():
    mode, counter = count()
    with mode, counter:
        torch.zeros(3).to("cuda")
        torch.zeros(3).to("cuda", non_blocking=True)
        torch.zeros(3, device="cuda").copy_(torch.zeros(3))
        torch.zeros(3, device="cuda").cpu()
    assert counter.waits.total() == 3
    with DeviceCounter() as counter:
        values = torch.arange(4.0)
        values[values > 1] = 0  # a mask as index
        values.nonzero()
        float(values.sum()), bool(values.any()), values.tolist()
    assert counter.waits.total() == 5


def test_partitions_are_sent_without_waiting(pinned):
    mode, counter = count()
    with mode, counter:
        partition = draw_partition(64, 8, seed=0, step=0, device="cuda")
    assert partition.device.type == "cuda" and partition.shape == (8, 8)
    assert not counter.waits and pinned == [64]


def test_crops_are_sent_and_augmented_without_waiting(pinned):
    config = DataConfig(shards="x", recipe="dino", num_local_crops=8)
    seeds = np.arange(64)
    mode, counter = count()
    with mode:
        augment = DeviceAugmentation(config).to("cuda")
        crops = [
            torch.empty(views, 64, 3, side, side, dtype=torch.uint8) for views, side in ((2, 224), (8, 96))
        ]
        # Seeds stay numbers: what is drawn of them is drawn on the CPU.
        batch = CropBatch(
            *crops,
            seeds=SimpleNamespace(numpy=lambda: seeds),  # type: ignore[arg-type]
            keys=[],
            sample_ids=torch.empty(64),
            position={},
        )
        with counter, warnings.catch_warnings():
            warnings.simplefilter("error")
            augmented = augment(batch.to("cuda"))
    assert augmented.global_crops.device.type == augmented.local_crops.device.type == "cuda"
    assert augmented.global_crops.shape == (2, 64, 3, 224, 224)
    # Parameters, rows of the hue's steps, rows of the blur and its weights: once for each size.
    assert not counter.waits and len(pinned) == 2 * 5
