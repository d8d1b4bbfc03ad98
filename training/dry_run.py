"""What a run would be, before it costs anything: its cost, its steps, and what would be refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.shards import DataError
from data.stream.remote import is_remote
from data.writing.folder_shards import find_folder_shards
from data.writing.image_sources import FileSource
from runtime.config import config_to_yaml
from runtime.distributed import Process, choose_device
from training.build import build_stream, require_kernels
from training.config import PretrainConfig
from training.cost import (
    Cost,
    buffer_bytes,
    build_sized_estimators,
    build_student_on_meta,
    computes_in_bf16,
    measure_cost,
    own_engine,
    state_bytes,
    waiting_bytes,
)
from training.engines.interface import TrainedNetwork
from training.engines.table import ENGINES
from training.initialisation import (
    check_crop_sizes,
    find_source_checkpoint,
    initialise_estimator,
    initialise_network,
)
from training.metrics import require_views
from training.prototype_sets import SECTIONS, estimator_name
from training.run_length import check_length
from training.unread import describe_unread

BuildProbe = Callable[[PretrainConfig, torch.device, Process], object]

_GIB = 2**30
GPU_SIZES_GB = (80, 141)
# The forecast's assumptions: what a matrix product reaches on an H100 or H200, in bf16 and in fp32 without TF32, and
# which share of it the networks do. None of them is measured here.
ASSUMED_CEILING = {"bf16": 790e12, "fp32": 50e12}
ASSUMED_MFU = 0.4


def describe_run(config: PretrainConfig, process: Process, build_probe: BuildProbe | None = None) -> str:
    """Returns the resolved configuration and the run's cost as text. Not collective; takes no GPU memory.

    Args:
        config: of the run.
        process: this one.
        build_probe: as `training.build.build_trainer` takes it; refuses splits that the probe cannot use.

    Raises:
        ValueError: sizes, an architecture, a start, images or a combination that a run refuses; missing images are
            only mentioned.
    """
    world_size = config.run.dry_run_world_size or process.world_size
    micro_batch = config.batch.micro_batch_size_per_gpu(world_size)
    config.data.check_ranks(world_size)
    if config.run.dry_run_world_size is None:  # else the run is not meant for this machine
        require_views(config.logging)
        visible = torch.cuda.device_count()
        require_kernels(config, choose_device(config.run.device, process.local_rank, visible))
    check_crop_sizes(config)
    images = _find_images(config, world_size, build_probe if config.evaluation.knn_every_steps else None)
    _try_initialisation(config)
    cost = measure_cost(config)
    lines = [
        "--- configuration",
        config_to_yaml(config).rstrip(),
        *([f"# {unread}"] if (unread := describe_unread(config)) else []),
        "--- model",
        f"backbone parameters     {cost.backbone_parameters:>15,}",
        f"head parameters         {cost.head_parameters:>15,}",
        f"mask token, predictor   {cost.predictor_parameters:>15,}",
        f"trained prototypes      {cost.prototype_parameters:>15,}",
        f"FLOPs per image         {cost.dense_flops:>15.4g} dense, {cost.executed_flops:.4g} executed",
        "--- batch",
        f"global {config.batch.global_batch_size} = {micro_batch} images x "
        f"{config.batch.gradient_accumulation_steps} micro-batches x {world_size} ranks",
        *_describe_steps(config, images),
        *_forecast(config, cost, world_size, images),
        f"--- memory per rank (GiB) at {micro_batch} images, {world_size} ranks",
        *_describe_memory(config, cost, micro_batch, world_size),
    ]
    return "\n".join(lines) + "\n"


def _try_initialisation(config: PretrainConfig) -> None:
    """Does what a start from `model.init` does but for writing into the network, which has no numbers here."""
    if config.model.init == "random":
        return
    estimators = build_sized_estimators(config)
    learned = {section: estimator.build_learned() for section, estimator in estimators.items()}
    network = build_student_on_meta(config)
    student = TrainedNetwork(network, *(learned.get(section) for section in SECTIONS))
    # Asked by one process alone, whatever the launcher: a dry run is not collective.
    source = find_source_checkpoint(config.model, Process(0, 1, 0, torch.device("cpu")))
    initialise_network(config.model, source, student)
    for section, estimator in estimators.items():
        initialise_estimator(config.model, source, estimator, estimator_name(section))


@dataclass(frozen=True)
class _Images:
    """The images of an epoch; None where they are not known, and a remark on that."""

    number: int | None
    remark: str = ""


def _find_images(config: PretrainConfig, world_size: int, build_probe: BuildProbe | None) -> _Images:
    """Returns how many images an epoch has. Writes nothing and asks nothing of a remote store.

    Raises:
        ValueError: they are there, and a run of so many ranks refuses them.
    """
    data = config.data
    if data.images is not None:
        if not Path(data.images).exists():
            return _Images(None, f"data.images is {data.images!r}, which is not there")
        found = find_folder_shards(data.images, data.cache_dir)
        if not found.is_made:
            return _count_unwritten(config, found.sources)
        data = replace(data, images=None, shards=str(found.directory))
    place = Path(data.written_shards)
    if is_remote(data.written_shards):
        return _Images(None, f"data.shards is {data.written_shards!r}, which a dry run does not fetch")
    if not (place.parent if place.suffix == ".tar" else place).exists():
        return _Images(None, f"data.shards is {data.written_shards!r}, which is not there")
    # What a start does, but for a rank that is this process.
    alone = Process(0, world_size, 0, torch.device("cpu"))
    config = replace(config, data=data)
    number = build_stream(config, alone).num_samples
    check_length(config, number)
    if build_probe is not None:
        build_probe(config, alone.device, alone)
    return _Images(number)


def _count_unwritten(config: PretrainConfig, sources: Mapping[str, FileSource]) -> _Images:
    wanted, probe = {"data.split": config.data.split}, config.evaluation
    if probe.knn_every_steps:
        wanted["evaluation.test_split"] = probe.test_split
    for option, split in wanted.items():
        if split not in sources:
            raise DataError(
                f"{option} is {split!r}; expected one of {config.data.images}: {', '.join(sources)}; set {option}"
            )
    number = len(sources[config.data.split])
    if probe.knn_every_steps and not sources[config.data.split].classes:
        raise DataError(
            f"evaluation.knn_every_steps is {probe.knn_every_steps}; expected 0, as {config.data.images} holds no "
            "folders of classes; set evaluation.knn_every_steps"
        )
    check_length(config, number)
    return _Images(
        number, "at most: the first start that is no dry run writes them as shards, without bad ones"
    )


def _describe_steps(config: PretrainConfig, images: _Images) -> list[str]:
    if images.number is None:
        return [f"steps per epoch unknown: {images.remark}"]
    per_epoch, steps = images.number / config.batch.global_batch_size, config.num_steps(images.number)
    text = f"{images.number:,} images, {per_epoch:,.1f} steps per epoch, {steps:,} steps"
    return [f"{text} ({images.remark})" if images.remark else text]


def _forecast(config: PretrainConfig, cost: Cost, world_size: int, images: _Images) -> list[str]:
    """Returns what speed and duration follow from the FLOPs under assumptions that are said."""
    precision = "bf16" if computes_in_bf16(config) else "fp32"
    ceiling = ASSUMED_CEILING[precision]
    per_rank = ASSUMED_MFU * ceiling / cost.dense_flops
    speed = f"{per_rank:,.0f} images/s a rank, {per_rank * world_size:,.0f} on {world_size} ranks"
    if images.number is not None:
        num_images = config.batch.global_batch_size * config.num_steps(images.number)
        speed += f": {num_images / (per_rank * world_size) / 3600:,.2f} h for this run"
    return [
        "--- forecast for GPUs, assumed and not measured",
        f"{ASSUMED_MFU:.0%} of a product's {ceiling / 1e12:.0f} TFLOP/s ({precision}, H100 or H200): {speed}",
        "(a run measures its own: throughput/mfu_dense, throughput/ceiling_tflops)",
    ]


def _describe_memory(config: PretrainConfig, cost: Cost, micro_batch: int, world_size: int) -> list[str]:
    own = own_engine(config)
    lines = []
    for engine in ENGINES:
        activations = cost.fsdp2_activations if engine == "fsdp2" else cost.activations
        parts = state_bytes(config.optim, cost, engine, world_size) | {
            "activations": activations.per_image * micro_batch + activations.fixed,
            "buffers": buffer_bytes(config, cost, engine),
            "waiting": waiting_bytes(config, micro_batch),
        }
        total = sum(parts.values())
        fits = [f"{size} GB" for size in GPU_SIZES_GB if total < size * 1e9]
        text = "  ".join(f"{name} {size / _GIB:.2f}" for name, size in parts.items())
        mark = "*" if engine == own else " "
        if engine in cost.unsupported:
            lines.append(f"  {engine}  not supported for this network and optimizer")
            continue
        verdict = f"fits {', '.join(fits)}" if fits else "fits no listed GPU: lower the micro-batch"
        lines.append(f"{mark} {engine}  {text}  = {total / _GIB:.2f}  {verdict}")
    return [*lines, "  (* = this configuration)"]
