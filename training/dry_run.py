"""What a run would be, before it costs anything: its cost, its steps, and what would be refused."""

from __future__ import annotations

import torch

from data.shards import DataError, load_manifest
from runtime.config import config_to_yaml
from runtime.distributed import Process
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
from training.prototype_sets import SECTIONS, estimator_name
from training.run_length import check_length

_GIB = 2**30
GPU_SIZES_GB = (80, 141)
# The forecast's assumptions: what a matrix product reaches on an H100 or H200, in bf16 and in fp32 without TF32, and
# which share of it the networks do. None of them is measured here.
ASSUMED_CEILING = {"bf16": 790e12, "fp32": 50e12}
ASSUMED_MFU = 0.4


def describe_run(config: PretrainConfig, process: Process) -> str:
    """Returns the resolved configuration and the run's cost as text. Not collective; takes no GPU memory.

    Raises:
        ValueError: sizes, an architecture, a start or a combination that cannot be; missing shards are only
            mentioned.
    """
    world_size = config.run.dry_run_world_size or process.world_size
    micro_batch = config.batch.micro_batch_size_per_gpu(world_size)
    check_crop_sizes(config)
    _try_initialisation(config)
    cost = measure_cost(config)
    num_samples = _count_samples(config)
    lines = [
        "--- configuration",
        config_to_yaml(config).rstrip(),
        "--- model",
        f"backbone parameters     {cost.backbone_parameters:>15,}",
        f"head parameters         {cost.head_parameters:>15,}",
        f"mask token, predictor   {cost.predictor_parameters:>15,}",
        f"trained prototypes      {cost.prototype_parameters:>15,}",
        f"FLOPs per image         {cost.dense_flops:>15.4g} dense, {cost.executed_flops:.4g} executed",
        "--- batch",
        f"global {config.batch.global_batch_size} = {micro_batch} images x "
        f"{config.batch.gradient_accumulation_steps} micro-batches x {world_size} ranks",
        *_describe_steps(config, num_samples),
        *_forecast(config, cost, world_size, num_samples),
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


def _count_samples(config: PretrainConfig) -> int | str:
    """Returns the images of an epoch, or why they are not known."""
    if config.data.images is not None:
        return "the first start that is no dry run writes data.images as shards"
    try:
        return load_manifest(config.data.shards, config.data.split).num_samples
    except DataError as error:
        return str(error)


def _describe_steps(config: PretrainConfig, num_samples: int | str) -> list[str]:
    if isinstance(num_samples, str):
        return [f"steps per epoch unknown: {num_samples}"]
    check_length(config, num_samples)
    per_epoch, steps = num_samples / config.batch.global_batch_size, config.num_steps(num_samples)
    return [f"{num_samples:,} images, {per_epoch:,.1f} steps per epoch, {steps:,} steps"]


def _forecast(config: PretrainConfig, cost: Cost, world_size: int, num_samples: int | str) -> list[str]:
    """Returns what speed and duration follow from the FLOPs under assumptions that are said."""
    precision = "bf16" if computes_in_bf16(config) else "fp32"
    ceiling = ASSUMED_CEILING[precision]
    per_rank = ASSUMED_MFU * ceiling / cost.dense_flops
    speed = f"{per_rank:,.0f} images/s a rank, {per_rank * world_size:,.0f} on {world_size} ranks"
    if isinstance(num_samples, int):
        num_images = config.batch.global_batch_size * config.num_steps(num_samples)
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
