"""What a run costs, counted on fake tensors: parameters, FLOPs, and the bytes of states, buffers and activations.

Shapes and dtypes are real and no memory is taken, so that a ViT-L is measured on a laptop. Memory is of states (what
the engines hold, tensor by tensor), of what autograd saves (counted by saved-tensor hooks on two and on four images:
what does not grow with the batch is told apart) and of the engine's buffers. The loss works in chunks of blocks and
holds less than a hundredth of the activations; the allocator's fragmentation and NCCL's own buffers come on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from data.views.masking import draw_mask, draw_predicted
from models.student_teacher import SelfSupervisedNetwork
from models.vit import compile_blocks
from prototypes.build import build_estimator
from prototypes.estimator import PrototypeEstimator
from training.config import OptimConfig, PretrainConfig
from training.engines.interface import TrainedNetwork
from training.engines.mechanics import read_mechanics
from training.engines.optimizer import MOMENTS_OF, build_parameter_groups, count_parameters
from training.engines.table import ENGINES, check_combination
from training.throughput import Flops

_FP32 = 4
_BF16 = 2
# What each engine cuts over ranks. DeepSpeed's stages 1 to 3 step on a flat fp32 copy of this rank's piece, `master`.
_CUT = {
    "parameters": ("zero3", "fsdp2"),
    "gradients": ("zero2", "zero3", "fsdp2"),
    "master": ("zero1", "zero2", "zero3"),
    "moments": ("zero1", "zero2", "zero3", "fsdp2"),
    "teacher": ("zero3", "fsdp2"),
}
_HAVE_MASTER = ("zero1", "zero2", "zero3")
# DeepSpeed's own values where the JSON file is silent.
_REDUCE_BUCKET_NUMEL = 5e8
_MAX_LIVE_NUMEL = 1e9
_PROBE_IMAGES = (2, 4)


@dataclass(frozen=True)
class Activations:
    """What autograd keeps for the backward pass.

    Attributes:
        per_image: bytes per image of the micro-batch; with activation checkpointing also what recomputing one block
            takes.
        fixed: bytes whatever the batch: under autocast the weights' bf16 copies.
    """

    per_image: float
    fixed: float


@dataclass(frozen=True)
class Cost:
    """The cost of one image, and the sizes of what a rank holds.

    Attributes:
        backbone_parameters: of the student's backbone.
        head_parameters: of its projection heads, one for views and maybe one for patches.
        predictor_parameters: of what the student has for patches that it does not see, and the teacher has not.
        prototype_parameters: prototypes that the encoder's loss trains; 0 in most modes.
        dense_flops: per image: student forward and backward on all crops, teacher forward on global crops.
        executed_flops: the same with recomputed activations and exact accumulation's second forward pass.
        activations: under DeepSpeed, which autocasts.
        fsdp2_activations: under FSDP2, whose mixed precision computes in bf16 alone and frees gathered weights.
        largest_unit_numel: parameters of the largest block, which engines that cut parameters gather at once.
        unsupported: engines that refuse this network or optimizer.
        estimator_bytes: state of the prototypes' estimators, and as much again: a dense step's candidate, or the
            natural parameters that sparse steps keep.
    """

    backbone_parameters: int
    head_parameters: int
    predictor_parameters: int
    prototype_parameters: int
    dense_flops: float
    executed_flops: float
    activations: Activations
    fsdp2_activations: Activations
    largest_unit_numel: int
    unsupported: tuple[str, ...]
    estimator_bytes: int

    @property
    def trained_parameters(self) -> int:
        """Everything that the optimizer moves."""
        return self.averaged_parameters + self.predictor_parameters

    @property
    def averaged_parameters(self) -> int:
        """What the teacher has as well."""
        return self.backbone_parameters + self.head_parameters + self.prototype_parameters


def measure_cost(config: PretrainConfig) -> Cost:
    """Returns the cost of one image and the sizes of states, counted on fake tensors.

    Raises:
        ValueError: the run's engine cannot train this network with this optimizer.
    """
    estimators = build_sized_estimators(config)
    state = [
        value
        for estimator in estimators.values()
        for value in estimator.state_dict().values()
        if isinstance(value, Tensor)
    ]
    learned = [module for one in estimators.values() if (module := one.build_learned()) is not None]
    network = build_student_on_meta(config)
    refused = _find_refusals(config)
    bf16 = computes_in_bf16(config)
    fsdp2_network = build_student_on_meta(config)
    if bf16:
        fsdp2_network.to(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = network.to_empty(device="cpu")
        flops = _count_flops(config, network)
        activations = _measure_activations(config, network, autocast=bf16)
        fsdp2 = _measure_activations(config, fsdp2_network.to_empty(device="cpu"), autocast=False)
    heads = [head for head in (network.projection_head, network.patch_head) if head is not None]
    units = [*getattr(network.backbone, "blocks", ()), *heads]
    units += [] if network.predictor is None else [network.predictor]
    num_averaged = sum(map(count_parameters, (network.backbone, *heads)))
    return Cost(
        backbone_parameters=count_parameters(network.backbone),
        head_parameters=sum(map(count_parameters, heads)),
        predictor_parameters=count_parameters(network) - num_averaged,
        prototype_parameters=sum(map(count_parameters, learned)),
        dense_flops=flops.dense,
        executed_flops=flops.executed,
        activations=activations,
        fsdp2_activations=replace(fsdp2, fixed=0.0),
        largest_unit_numel=max(map(count_parameters, units)),
        unsupported=refused,
        estimator_bytes=2 * sum(value.numel() * value.element_size() for value in state),
    )


def state_bytes(optim: OptimConfig, cost: Cost, engine: str, world_size: int) -> dict[str, float]:
    """Returns bytes per rank of every state at the end of the backward pass, when a rank holds most.

    Args:
        optim: whose moments are counted.
        cost: from `measure_cost`.
        engine: one of `training.engine_table.ENGINES`.
        world_size: number of ranks.
    """
    whole = cost.trained_parameters * _FP32
    sizes = {
        "parameters": whole,
        "gradients": whole,
        "master": whole if engine in _HAVE_MASTER else 0,
        "moments": len(MOMENTS_OF[optim.optimizer]) * whole,
        "teacher": cost.averaged_parameters * _FP32,
    }
    cut = {part: size / (world_size if engine in _CUT[part] else 1) for part, size in sizes.items()}
    return cut | {"estimator": float(cost.estimator_bytes)}


def buffer_bytes(config: PretrainConfig, cost: Cost, engine: str) -> float:
    """Returns bytes per rank of what an engine holds beside states: buckets of gradients, gathered parameters."""
    if engine == "zero0":
        return 0.0
    if engine == "fsdp2":
        # The unit at work and the next one, gathered; their gradients, whole until they are reduced.
        width = _BF16 if computes_in_bf16(config) else _FP32
        return 2.0 * cost.largest_unit_numel * (width + _FP32)
    zero = _mechanics(config, engine).get("zero_optimization", {})
    bucket = float(zero.get("reduce_bucket_size", _REDUCE_BUCKET_NUMEL)) * _FP32
    if engine == "zero3":
        live = min(float(zero.get("stage3_max_live_parameters", _MAX_LIVE_NUMEL)), cost.trained_parameters)
        return bucket + live * _FP32
    return bucket


def waiting_bytes(config: PretrainConfig, micro_batch: int) -> float:
    """Returns bytes per rank on a GPU of what waits beside the micro-batch at work.

    Crops and rows of the step's other micro-batches, and the next step's crops, which are prepared meanwhile.
    """
    data, accumulation = config.data, config.batch.gradient_accumulation_steps
    views = data.num_global_crops + data.num_local_crops
    pixels = data.num_global_crops * math.prod(data.global_size) + data.num_local_crops * math.prod(
        data.local_size
    )
    # The student's rows and the gradient at them, and the teacher's rows.
    rows = float((2 * views + data.num_global_crops) * config.prototypes.dim)
    if "patch" in config.levels:
        section = config.levels["patch"]
        rows += 3 * config.patch_rows_per_image * config.prototypes_of(section).dim
    numel = (2 * accumulation - 1) * config.model.channels * pixels + (accumulation - 1) * rows
    return float(micro_batch * numel * _FP32)


def own_engine(config: PretrainConfig) -> str:
    """Returns the engine of the run, one of `training.engine_table.ENGINES`."""
    if config.engine.name == "fsdp2":
        return "fsdp2"
    return f"zero{_mechanics(config).get('zero_optimization', {}).get('stage', 0)}"


def _mechanics(config: PretrainConfig, engine: str | None = None) -> dict[str, Any]:
    """The run's own JSON file, or the one of ours that another engine would be run with."""
    path = config.engine.deepspeed_config
    if engine is not None and engine != own_engine(config):
        path = f"ds_configs/{engine}_{'bf16' if computes_in_bf16(config) else 'fp32'}.json"
    elif config.engine.name == "fsdp2":
        return {}
    return read_mechanics(path)


def build_student_on_meta(config: PretrainConfig) -> SelfSupervisedNetwork:
    """The student without numbers. Initialisers read what fake tensors do not have, hence the meta device.

    Drop path comes afterwards: timm computes its rates with a tensor.
    """
    rate = config.model.drop_path_rate
    with torch.device("meta"):
        model = replace(config.model, drop_path_rate=0.0)
        network = SelfSupervisedNetwork(model, "student", config.outputs)
    for block in getattr(network.backbone, "blocks", ()) if rate else ():
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, DropPath(rate))
    return network


def _fake_inputs(
    config: PretrainConfig, num_images: int, dtype: torch.dtype = torch.float32, role: str = "student"
) -> tuple[list[Tensor], dict[str, Tensor] | None]:
    """Returns crops of so many images and, for a term on patches, as many patches as there are on average."""
    data, channels = config.data, config.model.channels
    num_crops = data.num_global_crops * num_images
    crops = [torch.empty(num_crops, channels, *data.global_size, dtype=dtype)]
    if data.num_local_crops and role == "student":
        crops.append(torch.empty(data.num_local_crops * num_images, channels, *data.local_size, dtype=dtype))
    if config.outputs.patches == "none":
        return crops, None
    num_patches = math.prod(data.mask_grid)

    def fake(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    rows = {"rows": fake(round(num_images * config.patch_rows_per_image))}
    if role == "teacher":
        return crops, rows
    if config.outputs.patches == "hidden":
        return crops, rows | {"hidden": fake(num_crops, num_patches, dtype=torch.bool)}
    # As many of every crop: any key will do.
    hidden = draw_mask(data.masks, 0, data.mask_grid)
    predicted = draw_predicted(data.masks, 0, hidden)
    numbers = {"visible": num_patches - int(hidden.sum()), "predicted": int(predicted.sum())}
    return crops, {name: fake(num_crops, number) for name, number in numbers.items()}


def count_flops(config: PretrainConfig) -> Flops:
    """Returns the FLOPs of one image, counted on fake tensors."""
    network = build_student_on_meta(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _count_flops(config, network.to_empty(device="cpu"))


def _count_flops(config: PretrainConfig, network: nn.Module) -> Flops:
    """Counts forward passes of fake numbers; a backward pass is twice a forward pass."""
    num_images = _PROBE_IMAGES[0]
    counts = []
    for role in ("teacher", "student"):
        crops, patches = _fake_inputs(config, num_images, role=role)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(crops, patches)
        counts.append(counter.get_total_flops() / num_images)
    teacher, student = counts
    num_repeats = int(config.model.activation_checkpointing) + int(config.batch.runs_student_twice)
    return Flops(dense=3 * student + teacher, executed=(3 + num_repeats) * student + teacher)


def _measure_activations(
    config: PretrainConfig, network: SelfSupervisedNetwork, *, autocast: bool
) -> Activations:
    per_image, fixed = _saved_bytes(config, network, autocast)
    if not config.model.activation_checkpointing:
        return Activations(per_image, fixed)
    network.backbone.set_grad_checkpointing(False)  # type: ignore[operator]
    whole, _ = _saved_bytes(config, network, autocast)
    network.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    # timm recomputes a ViT by blocks and a ResNet by its four stages.
    num_units = len(getattr(network.backbone, "blocks", ())) or 4
    return Activations(per_image + (whole - per_image) / num_units, fixed)


def _saved_bytes(config: PretrainConfig, network: nn.Module, autocast: bool) -> tuple[float, float]:
    """Returns (bytes per image, bytes whatever the batch) that a forward pass keeps, parameters left out."""
    dtype = next(network.parameters()).dtype
    sums = []
    for num_images in _PROBE_IMAGES:
        crops, patches = _fake_inputs(config, num_images, dtype)
        with (
            _counting_saved_tensors(network) as saved,
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            network(crops, patches)
        sums.append(sum(saved.values()))
    few, many = _PROBE_IMAGES
    per_image = (sums[1] - sums[0]) / (many - few)
    return per_image, max(0.0, sums[0] - few * per_image)


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


def computes_in_bf16(config: PretrainConfig) -> bool:
    """Returns whether the run's networks compute in bf16; else in fp32."""
    if config.engine.name == "fsdp2":
        return config.engine.precision == "bf16"
    return bool(_mechanics(config).get("torch_autocast", {}).get("enabled", False))


def build_sized_estimators(config: PretrainConfig) -> dict[str, PrototypeEstimator]:
    """Returns the run's estimators by section, for what they hold; their schedules are not the run's."""
    return {
        section: build_estimator(
            config.prototypes_of(section),
            seed=config.run.seed,
            num_observations_per_epoch=10**6,
            total_steps=1000,
        )
        for section in dict.fromkeys(config.levels.values())
    }


def _find_refusals(config: PretrainConfig) -> tuple[str, ...]:
    """Returns the engines that refuse this run.

    Raises:
        ValueError: the run's own engine is among them, or its optimizer has a rate for what the network lacks.
    """
    network = build_student_on_meta(config)  # its own: the counts are of eager blocks
    if config.model.compile_blocks:
        compile_blocks(network.backbone)
    check_combination(own_engine(config), config.optim.optimizer, network)
    build_parameter_groups(TrainedNetwork(network, None), config.optim)
    refused = []
    for engine in ENGINES:
        try:
            check_combination(engine, config.optim.optimizer, network)
        except ValueError:
            refused.append(engine)
    return tuple(refused)
