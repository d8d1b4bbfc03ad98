"""What the tests of engines run on every rank: a tiny student and teacher, trained on numbers drawn from the step.

The global batch of a step is the same for any number of ranks. `python -m tests.helpers.engine_scenarios` runs
the scenarios that a JSON file lists, in one process group, and writes what they found to another.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

from data.views.augmentations import Crops
from evaluation.probes.knn import build_knn_probe
from models.config import HeadConfig, ModelConfig
from models.student_teacher import SelfSupervisedNetwork
from models.vit import compile_blocks
from prototypes.config import CouplingConfig, InstanceConfig, PatchConfig, Targets
from prototypes.config import Mode as PrototypeMode
from prototypes.mixture import sparse
from runtime import distributed
from runtime.distributed import Process
from tests.helpers.counting import DeviceCounter
from tests.helpers.terms import build_config, masks_of, part_of, spread_
from training.build import assemble_step, build_sets, build_trained_network
from training.checkpoints.saved_run import read_saved_run, restore
from training.checkpoints.snapshot import Progress, RecordPosition, Snapshot
from training.checkpoints.state_files import ConsolidatedState, collect_share, save_tensors, share_path
from training.checkpoints.store import find_latest_checkpoint, save_checkpoint
from training.config import BatchConfig, OptimConfig, PretrainConfig
from training.engines.interface import Engine, TrainedNetwork
from training.engines.synchronization import Synchronization
from training.schedules import StepSchedule
from training.step import TrainingStep

GLOBAL_BATCH = 8
NUM_SAMPLES = 500
ENGINES = ("zero0", "zero1", "zero2", "zero3", "fsdp2")
# ZeRO-3 keeps smaller parameters whole by default; this tiny model shall have both kinds.
STAGE3_THRESHOLD = 200
SCHEDULE = StepSchedule(lr=1e-2, weight_decay=0.1, ema_momentum=0.9)

VIT = ModelConfig(
    name="vit_tiny_patch16_224",
    image_size=16,
    patch_size=8,
    embed_dim=24,
    depth=2,
    num_heads=2,
    channels=1,
    head=HeadConfig(num_layers=2, hidden_dim=33, projection_dim=10),
)


# Wide enough that what engines keep beside weights (padding, counters) is below one part in a hundred.
WIDE = replace(VIT, embed_dim=192, depth=4, num_heads=4, head=HeadConfig(num_layers=2, hidden_dim=256))
BUCKET_NUMEL = 10**6


class LearnedRows(nn.Module):
    """Prototypes that the loss trains: unit rows [K, P]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, dim))

    def forward(self) -> Tensor:
        return nn.functional.normalize(self.weight, dim=1)


def build_engine(
    name: str,
    process: Process,
    work: Path,
    *,
    precision: str = "fp32",
    accumulation: int = 1,
    model: ModelConfig = VIT,
    optimizer: Literal["adamw", "lars"] = "adamw",
    build_network: Callable[[str], TrainedNetwork] | None = None,
    spread: float = 1.0,
    **optim: Any,
) -> Engine:
    """Builds one engine; `spread` widens the projections of a fresh head, which are almost equal."""
    torch.manual_seed(0)
    if build_network is None:
        student, teacher = (
            TrainedNetwork(SelfSupervisedNetwork(model, role), LearnedRows(model.head.projection_dim))
            for role in ("student", "teacher")
        )
    else:
        student, teacher = build_network("student"), build_network("teacher")
    spread_(student, spread)
    teacher.begin_as(student)
    teacher.requires_grad_(False)
    if model.compile_blocks:
        compile_blocks(student.network.backbone)
        compile_blocks(teacher.network.backbone)
    arguments: dict[str, Any] = {
        "student": student.to(process.device),
        "teacher": teacher.to(process.device),
        "optim": OptimConfig(**{"clip_grad_norm": 1.0, "optimizer": optimizer, **optim}),
        "world_size": process.world_size,
    }
    if name == "fsdp2":
        from training.engines.fsdp import FSDPEngine

        return FSDPEngine(**arguments, precision=precision)
    from training.engines.deepspeed import DeepSpeedEngine

    mechanics: dict[str, Any] = {
        "zero_optimization": {"stage": int(name[-1]), "reduce_bucket_size": BUCKET_NUMEL}
    }
    if name == "zero3":
        mechanics["zero_optimization"]["stage3_param_persistence_threshold"] = STAGE3_THRESHOLD
    if precision == "bf16":
        mechanics["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    path = work / f"{name}-{precision}-{process.rank}.json"
    path.write_text(json.dumps(mechanics))
    batch = BatchConfig(global_batch_size=GLOBAL_BATCH, gradient_accumulation_steps=accumulation)
    return DeepSpeedEngine(**arguments, batch=batch, deepspeed_config=str(path))


def crops_of(step: int, micro_step: int, process: Process, accumulation: int) -> list[Tensor]:
    """This rank's part of the micro-batch: two resolutions."""
    generator = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(GLOBAL_BATCH, 1, 16, 16, generator=generator)
    parts = process.world_size * accumulation
    mine = images.chunk(parts)[micro_step * process.world_size + process.rank].to(process.device)
    return [mine, mine[:, :, :8, 4:12].contiguous()]


def train_step(
    engine: Engine, step: int, process: Process, *, accumulation: int = 1, poison: str | None = None
) -> dict[str, float]:
    """One step; returns mean loss over ranks, gradient norm, and whether it was applied."""
    losses = []
    for micro_step in range(accumulation):
        crops = crops_of(step, micro_step, process, accumulation)
        target = engine.forward_teacher(crops)
        output = engine.forward_student(crops)
        assert output.learned_prototypes is not None and target.learned_prototypes is not None
        logits = output.projections @ output.learned_prototypes.T
        goal = (target.projections.roll(1, 1) @ target.learned_prototypes.T).softmax(1)
        loss = nn.functional.cross_entropy(logits, goal)
        if poison is not None and micro_step == accumulation - 1 and process.rank == process.world_size - 1:
            loss = loss * float(poison)
        engine.backward(loss / accumulation, is_last_micro_step=micro_step == accumulation - 1)
        losses.append(loss.detach())
    applied = bool(engine.gradients_are_finite())
    norm = 0.0
    if applied:
        norm = float(engine.step(SCHEDULE))
        engine.update_teacher(0.9)
    else:
        engine.skip()
    mean = torch.stack(losses).mean()
    return {
        "loss": sum(process.all_gather_object(float(mean))) / process.world_size,
        "norm": norm,
        "applied": applied,
    }


def whole_state(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.iterate_state()}


def save(engine: Engine, root: Path, step: int, process: Process) -> None:
    share = collect_share(engine.iterate_state(), process.rank, process.world_size)
    path = share_path(Path(), process.rank, process.world_size)
    outcome = save_checkpoint(root, step, lambda d: save_tensors(d / path, share), process, keep_last=10)
    assert outcome.path is not None, outcome.error


def load(engine: Engine, root: Path, process: Process) -> None:
    checkpoint = find_latest_checkpoint(root, process)
    assert checkpoint is not None
    engine.load_state(ConsolidatedState(checkpoint))


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose bits differ; different sets of names count too."""
    return sorted({n for n in a.keys() & b.keys() if not torch.equal(a[n], b[n])} | (a.keys() ^ b.keys()))


def resume_twice(
    engine_name: str, process: Process, work: Path, accumulation: int, precision: str, variant: str = ""
) -> dict[str, Any]:
    """6 steps at once against 2 + 2 + 2 steps with a new engine each time; a variant has BatchNorm (and LARS)."""
    options: dict[str, Any] = {"accumulation": accumulation}
    build: dict[str, Any] = options | {"precision": precision}
    if variant:
        build["model"] = replace(VIT, head=replace(VIT.head, use_bn=True))
        build["optimizer"] = "lars" if variant == "lars" else "adamw"
    root = work / f"checkpoints-{engine_name}-{accumulation}-{precision}{variant}"
    engine = build_engine(engine_name, process, work, **build)
    initial = whole_state(engine)
    losses = [train_step(engine, step, process, **options) for step in range(6)]
    expected = whole_state(engine)
    resumed_losses = []
    for part in range(3):
        engine = build_engine(engine_name, process, work, **build)
        if part:
            load(engine, root, process)
        resumed_losses += [
            train_step(engine, step, process, **options) for step in range(2 * part, 2 * part + 2)
        ]
        save(engine, root, 2 * part + 2, process)
    again = whole_state(engine)
    return {
        "losses": [entry["loss"] for entry in losses],
        "norms": [entry["norm"] for entry in losses],
        "resumed_norms": [entry["norm"] for entry in resumed_losses],
        "first_other_step": next(
            (i for i, pair in enumerate(zip(losses, resumed_losses, strict=True)) if pair[0] != pair[1]), None
        ),
        "differing": differing(expected, again),
        "unmoved": [name for name in expected if torch.equal(expected[name], initial[name])],
        "tensors": len(expected),
    }


def clipped(engine_name: str, process: Process, work: Path) -> dict[str, Any]:
    """The first moments of a step whose gradient is cut to a tenth, against those of one whose gradient is not."""
    moments = []
    clip = 1e6
    for _ in range(2):
        engine = build_engine(engine_name, process, work, accumulation=2, clip_grad_norm=clip)
        norm = train_step(engine, 0, process, accumulation=2)["norm"]
        moments.append({n: m for n, m in whole_state(engine).items() if n.endswith("/exp_avg")})
        clip = norm / 10
    plain, cut = moments
    largest = max(float(moment.abs().max()) for moment in plain.values())
    errors = [float((cut[name] - moment / 10).abs().max()) for name, moment in plain.items()]
    return {"norm": norm, "tensors": len(errors), "error": max(errors) / largest}


def averages_in_fp32(engine_name: str, process: Process, work: Path) -> dict[str, Any]:
    """The first moments of a bf16 step of two micro-batches: each one's relative difference from ZeRO-0's."""
    moments = []
    for name in ("zero0", engine_name):
        engine = build_engine(name, process, work, precision="bf16", accumulation=2)
        train_step(engine, 0, process, accumulation=2)
        moments.append({n: m for n, m in whole_state(engine).items() if n.endswith("/exp_avg")})
    reference, found = moments
    return {"errors": {n: float((found[n] - m).norm() / m.norm()) for n, m in reference.items() if m.any()}}


def continue_from(engine_name: str, process: Process, work: Path, root: str) -> dict[str, Any]:
    """Two more steps from another engine's or another world size's checkpoint."""
    engine = build_engine(engine_name, process, work)
    load(engine, Path(root), process)
    saved = find_latest_checkpoint(Path(root), process)
    assert saved is not None
    stored = ConsolidatedState(saved)
    taken_over = differing(whole_state(engine), {name: stored[name] for name in stored})
    losses = [train_step(engine, step, process)["loss"] for step in (6, 7)]
    return {"differing_after_load": taken_over, "losses": losses}


def skip_moves_nothing(engine_name: str, process: Process, work: Path, poison: str) -> dict[str, Any]:
    """A poisoned step between clean ones leaves every bit, and no trace in the steps after it."""
    engine = build_engine(engine_name, process, work, accumulation=2)
    for step in range(2):
        train_step(engine, step, process, accumulation=2)
    before = whole_state(engine)
    bad = train_step(engine, 2, process, accumulation=2, poison=poison)
    after = whole_state(engine)
    clean_after = [train_step(engine, step, process, accumulation=2) for step in (3, 4)]
    reference = build_engine(engine_name, process, work, accumulation=2)
    for step in range(2):
        train_step(reference, step, process, accumulation=2)
    clean = [train_step(reference, step, process, accumulation=2) for step in (3, 4)]
    return {
        "applied": bad["applied"],
        "differing": differing(before, after),
        "trace": differing(whole_state(engine), whole_state(reference))
        + ([] if clean == clean_after else ["losses"]),
    }


def ema_reference(engine_name: str, process: Process, work: Path) -> dict[str, Any]:
    """The teacher, gathered again, against a float64 average of the gathered students."""
    engine = build_engine(engine_name, process, work)
    initial = {n: t.double() for n, t in whole_state(engine).items() if n.startswith("teacher/")}
    reference = dict(initial)
    for step in range(10):
        train_step(engine, step, process)
        state = whole_state(engine)
        reference = {n: 0.9 * t + 0.1 * state["student/" + n[8:]].double() for n, t in reference.items()}
    error = max(float((state[n].double() - t).abs().max()) for n, t in reference.items())
    moved = min(float((state[n].double() - t).abs().max()) for n, t in initial.items())
    seen = engine.forward_teacher(crops_of(99, 0, process, 1)).projections
    torch.manual_seed(0)
    plain = SelfSupervisedNetwork(VIT, "teacher")
    prefix = "teacher/network."
    plain.load_state_dict({n.removeprefix(prefix): state[n] for n in state if n.startswith(prefix)})
    forward = float((plain(crops_of(99, 0, process, 1))[0] - seen).abs().max())
    return {"error": error, "moved": moved, "forward_error": forward}


def first_moves(engine_name: str, process: Process, work: Path) -> dict[str, Any]:
    """How far the first step moves each matrix at most: AdamW's goes about as far as its group's rate."""
    engine = build_engine(engine_name, process, work, patch_embed_lr_scale=0.2)
    before = whole_state(engine)
    train_step(engine, 0, process)
    moves = {n: float((t - before[n]).abs().max()) for n, t in whole_state(engine).items() if t.ndim > 1}
    return {"moves": {n: move for n, move in moves.items() if n.startswith("student/")}}


def writes_a_parameter(engine_name: str, process: Process, work: Path) -> dict[str, Any]:
    """What overwriting a parameter between two steps changes, and whether the next step moves what was written."""
    engine = build_engine(engine_name, process, work)
    train_step(engine, 0, process)
    before = whole_state(engine)
    name = "learned_prototypes.weight"
    whole = torch.randn(before[f"student/{name}"].shape, generator=torch.Generator().manual_seed(7))
    engine.write_parameter(name, whole.to(process.device))
    after = whole_state(engine)
    crops = crops_of(1, 0, process, 1)
    unit = nn.functional.normalize(whole, dim=1).to(process.device)
    outputs = [engine.forward_student_without_graph(crops), engine.forward_teacher(crops)]
    read = max(float((output.learned_prototypes - unit).abs().max()) for output in outputs)  # type: ignore[operator]
    train_step(engine, 1, process)
    moved = (whole_state(engine)[f"student/{name}"] - whole).abs()
    return {
        "changed": differing(before, after),
        "read": read,
        "written": all(torch.equal(after[f"{role}/{name}"], whole) for role in ("student", "teacher")),
        "moved": [float(moved.min()), float(moved.max())],
    }


def live_bytes(engine_name: str, process: Process, work: Path) -> dict[str, Any]:
    """Bytes of all live tensors that an engine has made, at the end of a backward pass; its bucket left out."""
    before = _storages()
    engine = build_engine(engine_name, process, work, model=WIDE)
    for step in range(2):
        train_step(engine, step, process)
    found: dict[int, int] = {}

    def look() -> None:
        if not found:
            # A gradient that nobody has asked for has no Python object: ask.
            asked = [parameter.grad for parameter in engine.student.parameters()]
            found.update({key: size for key, size in _storages().items() if key not in before})
            del asked

    # Stage 1 holds whole gradients until it reduces them, after torch's part of the backward pass.
    target, name = (
        (engine._engine, "allreduce_gradients")
        if engine_name == "zero1"
        else (engine, "gradients_are_finite")
    )
    original = getattr(target, name)

    def looking(*arguments: Any, **options: Any) -> Any:
        look()
        return original(*arguments, **options)

    setattr(target, name, looking)
    train_step(engine, 2, process)
    parameters = sum(int(getattr(p, "ds_numel", p.numel())) for p in engine.student.parameters())
    sizes = [size for size in found.values() if size != BUCKET_NUMEL * 4]
    return {"bytes": sum(sizes), "parameters": parameters}


def _storages() -> dict[int, int]:
    gc.collect()
    storages: dict[int, int] = {}
    for candidate in gc.get_objects():
        if type(candidate).__name__ == "DTensor":
            candidate = candidate._local_tensor
        if type(candidate) in (Tensor, nn.Parameter) and candidate.device.type == "cpu":
            storages[candidate.untyped_storage().data_ptr()] = candidate.untyped_storage().nbytes()
    storages.pop(0, None)
    return storages


def options_change_nothing(engine_name: str, process: Process, work: Path, **options: Any) -> dict[str, Any]:
    """Losses of three steps with an option of execution (compiled blocks, activation checkpointing) and without."""
    losses = []
    plain = replace(VIT, drop_path_rate=options.pop("drop_path_rate", 0.0))
    for model in (plain, replace(plain, **options)):
        engine = build_engine(engine_name, process, work, model=model)
        torch.manual_seed(process.rank)
        losses.append([train_step(engine, step, process)["loss"] for step in range(3)])
    return {
        "plain": losses[0],
        "with_option": losses[1],
        "finite": all(math.isfinite(loss) for part in losses for loss in part),
    }


def build_training_step(
    engine_name: str,
    process: Process,
    work: Path,
    mode: PrototypeMode,
    accumulation: int,
    patch_mode: PrototypeMode | None = None,
    **terms: Any,
) -> tuple[TrainingStep, PretrainConfig]:
    """The trainer's own step of a tiny network, 32 prototypes and `2 * GLOBAL_BATCH` images, and its configuration.

    With the terms of `read_terms`; patches have prototypes of their own of `patch_mode`, if any.
    """
    config = build_config(
        **read_terms(**terms),
        patch_mode=patch_mode,
        model=VIT,
        num_prototypes=32,
        num_images=2 * GLOBAL_BATCH,
        accumulation=accumulation,
        mode=mode,
        coupling=CouplingConfig(tie=0.5 if mode == "partial" else 0.0),
    )
    synchronization = Synchronization(process.world_size)
    sets = build_sets(config, NUM_SAMPLES, process, synchronization)
    engine = build_engine(
        engine_name,
        process,
        work,
        accumulation=accumulation,
        build_network=partial(build_trained_network, config, sets=sets),
        spread=100.0,
    )
    return assemble_step(config, NUM_SAMPLES, process, synchronization, sets, engine), config


def read_terms(instance: str = "carp", targets: Targets | None = None, patch: str = "none") -> dict[str, Any]:
    """Terms by name: one on views with its `targets`, and one on patches."""
    return {
        "instance": InstanceConfig(name=instance, targets=targets),  # type: ignore[arg-type]
        "patch": None if patch == "none" else PatchConfig(name=patch),  # type: ignore[arg-type]
    }


def draw_crops(process: Process, accumulation: int, seed: int = 1, **terms: Any) -> list[Crops]:
    """This rank's micro-batches of a step's images: two global views, local ones and masks as the terms have them."""
    num_images, world_size = 2 * GLOBAL_BATCH, process.world_size
    images = torch.randn(2, num_images, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    mine = images.chunk(world_size, 1)[process.rank]
    config = build_config(**read_terms(**terms))
    masks = part_of(masks_of(config, num_images, seed), process.rank, world_size)
    number = config.data.num_local_crops
    return [
        Crops(part, part[:number, :, :, :8, 4:12].contiguous(), part_of(masks, index, accumulation))
        for index, part in enumerate(mine.chunk(accumulation, 1))
    ]


def one_step(
    engine_name: str,
    process: Process,
    work: Path,
    mode: PrototypeMode,
    accumulation: int,
    patch_mode: PrototypeMode | None = None,
    **terms: Any,
) -> dict[str, Any]:
    """One whole training step on the same global batch: loss, every gradient and the prototypes' state, as lists.

    AdamW's first moment after one step is a tenth of the gradient that all ranks and micro-batches have summed.
    """
    step, _ = build_training_step(engine_name, process, work, mode, accumulation, patch_mode, **terms)
    torch.manual_seed(process.rank)
    outcome = step(draw_crops(process, accumulation, **terms), 0, SCHEDULE)
    gradients = {
        name.split("/")[1]: tensor.flatten().tolist()
        for name, tensor in whole_state(step.engine).items()
        if "exp_avg/" in f"{name}/"
    }
    gathered = step.gather_rows(outcome.sets["prototypes"].projections)
    return {
        "loss": {name: float(value) for name, value in outcome.loss.items()},
        "norm": float(outcome.grad_norm),
        "gradients": gradients,
        "estimator": {
            name: value.flatten().tolist()
            for module in (*(one.estimator for one in step.sets), step.objective)
            for name, value in module.state_dict().items()
            if isinstance(value, Tensor)
        },
        "figures": {
            "feature_norm": float(gathered.norm(dim=-1).mean()),
            "rows": len(gathered),
        },
    }


def resume_step(
    engine_name: str,
    process: Process,
    work: Path,
    mode: PrototypeMode,
    patch_mode: PrototypeMode | None = None,
    **terms: Any,
) -> dict[str, Any]:
    """Three whole training steps, against one, a checkpoint as the trainer writes it, and two in a new engine."""
    built = (engine_name, process, work, mode, 2, patch_mode)
    root = work / f"resumed-{engine_name}-{mode}-{patch_mode}-{'-'.join(terms.values())}"

    def run(step: TrainingStep, *numbers: int) -> list[float]:
        losses = []
        for index in numbers:
            torch.manual_seed(100 * index + process.rank)
            losses.append(float(step(draw_crops(process, 2, index, **terms), index, SCHEDULE).loss["total"]))
        return losses

    def read(step: TrainingStep) -> dict[str, Tensor]:
        found = whole_state(step.engine) | dict(step.objective.state_dict(prefix="objective/"))
        for one in step.sets:
            found |= one.estimator.state_dict(prefix=f"{one.prefix}estimator/")
            counts = process.all_gather_object(one.usage.counts)
            found[f"{one.prefix}usage"] = torch.stack(counts).sum(0)
        return {name: value.clone() for name, value in found.items() if isinstance(value, Tensor)}

    whole, _ = build_training_step(*built, **terms)
    losses = run(whole, 0, 1, 2)
    begun, config = build_training_step(*built, **terms)
    run(begun, 0)
    progress = Progress(step=1, position={"used": {}, "samples_seen": 2 * GLOBAL_BATCH})
    snapshot = Snapshot(config, progress, begun, process, {}, RecordPosition())
    saved = save_checkpoint(root, 1, snapshot.write, process, keep_last=1)
    assert saved.path is not None, saved.error
    resumed, _ = build_training_step(*built, **terms)
    restore(read_saved_run(saved.path, process), resumed, process)
    resumed_losses = run(resumed, 1, 2)
    expected = read(whole)
    return {
        "differing": differing(expected, read(resumed)),
        "losses": losses,
        "resumed_losses": [losses[0], *resumed_losses],
        "parts": sorted({name.split("/")[0] for name in expected}),
    }


def waits(engine_name: str, process: Process, work: Path, mode: PrototypeMode) -> dict[str, Any]:
    """Where the CPU would wait for the device in an ordinary step, by place; DeepSpeed's own waits apart."""
    step, _ = build_training_step(engine_name, process, work, mode, 1)
    for index in range(2):  # the estimator begins, engines make their buffers
        step(draw_crops(process, 1, seed=index), index, SCHEDULE)
    crops = draw_crops(process, 1, seed=2)
    with mock.patch.object(sparse, "may_wait", lambda device: False), DeviceCounter() as counter:
        step(crops, 2, SCHEDULE)
    return {"waits": dict(counter.waits), "vendor_waits": dict(counter.vendor_waits)}


def probe_with_unequal_parts(engine_name: str, process: Process, work: Path, shards: str) -> dict[str, Any]:
    """The in-training k-NN between steps, where ranks keep images of unequally many batches, and without it."""
    config = SimpleNamespace(
        data=SimpleNamespace(
            shards=shards,
            split="train",
            channels=1,
            pixels="uint8",
            interpolation="bicubic",
            mean=(0.5,),
            std=(0.5,),
        ),
        model=SimpleNamespace(image_size=VIT.image_size),
        evaluation=SimpleNamespace(test_split="test", knn_train_images=300, knn_test_images=60),
    )
    losses: list[list[float]] = []
    for probe in (build_knn_probe(config, process.device, process), None):
        engine, values = build_engine(engine_name, process, work), {}
        found = []
        for step in range(3):
            found.append(train_step(engine, step, process)["loss"])
            if probe is not None and step < 2:
                values = probe(engine.teacher_network().backbone)
                top1 = process.all_gather_object(values["eval/knn20_top1"])
        losses.append(found)
    return {"top1": top1, "probed": losses[0], "plain": losses[1]}


def run(scenario: dict[str, Any], process: Process, work: Path) -> dict[str, Any]:
    arguments = dict(scenario)
    return SCENARIOS[arguments.pop("scenario")](
        arguments.pop("engine"), process=process, work=work, **arguments
    )  # type: ignore[operator]


SCENARIOS: dict[str, Any] = {
    function.__name__: function
    for function in (
        resume_twice,
        continue_from,
        skip_moves_nothing,
        averages_in_fp32,
        clipped,
        ema_reference,
        first_moves,
        live_bytes,
        options_change_nothing,
        one_step,
        resume_step,
        waits,
        writes_a_parameter,
        probe_with_unequal_parts,
    )
}


def main(arguments: list[str]) -> None:
    work, scenarios, results = Path(arguments[0]), Path(arguments[1]), Path(arguments[2])
    logging.basicConfig(level=logging.WARNING)
    process = distributed.start("cpu", timeout_s=60)
    torch.set_num_threads(1)
    found = []
    for scenario in json.loads(scenarios.read_text()):
        found.append({**scenario, **run(scenario, process, work)})
        if process.rank == 0:
            results.write_text(json.dumps(found, indent=1))
    distributed.stop()


def iterate(found: list[dict[str, Any]], **where: Any) -> Iterator[dict[str, Any]]:
    """Results whose scenario matches."""
    return (entry for entry in found if all(entry.get(key) == value for key, value in where.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # gloo threads of several engines need no orderly end
