"""A step on a real GPU waits for it twice at most, and preparing the next step's input never does.

Skipped where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from data.config import DataConfig
from data.views.augmentations import DeviceAugmentation
from data.views.collate import CropBatch
from models.student_teacher import SelfSupervisedNetwork
from prototypes.build import build_estimator, build_objective
from prototypes.config import ObjectiveConfig, PartitionConfig, PrototypesConfig
from prototypes.diagnostics import UsageCounter
from tests.helpers.engine_scenarios import SCHEDULE, VIT
from tests.helpers.gpu_waits import counted_waits
from tests.helpers.plain_engine import PlainEngine
from training.config import BatchConfig
from training.engines.interface import TrainedNetwork
from training.engines.synchronization import Synchronization
from training.feed import Feed
from training.guards import LossSpikeGuard
from training.prototype_sets import PrototypeSet
from training.step import TrainingStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DATA = DataConfig(
    shards="x",
    recipe="carp",
    channels=1,
    mean=(0.5,),
    std=(0.5,),
    global_crop_size=16,
    local_crop_size=8,
    num_local_crops=1,
)


def draw_batches() -> Iterator[CropBatch]:
    """Micro-batches in page-locked memory, as the stream gives them."""
    for number in range(100):
        crops = [
            torch.randint(0, 256, (views, 16, 1, side, side), dtype=torch.uint8).pin_memory()
            for views, side in ((2, 16), (1, 8))
        ]
        seeds = torch.from_numpy(np.arange(16) + 16 * number)
        yield CropBatch(*crops, seeds=seeds, keys=[""] * 16, sample_ids=seeds, position={"step": number})


def test_a_wait_is_counted() -> None:
    number = torch.ones((), device="cuda")
    with counted_waits() as waits:
        assert number.item() == 1
    assert len(waits) == 1


def test_an_ordinary_step_waits_twice_and_its_preparation_never(
    record_property: Callable[[str, float], None],
) -> None:
    device = torch.device("cuda")
    prototypes = PrototypesConfig(
        num_prototypes=64, dim=VIT.head.projection_dim, partition=PartitionConfig(size=16)
    )
    estimator = build_estimator(
        prototypes, seed=0, num_observations_per_epoch=1000, total_steps=100, device=device
    )
    networks = [
        TrainedNetwork(SelfSupervisedNetwork(VIT, role), estimator.build_learned()).to(device)
        for role in ("student", "teacher")
    ]
    networks[1].load_state_dict(networks[0].state_dict())
    step = TrainingStep(
        engine=PlainEngine(*networks),
        sets=[PrototypeSet("prototypes", ["instance"], estimator, UsageCounter(64, device=device))],
        objective=build_objective(ObjectiveConfig(), prototypes, seed=0).to(device),
        batch=BatchConfig(global_batch_size=16),
        synchronization=Synchronization(1, device=device),
        spike_guard=LossSpikeGuard(None),
    )
    feed = Feed(draw_batches(), DeviceAugmentation(DATA).to(device), device, 1)
    for index in range(3):
        step(feed.take().crops, index, SCHEDULE, feed.prepare)
    with counted_waits() as prepared:
        crops = feed.take().crops
        feed.prepare()
    with counted_waits() as waits:
        outcome = step(crops, 3, SCHEDULE)
    record_property("waits", len(waits))
    assert prepared == []
    assert outcome.applied and len(waits) <= 2, waits
