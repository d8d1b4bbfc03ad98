"""Steps per second of every engine beside plain DDP, and of three modes beside each other: python -m benchmarks.step.

Contestants live in one process group and take turns (forwards, then backwards), so that a drift of the machine
falls on all alike. Exit code 1 where a ratio is below its bar on CPU ranks: to DDP 0.75 for ZeRO-1 and ZeRO-2, 0.4
for ZeRO-3 and FSDP2; `full` (the mixture) to `joint` 0.95 in the median over engines.

    python -m benchmarks.step --model vitl --ranks 1 --precision bf16 --batch 32 64 128 [--local-crops 8]

is the form for GPUs: one process group per engine and batch, with images/s, dense and executed TFLOP/s, their share
of a measured bf16 matrix product, peak memory, and the mixture's share of the step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from runtime.usage import HelpFormatter

CONTESTANTS = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")
MODEL_NAMES = ("tiny", "vits", "vitl")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--model", choices=MODEL_NAMES, default="tiny", help="size of the encoder")
    parser.add_argument(
        "--engines", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="who competes"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the encoder")
    parser.add_argument("--batch", type=int, nargs="+", help="images a rank; the model's own where left out")
    parser.add_argument("--local-crops", type=int, help="number of local crops")
    parser.add_argument("--activation-checkpointing", action="store_true", help="recompute blocks")
    parser.add_argument("--compile", action="store_true", help="compile blocks where the engine allows it")
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the order and its reverse")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to measure")
    parser.add_argument("--timeout-s", type=float, default=1200, help="for one group of ranks")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":  # usage and mistakes are answered before the slow imports
    parse(sys.argv[1:])

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._bars import judge
from benchmarks._replica_engine import ReplicaEngine
from benchmarks._timing import describe_noise
from models.config import HeadConfig, ModelConfig
from models.student_teacher import SelfSupervisedNetwork
from models.vit import compile_blocks
from prototypes.build import build_estimator, build_objective
from prototypes.config import ObjectiveConfig, PartitionConfig, PrototypesConfig
from prototypes.objectives.interface import LogitOperands, RankBatch, ViewRows
from runtime import distributed
from runtime.distributed import Process
from runtime.rendezvous import free_port
from training.config import BatchConfig, OptimConfig
from training.engines.deepspeed import DeepSpeedEngine
from training.engines.fsdp import FSDPEngine
from training.engines.interface import Engine, TrainedNetwork
from training.engines.synchronization import Synchronization
from training.schedules import StepSchedule

FLOORS = {"zero1": 0.75, "zero2": 0.75, "zero3": 0.4, "fsdp2": 0.4}
FULL_OVER_JOINT = 0.95
MODES = ("full", "joint", "frozen_random")
SCHEDULE = StepSchedule(lr=1e-4, weight_decay=0.04, ema_momentum=0.99)


class ModelSpec(NamedTuple):
    """A model, its global and local crops (number, side), K and P, images per rank."""

    model: ModelConfig
    global_crops: tuple[int, int]
    local_crops: tuple[int, int]
    num_prototypes: int
    dim: int
    batch: int


TINY = ModelConfig(
    name="vit_tiny_patch16_224",
    image_size=32,
    patch_size=8,
    embed_dim=192,
    depth=4,
    num_heads=4,
    head=HeadConfig(hidden_dim=256, projection_dim=64),
)
MODELS = {
    "tiny": ModelSpec(TINY, (2, 32), (2, 16), 4096, 64, 32),
    "vits": ModelSpec(ModelConfig(name="vit_small_patch16_224"), (2, 224), (10, 96), 65536, 256, 64),
    "vitl": ModelSpec(ModelConfig(name="vit_large_patch16_224"), (2, 224), (10, 96), 65536, 256, 64),
}


class Contestant:
    """One engine and one mode, with their own crops."""

    def __init__(
        self,
        name: str,
        mode: str,
        options: argparse.Namespace,
        process: Process,
        sync: Synchronization,
    ) -> None:
        spec = spec_of(options)
        self.batch = options.batch[0]
        prototypes = PrototypesConfig(
            mode=mode,  # type: ignore[arg-type]
            num_prototypes=spec.num_prototypes,
            dim=spec.dim,
            partition=PartitionConfig(size=512),
        )
        self._objective = build_objective(
            ObjectiveConfig(), prototypes, seed=0, mean_over_ranks=sync.mean_over_ranks
        )
        self._estimator = build_estimator(
            prototypes,
            seed=0,
            num_observations_per_epoch=100_000,
            total_steps=10_000,
            rank=process.rank,
            world_size=process.world_size,
            rows_per_rank=spec.global_crops[0] * self.batch,
            reduce_sum=sync.reduce_sum,
            gather=sync.gather,
            device=process.device,
        )
        learned = (self._estimator.build_learned(), self._estimator.build_learned())
        self._engine = build_engine(name, spec.model, learned, options, process)
        self._device, self._steps = process.device, 0
        torch.manual_seed(process.rank)
        self._global_crops, self._local_crops = (
            torch.randn(number * self.batch, spec.model.channels, side, side, device=process.device)
            for number, side in (spec.global_crops, spec.local_crops)
        )

    def step(self) -> None:
        """The step's order, as `training/step.py` has it."""
        engine, estimator = self._engine, self._estimator
        teacher = engine.forward_teacher([self._global_crops])
        observation = estimator.observe(teacher.projections)
        student = engine.forward_student([self._global_crops, self._local_crops])
        estimator.commit(observation)
        operands = [
            LogitOperands(rows.unflatten(0, (-1, self.batch)), columns)
            for rows, columns in (
                estimator.logit_operands(student.projections, "student", student.learned_prototypes),
                estimator.logit_operands(teacher.projections, "teacher", teacher.learned_prototypes),
            )
        ]
        loss = self._objective(RankBatch(views=ViewRows(*operands)), step=self._steps)["total"]
        engine.backward(loss, is_last_micro_step=True)
        if engine.gradients_are_finite():
            estimator.accept()
            engine.step(SCHEDULE)
            engine.update_teacher(SCHEDULE.ema_momentum)
        else:
            estimator.discard()
            engine.skip()
        self._steps += 1

    def time_steps(self, count: int) -> list[float]:
        """Returns seconds of each of `count` steps."""
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            self.step()
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return seconds


def build_engine(
    name: str,
    config: ModelConfig,
    learned: tuple[nn.Module | None, nn.Module | None],
    options: argparse.Namespace,
    process: Process,
) -> Engine:
    """Returns one contestant's engine; all start from the same weights."""
    torch.manual_seed(0)
    student = TrainedNetwork(SelfSupervisedNetwork(config, "student"), learned[0]).to(process.device)
    teacher = TrainedNetwork(SelfSupervisedNetwork(config, "teacher"), learned[1]).to(process.device)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    if options.compile and name != "zero3":
        compile_blocks(student.network.backbone)
        compile_blocks(teacher.network.backbone)
    optim, precision = OptimConfig(), options.precision
    if name == "ddp":
        return ReplicaEngine(student, teacher, optim, precision)
    shared: dict[str, Any] = {"optim": optim, "world_size": process.world_size}
    if name == "fsdp2":
        return FSDPEngine(student, teacher, precision=precision, **shared)
    batch = BatchConfig(global_batch_size=options.batch[0] * process.world_size)
    path = f"ds_configs/{name}_{precision}.json"
    return DeepSpeedEngine(student, teacher, batch=batch, deepspeed_config=path, **shared)


def count_flops(options: argparse.Namespace) -> tuple[float, float]:
    """Returns FLOPs of one image, (dense, executed): student forward and backward, teacher forward, recomputation."""
    spec = spec_of(options)
    with torch.device("meta"):
        network = SelfSupervisedNetwork(replace(spec.model, activation_checkpointing=False), "student")
        crops = [
            torch.empty(n, spec.model.channels, s, s) for n, s in (spec.global_crops, spec.local_crops) if n
        ]
    counts = []
    for part in (crops[:1], crops):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(part)
        counts.append(counter.get_total_flops())
    dense = counts[0] + 3.0 * counts[1]
    return dense, dense + (counts[1] if options.activation_checkpointing else 0.0)


def measure_peak_tflops(device: torch.device) -> float:
    """Returns TFLOP/s of a bf16 product of two 8192 x 8192 matrices: what this GPU gives, not what its sheet says."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - started) / 1e12


def race(options: argparse.Namespace) -> dict[str, Any] | None:
    """Runs on every rank; returns rank 0's seconds per step by contestant. Collective."""
    process = distributed.start(options.device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // process.world_size))
    sync = Synchronization(process.world_size)
    contestants: dict[str, Contestant] = {}
    peak_gb = 0.0
    for name in options.engines:
        for mode in MODES:
            contestant = contestants[f"{name}/{mode}"] = Contestant(name, mode, options, process, sync)
            contestant.time_steps(2)
            if process.device.type == "cuda" and len(contestants) == 1:
                peak_gb = torch.cuda.max_memory_allocated() / 1e9
    seconds: dict[str, list[float]] = {key: [] for key in contestants}
    for _ in range(options.rounds):
        for key in [*contestants, *reversed(contestants)]:
            seconds[key] += contestants[key].time_steps(options.steps)
    peak_tflops = measure_peak_tflops(process.device) if process.device.type == "cuda" else 0.0
    found = {
        "seconds": seconds,
        "world_size": process.world_size,
        "peak_gb": peak_gb,
        "peak_tflops": peak_tflops,
        "batch": options.batch[0],
        "device": process.device.type,
    }
    return found if process.is_main else None


def report(found: dict[str, Any], options: argparse.Namespace) -> bool:
    """Prints one group's table and returns whether a ratio is below its floor."""
    medians = {key: statistics.median(values) for key, values in found["seconds"].items()}
    dense, executed = count_flops(options)
    images = found["batch"] * found["world_size"]
    print(f"{options.model} {options.precision}, {found['world_size']} ranks, {found['batch']} images a rank")
    print(
        f"{'engine':8} {'steps/s':>8} {'of DDP':>7} {'full/joint':>10} {'full/frozen':>11} {'images/s':>9} "
        f"{'TFLOP/s/rank':>12} {'executed':>9}  floor"
    )
    failed, against_joint = False, []
    for name in options.engines:
        full, joint, frozen = (medians[f"{name}/{mode}"] for mode in MODES)
        ratio = medians["ddp/full"] / full if "ddp/full" in medians else float("nan")
        verdict = ""
        if name in FLOORS and "ddp/full" in medians:
            passed, verdict = judge(ratio, found["device"], least=FLOORS[name], unit="")
            failed |= not passed
        against_joint.append(joint / full)
        tflops = images / full / found["world_size"] / 1e12
        print(
            f"{name:8} {1 / full:8.2f} {ratio:7.2f} {joint / full:10.3f} {frozen / full:11.3f} "
            f"{images / full:9.1f} {tflops * dense:12.3f} {tflops * executed:9.3f}  {verdict}"
        )
        if found["peak_gb"]:
            share = tflops * executed / found["peak_tflops"]
            print(
                f"         peak {found['peak_gb']:.1f} GB (mode full alone), {share:.1%} of the measured "
                f"{found['peak_tflops']:.0f} TFLOP/s, mixture {1 - frozen / full:.2%} of the step"
            )
    median = statistics.median(against_joint)
    passed, verdict = judge(median, found["device"], least=FULL_OVER_JOINT, unit="")
    print(f"full over joint, median of engines: {median:.3f} {verdict}")
    return failed or not passed


def spec_of(options: argparse.Namespace) -> ModelSpec:
    """Returns the model with what the command line changes of it."""
    spec = MODELS[options.model]
    model = replace(spec.model, activation_checkpointing=options.activation_checkpointing)
    number, side = spec.local_crops
    return spec._replace(
        model=model, local_crops=(number if options.local_crops is None else options.local_crops, side)
    )


def run_group(options: argparse.Namespace, engines: Sequence[str], batch: int) -> dict[str, Any] | None:
    """Starts the ranks of one process group and returns what rank 0 measured; None where a rank failed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        rendezvous = {
            "WORLD_SIZE": str(options.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "TORCH_EXTENSIONS_DIR": folder,
            # torch announces one at every step of six engines; the table would drown.
            "PYTHONWARNINGS": "ignore::FutureWarning",
        }
        command = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:], "--result", str(result)]
        command += ["--engines", *engines, "--batch", str(batch)]
        ranks = [
            subprocess.Popen(command, env={**os.environ, **rendezvous, "RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(options.ranks)
        ]
        try:
            codes = [rank.wait(timeout=options.timeout_s) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(codes) or not result.exists():
            print(f"{', '.join(engines)} at batch {batch}: exit codes of the ranks: {codes}", file=sys.stderr)
            return None
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def main() -> int:
    """Starts the ranks (or is one of them) and prints the table."""
    options = parse(sys.argv[1:])
    options.batch = options.batch or [MODELS[options.model].batch]
    if options.result:
        found = race(options)
        if found is not None:
            Path(options.result).write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)  # hooks of six engines need no orderly end
    print(describe_noise())
    # The tiny engines live side by side, so that their ratios are paired; of large ones a GPU holds one at a time.
    groups = [options.engines] if options.model == "tiny" else [[name] for name in options.engines]
    failed = False
    for batch in options.batch:
        for engines in groups:
            group = run_group(options, engines, batch)
            if group is None:
                failed = True
                continue
            failed |= report(group, argparse.Namespace(**{**vars(options), "engines": engines}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
