"""What a run would be, before it costs anything: parameters, FLOPs, memory per rank, batch and steps.

Networks are built from fake tensors: shapes and dtypes are real, no memory is taken, so that a ViT-L is described on
a laptop. Figures for memory are of states (exact) and of what autograd saves (counted by saved-tensor hooks on one
micro-batch of two images, then scaled); allocator fragmentation and communication buffers come on top.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from data.shards import DataError, load_manifest
from models.student_teacher import SelfSupervisedNetwork
from prototypes.estimator import build_estimator
from runtime.config import config_to_yaml
from runtime.distributed import Process
from training.config import PretrainConfig
from training.optimizer import count_parameters

_GIB = 2**30
_FP32 = 4
# What DeepSpeed's stages and FSDP2 cut over ranks.
_CUT = {
    "parameters": (3,),
    "gradients": (2, 3),
    "moments": (1, 2, 3),
    "teacher": (3,),
}
GPU_SIZES_GB = (80, 141)
_PROBE_IMAGES = 2


@dataclass(frozen=True)
class Cost:
    """The cost of one image, and the sizes of what a rank holds.

    Attributes:
        backbone_parameters: of the student's backbone.
        head_parameters: of its projection head.
        prototype_parameters: prototypes that the encoder's loss trains; 0 in most modes.
        dense_flops: per image: student forward and backward on all crops, teacher forward on global crops.
        executed_flops: the same with recomputed activations.
        activation_bytes: per image of the micro-batch, what autograd keeps for the backward pass.
        estimator_bytes: state and candidate of the prototypes' estimator.
    """

    backbone_parameters: int
    head_parameters: int
    prototype_parameters: int
    dense_flops: float
    executed_flops: float
    activation_bytes: float
    estimator_bytes: int

    @property
    def trained_parameters(self) -> int:
        """Everything that the optimizer moves."""
        return self.backbone_parameters + self.head_parameters + self.prototype_parameters


def describe_run(config: PretrainConfig, process: Process) -> str:
    """Returns the resolved configuration and the run's cost as text. Not collective; takes no GPU memory.

    Raises:
        ValueError: sizes or an architecture that cannot be; missing shards are only mentioned.
    """
    world_size = config.run.dry_run_world_size or process.world_size
    micro_batch = config.batch.micro_batch_size_per_gpu(world_size)
    cost = measure_cost(config)
    lines = [
        "--- configuration",
        config_to_yaml(config).rstrip(),
        "--- model",
        f"backbone parameters     {cost.backbone_parameters:>15,}",
        f"head parameters         {cost.head_parameters:>15,}",
        f"trained prototypes      {cost.prototype_parameters:>15,}",
        f"FLOPs per image         {cost.dense_flops:>15.4g} dense, {cost.executed_flops:.4g} executed",
        "--- batch",
        f"global {config.batch.global_batch_size} = {micro_batch} images x "
        f"{config.batch.gradient_accumulation_steps} micro-batches x {world_size} ranks",
        *_describe_steps(config),
        f"--- memory per rank (GiB) at {micro_batch} images, {world_size} ranks",
        *_describe_memory(config, cost, micro_batch, world_size),
    ]
    return "\n".join(lines) + "\n"


def measure_cost(config: PretrainConfig) -> Cost:
    """Returns the cost of one image and the sizes of states, counted on fake tensors."""
    estimator = build_estimator(
        config.prototypes, seed=config.run.seed, num_observations_per_epoch=10**6, total_steps=1000
    )
    state = [value for value in estimator.state_dict().values() if isinstance(value, Tensor)]
    learned = estimator.build_learned()
    network = _build_student_on_meta(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = network.to_empty(device="cpu")
        crops = _fake_crops(config)
        with FlopCounterMode(display=False) as teacher_counter, torch.no_grad():
            network(crops[:1])
        with FlopCounterMode(display=False) as student_counter, torch.no_grad():
            network(crops)
        activation_bytes = _saved_bytes(network, crops, bf16=_computes_in_bf16(config))
    teacher = teacher_counter.get_total_flops() / _PROBE_IMAGES
    student = student_counter.get_total_flops() / _PROBE_IMAGES
    recomputed = student if config.model.activation_checkpointing else 0.0
    return Cost(
        backbone_parameters=count_parameters(network.backbone),
        head_parameters=count_parameters(network.projection_head),
        prototype_parameters=0 if learned is None else count_parameters(learned),
        dense_flops=3 * student + teacher,
        executed_flops=3 * student + recomputed + teacher,
        activation_bytes=activation_bytes / _PROBE_IMAGES,
        estimator_bytes=2 * sum(value.numel() * value.element_size() for value in state),
    )


def state_bytes(cost: Cost, stage: int, world_size: int) -> dict[str, float]:
    """Returns bytes per rank of every state under a ZeRO stage (FSDP2 cuts as stage 3 does)."""
    whole = {
        "parameters": cost.trained_parameters * _FP32,
        "gradients": cost.trained_parameters * _FP32,
        "moments": 2 * cost.trained_parameters * _FP32,
        "teacher": cost.trained_parameters * _FP32,
    }
    cut = {part: size / (world_size if stage in _CUT[part] else 1) for part, size in whole.items()}
    return cut | {"estimator": float(cost.estimator_bytes)}


def zero_stage(config: PretrainConfig) -> int:
    """Returns the ZeRO stage of the run; 3 for FSDP2, which cuts the same parts."""
    if config.engine.name == "fsdp2":
        return 3
    path = Path(config.engine.deepspeed_config)
    if not path.is_file():
        raise ValueError(
            f"engine.deepspeed_config is {str(path)!r}; expected a JSON file; set engine.deepspeed_config"
        )
    return int(json.loads(path.read_text()).get("zero_optimization", {}).get("stage", 0))


def _describe_steps(config: PretrainConfig) -> list[str]:
    try:
        num_samples = load_manifest(config.data.shards, config.data.split).num_samples
    except DataError as error:
        return [f"steps per epoch unknown: {error}"]
    per_epoch = num_samples / config.batch.global_batch_size
    return [
        f"{num_samples:,} images, {per_epoch:,.1f} steps per epoch, {config.num_steps(num_samples):,} steps"
    ]


def _describe_memory(config: PretrainConfig, cost: Cost, micro_batch: int, world_size: int) -> list[str]:
    own = zero_stage(config)
    activations = cost.activation_bytes * micro_batch
    lines = []
    for stage in (0, 1, 2, 3):
        parts = state_bytes(cost, stage, world_size) | {"activations": activations}
        total = sum(parts.values())
        fits = [f"{size} GB" for size in GPU_SIZES_GB if total < size * 1e9]
        text = "  ".join(f"{name} {size / _GIB:.2f}" for name, size in parts.items())
        mark = "*" if stage == own else " "
        verdict = f"fits {', '.join(fits)}" if fits else "fits no listed GPU: lower the micro-batch"
        lines.append(f"{mark} ZeRO-{stage}  {text}  = {total / _GIB:.2f}  {verdict}")
    return [*lines, "  (* = this configuration; FSDP2 cuts like ZeRO-3)"]


def _build_student_on_meta(config: PretrainConfig) -> SelfSupervisedNetwork:
    """The student without numbers. Initialisers read what fake tensors do not have, hence the meta device.

    Drop path comes afterwards: timm computes its rates with a tensor.
    """
    rate = config.model.drop_path_rate
    with torch.device("meta"):
        network = SelfSupervisedNetwork(replace(config.model, drop_path_rate=0.0), "student")
    for block in getattr(network.backbone, "blocks", ()) if rate else ():
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, DropPath(rate))
    return network


def _fake_crops(config: PretrainConfig) -> list[Tensor]:
    data, channels = config.data, config.model.channels
    size = data.global_crop_size
    crops = [torch.empty(data.num_global_crops * _PROBE_IMAGES, channels, size, size)]
    if data.num_local_crops:
        size = data.local_crop_size
        crops.append(torch.empty(data.num_local_crops * _PROBE_IMAGES, channels, size, size))
    return crops


def _saved_bytes(network: nn.Module, crops: list[Tensor], *, bf16: bool) -> int:
    """Returns the bytes that a forward pass keeps for its backward pass, parameters left out."""
    with _counting_saved_tensors(network) as saved, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        network(crops)
    return sum(saved.values())


@contextmanager
def _counting_saved_tensors(network: nn.Module) -> Iterator[dict[int, int]]:
    parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # alive until the count is done: a freed storage's address would be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _computes_in_bf16(config: PretrainConfig) -> bool:
    if config.engine.name == "fsdp2":
        return config.engine.precision == "bf16"
    path = Path(config.engine.deepspeed_config)
    return path.is_file() and bool(
        json.loads(path.read_text()).get("torch_autocast", {}).get("enabled", False)
    )
