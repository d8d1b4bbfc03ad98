"""The contestants of `benchmarks.step`: the trainer's step on one engine and in one mode, with data made for them."""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks._replica_engine import ReplicaEngine
from benchmarks._stages import StageClock
from data.config import DataConfig, MaskConfig
from data.stream.pipeline import TrainingStream
from data.views.augmentations import DeviceAugmentation
from data.views.collate import CropBatch
from data.writing.shard_writing import write_split
from data.writing.sources import ImageSource, SourceSample
from models.config import HeadConfig, ModelConfig
from prototypes.config import (
    InstanceConfig,
    Mode,
    ObjectiveConfig,
    PartitionConfig,
    PatchConfig,
    PrototypesConfig,
)
from runtime.distributed import Process
from runtime.seeding import seed_everything
from training.build import assemble_engine, assemble_step, build_sets, build_trained_network, make_ready
from training.config import BatchConfig, EngineConfig, OptimConfig, PretrainConfig
from training.engines.interface import Engine
from training.engines.synchronization import Synchronization
from training.feed import Feed
from training.prototype_sets import PrototypeSet
from training.schedules import StepSchedule

MODES: tuple[Mode, ...] = ("full", "joint", "frozen_random")
SCHEDULE = StepSchedule(lr=1e-4, weight_decay=0.04, ema_momentum=0.99)
_NUM_LANES = 16
_SAMPLES_PER_SHARD = 16
_NUM_IMAGES = 512
_DROP_PATH = 0.1
# Of the run that contestants are steps of.
_NUM_SAMPLES, _NUM_STEPS = 50_000, 10_000
# iBOT's number, and the configurations' bound for one step of a mixture.
_NUM_PATCH_PROTOTYPES, _MAX_PATCH_ROWS = 8192, 2048
_TINY_PATCH_SIZE = 4


class ModelSpec(NamedTuple):
    """A model, its local crops (number, side), K and P, images per rank."""

    model: ModelConfig
    local_crops: tuple[int, int]
    num_prototypes: int
    batch: int


TINY = ModelConfig(
    name="vit_tiny_patch16_224",
    image_size=32,
    patch_size=8,
    embed_dim=192,
    depth=4,
    num_heads=4,
    drop_path_rate=_DROP_PATH,
    head=HeadConfig(hidden_dim=256, projection_dim=64),
)
MODELS = {
    "tiny": ModelSpec(TINY, (2, 16), 4096, 32),
    "vits": ModelSpec(
        ModelConfig(name="vit_small_patch16_224", drop_path_rate=_DROP_PATH), (10, 96), 65536, 64
    ),
    "vitl": ModelSpec(
        ModelConfig(name="vit_large_patch16_224", drop_path_rate=_DROP_PATH), (10, 96), 65536, 64
    ),
}


@dataclass
class SyntheticImages(ImageSource):
    """Smooth random pictures as JPEGs, a pixel an eighth of their side: they cost what photographs cost to decode."""

    side: int

    def __len__(self) -> int:
        """Returns the number of images."""
        return _NUM_IMAGES

    def size(self, index: int) -> int:
        """Returns an image's bytes before compression."""
        return 3 * self.side**2

    def load(self, index: int) -> SourceSample:
        """Returns one picture."""
        pixels = np.random.default_rng(index).integers(0, 256, (self.side // 8, self.side // 8, 3), np.uint8)
        picture, encoded = Image.fromarray(pixels).resize((self.side, self.side)), io.BytesIO()
        picture.save(encoded, format="JPEG", quality=92)
        return SourceSample(f"{index:05d}", {"jpg": encoded.getvalue()})


def write_images(options: argparse.Namespace, directory: str) -> None:
    """Writes shards of pictures a little larger than the global crops."""
    side = 8 * (MODELS[options.model].model.height_and_width[0] * 5 // 4 // 8)
    write_split(SyntheticImages(side), "train", directory, samples_per_shard=_SAMPLES_PER_SHARD)


def build_config(options: argparse.Namespace, mode: Mode, engine: str, world_size: int) -> PretrainConfig:
    """Returns the run that a contestant is one rank of; `ddp` has no configuration of its own and takes ZeRO-0's."""
    spec = MODELS[options.model]
    number, side = spec.local_crops
    stage = "zero0" if engine in ("ddp", "fsdp2") else engine
    config = PretrainConfig(
        batch=BatchConfig(global_batch_size=options.batch[0] * world_size),
        data=DataConfig(
            shards=options.shards,
            num_lanes=_NUM_LANES,
            num_workers=options.workers,
            global_crop_size=spec.model.image_size,
            num_local_crops=number if options.local_crops is None else options.local_crops,
            local_crop_size=side,
        ),
        model=replace(
            spec.model,
            activation_checkpointing=options.activation_checkpointing,
            compile_blocks=options.compile and engine != "zero3",
        ),
        prototypes=PrototypesConfig(
            mode=mode,
            num_prototypes=spec.num_prototypes,
            dim=spec.model.head.projection_dim,
            partition=PartitionConfig(size=512),
        ),
        optim=OptimConfig(steps=_NUM_STEPS),
        engine=EngineConfig(
            name="fsdp2" if engine == "fsdp2" else "deepspeed",
            precision=options.precision,
            deepspeed_config=f"ds_configs/{stage}_{options.precision}.json",
        ),
    )
    return _with_patches(config) if options.objective == "ibot" else config


def _with_patches(config: PretrainConfig) -> PretrainConfig:
    """Returns the run with DINO's and iBOT's terms, patches with a head and prototypes of their own in the same mode.

    The tiny ViT then has 64 patches of an image.
    """
    patch_size = None if config.model.patch_size is None else _TINY_PATCH_SIZE
    return replace(
        config,
        data=replace(config.data, masks=MaskConfig(kind="block", patch_size=patch_size or 16)),
        model=replace(config.model, patch_size=patch_size, patch_head=config.model.head),
        patch_prototypes=replace(
            config.prototypes, num_prototypes=_NUM_PATCH_PROTOTYPES, max_rows_per_rank=_MAX_PATCH_ROWS
        ),
        objective=ObjectiveConfig(instance=InstanceConfig(name="dino"), patch=PatchConfig(name="ibot")),
    )


def open_stream(config: PretrainConfig, process: Process) -> Iterator[CropBatch]:
    """Returns a rank's micro-batches, which its contestants take in turns: loading costs all of them alike."""
    return iter(
        TrainingStream(
            config.data,
            seed=0,
            global_batch_size=config.batch.global_batch_size,
            micro_batch_size=config.batch.micro_batch_size_per_gpu(process.world_size),
            rank=process.rank,
            world_size=process.world_size,
            pin=process.device.type == "cuda",
        )
    )


class Contestant:
    """One engine in one mode: what `Trainer` does at a step that writes no line, evaluates nothing and saves nothing.

    Args:
        name: of the engine.
        config: of its run.
        stream: micro-batches, shared by all contestants of the rank.
        process: this rank.
        synchronization: collectives, shared by all contestants.
        clock: watches the stages; its own where left out.
    """

    def __init__(
        self,
        name: str,
        config: PretrainConfig,
        stream: Iterator[CropBatch],
        process: Process,
        synchronization: Synchronization,
        clock: StageClock | None = None,
    ) -> None:
        self.clock = clock or StageClock(process.device)
        self._process, self._num_steps = process, 0
        watched = copy(synchronization)
        for collective in ("reduce_sum", "gather"):
            counted = self.clock.collective(getattr(synchronization, collective), "exchange")
            setattr(watched, collective, counted)
        sets = build_sets(config, _NUM_SAMPLES, process, watched)
        engine = build_engine(name, config, sets, process)
        self._step = assemble_step(config, _NUM_SAMPLES, process, synchronization, sets, engine)
        self._step.drift = ()  # for the lines of a record
        augmentation = DeviceAugmentation(config.data).to(process.device)
        self._feed = Feed(self.clock.iterate(stream, "data wait"), augmentation, process.device, 1)
        self.clock.watch(self._step, self._feed)

    def step(self) -> None:
        """One step."""
        crops = self._feed.take().crops
        seed_everything(0, "step", self._num_steps, self._process.rank)
        self._step(crops, self._num_steps, SCHEDULE, self._feed.prepare)
        self._num_steps += 1

    def time_steps(self, count: int) -> list[float]:
        """Returns seconds of each of `count` steps."""
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            self.step()
            if self._process.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return seconds

    def time_stages(self, count: int) -> dict[str, float]:
        """Returns seconds by stage of one step, the mean of `count`."""
        self.clock.active = True
        with self.clock.watching_the_loss():
            for _ in range(count):
                with self.clock.stage("rest"):
                    self.step()
        self.clock.active = False
        return {stage: seconds / count for stage, seconds in self.clock.seconds.items()}


def build_engine(name: str, config: PretrainConfig, sets: Sequence[PrototypeSet], process: Process) -> Engine:
    """Returns one contestant's engine; all start from the same weights."""
    torch.manual_seed(0)
    student, teacher = (build_trained_network(config, role, sets=sets) for role in ("student", "teacher"))
    make_ready(config, student, teacher, process)
    if name == "ddp":
        return ReplicaEngine(student, teacher, config.optim, config.engine.precision)
    return assemble_engine(config, student, teacher, process)
