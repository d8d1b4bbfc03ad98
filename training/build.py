"""From a configuration to a trainer: every part is built and checked here, before the first step."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.stream.pipeline import TrainingStream
from data.views.augmentations import DeviceAugmentation
from models.student_teacher import SelfSupervisedNetwork
from models.vit import compile_blocks
from prototypes.build import build_estimator, build_objective
from prototypes.diagnostics import UsageCounter
from prototypes.estimator import PrototypeEstimator
from prototypes.mixture.kernel import find_missing_tool, require_kernel
from prototypes.statistics import Collectives
from runtime.config import config_hash
from runtime.distributed import Process
from runtime.preemption import PreemptionFlag
from runtime.provenance import collect_provenance
from runtime.seeding import seed_everything
from training.checkpoints.resume import Resumption
from training.checkpoints.saved_run import SavedRun
from training.checkpoints.snapshot import Progress, RecordPosition
from training.checkpoints.store import CheckpointStore
from training.config import PretrainConfig
from training.cost import computes_in_bf16, count_flops, own_engine
from training.drift import DriftGauge
from training.engines.interface import Engine, TrainedNetwork
from training.engines.synchronization import Synchronization
from training.evaluation_job import build_evaluation_job, read_scores
from training.feed import Feed
from training.guards import LossSpikeGuard
from training.initialisation import (
    check_crop_sizes,
    find_source_checkpoint,
    initialise_estimator,
    initialise_network,
)
from training.metrics import require_views
from training.prototype_sets import SECTIONS, PrototypeSet
from training.run_directory import RunDirectory
from training.run_length import check_length, report_extension, steps_per_epoch
from training.step import TrainingStep
from training.throughput import Throughput, measure_product_ceiling
from training.trainer import Probe, Trainer
from training.unread import describe_unread

logger = logging.getLogger(__name__)


def build_trainer(
    config: PretrainConfig,
    process: Process,
    directory: RunDirectory,
    preemption: PreemptionFlag,
    build_probe: Callable[[PretrainConfig, torch.device, Process], Probe],
) -> Trainer:
    """Returns a trainer that continues the run directory's newest usable checkpoint, or starts. Collective.

    Raises:
        ValueError: something that the user can mend: data, sizes, an engine that refuses a combination, checkpoints
            of which none is usable.
    """
    require_views(config.logging)
    if process.is_main and (unread := describe_unread(config)):
        logger.info(unread)
    root = directory.path / "checkpoints"
    on_saved = build_evaluation_job(config, directory.path)
    resumption = Resumption(root, process) if config.run.resume else None
    begins = resumption is None or resumption.saved is None
    stream = build_stream(config, process)
    check_length(config, stream.num_samples)
    training_step = _build_training_step(config, stream.num_samples, process, initialise=begins)
    saved = None
    if resumption is not None:

        def use_position(found: SavedRun) -> None:
            nonlocal stream
            stream = build_stream(config, process, found.progress.position)

        saved = resumption.put_back(training_step, use_position)
    progress = Progress() if saved is None else saved.progress
    if directory.made_with is not None:
        report_extension(config, directory.made_with, stream.num_samples, progress.step)
    return Trainer(
        config=config,
        directory=directory,
        process=process,
        num_samples=stream.num_samples,
        feed=_build_feed(config, process, stream),
        throughput=_build_throughput(config, process),
        training_step=training_step,
        store=_build_store(config, root, process, None if saved is None else progress.step, on_saved),
        progress=progress,
        record_position=RecordPosition() if saved is None else saved.record,
        provenance=_describe_origin(config, stream),
        probe=build_probe(config, process.device, process) if _probes_in_process(config) else None,
        preemption=preemption,
    )


def _build_store(
    config: PretrainConfig,
    root: Path,
    process: Process,
    newest_step: int | None,
    on_saved: Callable[[int, Path], None] | None,
) -> CheckpointStore:
    settings = config.checkpoint
    return CheckpointStore(
        root,
        process,
        keep_last=settings.keep_last,
        keep_every=settings.keep_every,
        asynchronous=settings.asynchronous,
        newest_step=newest_step,
        on_saved=on_saved,
        read_scores=partial(read_scores, root.parent) if settings.keep_best else None,
    )


def _describe_origin(config: PretrainConfig, stream: TrainingStream) -> dict[str, Any]:
    return collect_provenance() | {
        "config_hash": config_hash(config),
        "data_hash": stream.manifest.hash,
        "run": config.run.name,
        "mode": config.prototypes.mode,
    }


def _probes_in_process(config: PretrainConfig) -> bool:
    return config.evaluation.knn_every_steps > 0 and config.evaluation.runs_as == "process"


def build_stream(
    config: PretrainConfig, process: Process, position: dict[str, Any] | None = None
) -> TrainingStream:
    """Returns the stream of this rank's micro-batches from a position on, or from the start. Not collective.

    Raises:
        DataError: everything that can be wrong with the shards, the batch sizes or the position.
    """
    return TrainingStream(
        config.data,
        seed=config.run.seed,
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=config.batch.micro_batch_size_per_gpu(process.world_size),
        rank=process.rank,
        world_size=process.world_size,
        position=position,
        pin=process.device.type == "cuda",
    )


def _build_feed(config: PretrainConfig, process: Process, stream: TrainingStream) -> Feed:
    augmentation = DeviceAugmentation(config.data).to(process.device)
    return Feed(stream, augmentation, process.device, config.batch.gradient_accumulation_steps)


def _build_throughput(config: PretrainConfig, process: Process) -> Throughput:
    dtype = torch.bfloat16 if computes_in_bf16(config) else torch.float32
    flops, ceiling = count_flops(config), measure_product_ceiling(process.device, dtype)
    logger.info(
        "one image takes %.4g GFLOP (%.4g executed); matrix products in %s run at %.4g GFLOP/s here",
        flops.dense / 1e9,
        flops.executed / 1e9,
        "bf16" if dtype == torch.bfloat16 else "fp32",
        ceiling / 1e9,
    )
    return Throughput(
        global_batch_size=config.batch.global_batch_size,
        world_size=process.world_size,
        flops=flops,
        ceiling=ceiling,
    )


def _build_training_step(
    config: PretrainConfig, num_samples: int, process: Process, *, initialise: bool
) -> TrainingStep:
    check_crop_sizes(config)
    synchronization = Synchronization(process.world_size, process.timeout_s, process.device)
    sets = build_sets(config, num_samples, process, synchronization)
    engine = _build_engine(config, process, sets, initialise=initialise)
    return assemble_step(config, num_samples, process, synchronization, sets, engine)


def build_sets(
    config: PretrainConfig, num_samples: int, process: Process, synchronization: Synchronization
) -> list[PrototypeSet]:
    """Returns the sets of prototypes that the objective's terms compare rows with; `num_samples` are an epoch."""
    require_kernels(config, process.device)
    return [
        PrototypeSet(
            section,
            [level for level, of_level in config.levels.items() if of_level == section],
            _build_estimator(config, section, num_samples, process, synchronization),
            UsageCounter(config.prototypes_of(section).num_prototypes, device=process.device),
        )
        for section in dict.fromkeys(config.levels.values())
    ]


def check_before_images(config: PretrainConfig, process: Process) -> None:
    """Refuses what a start refuses without a look at the images, which may take hours to write. Not collective.

    Raises:
        ValueError: sizes, an architecture, a kernel or a file of mechanics.
    """
    config.batch.micro_batch_size_per_gpu(process.world_size)
    require_views(config.logging)
    require_kernels(config, process.device)
    own_engine(config)
    check_crop_sizes(config)


def require_kernels(config: PretrainConfig, device: torch.device) -> None:
    """Raises ValueError unless mixtures, posterior logits and compiled blocks get what they ask for on a device."""
    if config.model.compile_blocks:
        on_cpu = (
            None if shutil.which(os.environ.get("CXX", "g++")) else "no C++ compiler is found (CXX, or g++)"
        )
        missing = on_cpu if device.type == "cpu" else find_missing_tool()
        if missing is not None:
            raise ValueError(
                f"model.compile_blocks is true and {missing}; expected one for torch.compile on {device.type}; set "
                "model.compile_blocks=false"
            )
    for level in config.levels if config.engine.tf32 else ():
        # Its logits are differences of large numbers: with 10 bits a target moves by up to a tenth.
        if config.objective.term(level).logits == "posterior":
            raise ValueError(
                f"engine.tf32 is true; expected false with objective.{level}.logits posterior; set engine.tf32"
            )
    for section in dict.fromkeys(config.levels.values()):
        options = config.prototypes_of(section)
        if options.has_mixture:
            require_kernel(options.gmm.kernel, device, section)


def assemble_step(
    config: PretrainConfig,
    num_samples: int,
    process: Process,
    synchronization: Synchronization,
    sets: Sequence[PrototypeSet],
    engine: Engine,
) -> TrainingStep:
    """Returns the training step of an engine and the sets that its networks were built with."""
    return TrainingStep(
        engine=engine,
        sets=sets,
        objective=build_objective(
            config.objective,
            config.prototypes,
            config.patch_prototypes,
            seed=config.run.seed,
            steps_per_epoch=steps_per_epoch(config, num_samples),
            collectives=Collectives(
                process.rank, process.world_size, synchronization.reduce_sum, synchronization.gather
            ),
            mean_over_ranks=synchronization.mean_over_ranks,
        ).to(process.device),
        batch=config.batch,
        synchronization=synchronization,
        spike_guard=LossSpikeGuard(config.optim.spike_factor),
        patches=config.outputs.patches,
        drift=_build_drift_gauges(config, synchronization, sets, engine),
    )


def _build_drift_gauges(
    config: PretrainConfig, synchronization: Synchronization, sets: Sequence[PrototypeSet], engine: Engine
) -> list[DriftGauge]:
    """Returns a gauge for each set; where views and patches share one, it looks at the views."""
    num_patches = math.prod(config.data.mask_grid)
    return [
        DriftGauge(
            engine,
            one.estimator,
            rows_per_step=synchronization.world_size
            * _rows_per_rank(config, one.section, synchronization.world_size),
            every_steps=config.logging.every_steps,
            mean_over_ranks=synchronization.mean_over_ranks,
            num_patches=None if "instance" in one.levels else num_patches,
            prefix=one.prefix,
        )
        for one in sets
    ]


def _rows_per_rank(config: PretrainConfig, section: str, world_size: int) -> int:
    """Returns how many rows a section's prototypes are shown by one rank in one step, on average."""
    rows = round(config.rows_per_image(section) * config.batch.global_batch_size / world_size)
    return min(rows, config.prototypes_of(section).max_rows_per_rank or rows)


def _build_estimator(
    config: PretrainConfig,
    section: str,
    num_samples: int,
    process: Process,
    synchronization: Synchronization,
) -> PrototypeEstimator:
    options = config.prototypes_of(section)
    return build_estimator(
        options,
        # Prototypes of their own are others, also where there are as many.
        seed=config.run.seed + SECTIONS.index(section),
        num_observations_per_epoch=round(config.rows_per_image(section) * num_samples),
        total_steps=config.num_steps(num_samples),
        rank=process.rank,
        world_size=process.world_size,
        rows_per_rank=_rows_per_rank(config, section, process.world_size),
        reduce_sum=synchronization.reduce_sum,
        gather=synchronization.gather,
        device=process.device,
    )


def _build_engine(
    config: PretrainConfig, process: Process, sets: Sequence[PrototypeSet], *, initialise: bool
) -> Engine:
    """Builds student, teacher and engine; `initialise`: from `model.init` (not where a resume follows)."""
    # The same numbers on every rank: student and teacher start equal everywhere without a broadcast.
    seed_everything(config.run.seed, "initialisation")
    student = build_trained_network(config, "student", sets=sets)
    teacher = build_trained_network(config, "teacher", sets=sets)
    if initialise:
        source = find_source_checkpoint(config.model, process)
        initialise_network(config.model, source, student)
        for one in sets:
            initialise_estimator(config.model, source, one.estimator, f"{one.prefix}estimator")
    make_ready(config, student, teacher, process)
    return assemble_engine(config, student, teacher, process)


def make_ready(
    config: PretrainConfig, student: TrainedNetwork, teacher: TrainedNetwork, process: Process
) -> None:
    """Lets the teacher begin as the student, and prepares both for the device, in place. Not collective."""
    teacher.begin_as(student)
    teacher.requires_grad_(False)
    _synchronise_batch_norm(student, teacher, process)
    for network in (student, teacher):
        if config.model.compile_blocks:
            compile_blocks(network.network.backbone)
        network.to(process.device)


def assemble_engine(
    config: PretrainConfig, student: TrainedNetwork, teacher: TrainedNetwork, process: Process
) -> Engine:
    """Returns the run's engine of networks that are ready. Collective under sharded parameters."""
    arguments: dict[str, Any] = {
        "student": student,
        "teacher": teacher,
        "optim": config.optim,
        "world_size": process.world_size,
    }
    if config.engine.name == "fsdp2":
        from training.engines.fsdp import FSDPEngine

        return FSDPEngine(**arguments, precision=config.engine.precision)
    from training.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(**arguments, batch=config.batch, deepspeed_config=config.engine.deepspeed_config)


def build_trained_network(
    config: PretrainConfig, role: str, *, sets: Sequence[PrototypeSet]
) -> TrainedNetwork:
    """Returns the network of a role with the prototypes that the loss trains, fresh."""
    learned = {one.section: one.estimator.build_learned() for one in sets}
    network = SelfSupervisedNetwork(config.model, role, config.outputs)
    return TrainedNetwork(network, *(learned.get(section) for section in SECTIONS))


def _synchronise_batch_norm(student: TrainedNetwork, teacher: TrainedNetwork, process: Process) -> None:
    """BatchNorm statistics over all ranks on GPUs; torch's SyncBatchNorm has no CPU form."""
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in student.modules())
    if not has_batch_norm or process.world_size == 1:
        return
    if process.device.type != "cuda":
        logger.warning("BatchNorm on %d CPU ranks uses each rank's own statistics", process.world_size)
        return
    for network in (student, teacher):
        network.network = nn.SyncBatchNorm.convert_sync_batchnorm(network.network)
