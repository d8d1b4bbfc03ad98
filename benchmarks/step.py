"""Steps per second of every engine beside plain DDP, with and without the mixture: python -m benchmarks.step.

All engines live in one process group and take turns (forwards, then backwards), so that a drift of the machine
falls on all alike. Exit code 1 where a ratio to DDP is below its floor: 0.75 for ZeRO-1 and ZeRO-2, 0.4 for
ZeRO-3 and FSDP2. `--model vitl` on GPUs prints images/s, dense TFLOP/s and peak memory of the same step.
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._timing import describe_noise
from models.config import HeadConfig, ModelConfig
from models.student_teacher import SelfSupervisedNetwork, update_ema_
from prototypes.config import PartitionConfig, PrototypesConfig
from prototypes.estimator import build_estimator
from prototypes.losses import carp_loss
from prototypes.partitions import draw_partition
from runtime import distributed
from runtime.distributed import Process, free_port
from training.config import BatchConfig, OptimConfig
from training.deepspeed_engine import DeepSpeedEngine
from training.engine import Engine, NetworkOutput, TrainedNetwork
from training.fsdp_engine import FSDPEngine
from training.optimizer import build_optimizer, set_schedule_
from training.schedules import StepSchedule
from training.synchronization import Synchronization

FLOORS = {"zero1": 0.75, "zero2": 0.75, "zero3": 0.4, "fsdp2": 0.4}
CONTESTANTS = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")
SCHEDULE = StepSchedule(lr=1e-4, weight_decay=0.04, ema_momentum=0.99)
# Model, its global and local crops (number, side), K and P, images per rank.
MODELS: dict[str, tuple[ModelConfig, tuple[int, int], tuple[int, int], int, int, int]] = {
    "tiny": (
        ModelConfig(
            name="vit_tiny_patch16_224",
            image_size=32,
            patch_size=8,
            embed_dim=192,
            depth=4,
            num_heads=4,
            head=HeadConfig(hidden_dim=256, projection_dim=64),
        ),
        (2, 32),
        (2, 16),
        4096,
        64,
        32,
    ),
    "vits": (ModelConfig(name="vit_small_patch16_224"), (2, 224), (10, 96), 65536, 256, 64),
    "vitl": (ModelConfig(name="vit_large_patch16_224"), (2, 224), (10, 96), 65536, 256, 64),
}


class ReplicaEngine(Engine):
    """The peer: torch's DistributedDataParallel and AdamW, nothing of ours but the average."""

    def __init__(
        self, student: TrainedNetwork, teacher: TrainedNetwork, optim: OptimConfig, precision: str
    ) -> None:
        self.student = student
        self.teacher = teacher
        self._parallel = nn.parallel.DistributedDataParallel(student)
        self._optimizer = build_optimizer(student, optim)
        self._clip = optim.clip_grad_norm or float("inf")
        device = next(student.parameters()).device.type
        self._autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")

    def forward_student(self, crops: Sequence[Tensor]) -> NetworkOutput:
        """See `Engine`."""
        with self._autocast:
            return NetworkOutput(*self._parallel(crops))

    @torch.no_grad()
    def forward_teacher(self, crops: Sequence[Tensor]) -> NetworkOutput:
        """See `Engine`."""
        with self._autocast:
            return NetworkOutput(*self.teacher(crops))

    def backward(self, loss: Tensor, *, is_last_micro_step: bool) -> None:
        """See `Engine`."""
        loss.backward()

    def gradients_are_finite(self) -> bool:
        """See `Engine`; gradients are averaged already, so that all ranks see the same."""
        self._norm = nn.utils.clip_grad_norm_(self.student.parameters(), self._clip)
        return bool(torch.isfinite(self._norm))

    def step(self, schedule: StepSchedule) -> float:
        """See `Engine`."""
        set_schedule_(self._optimizer.param_groups, schedule)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(self._norm)

    def skip(self) -> None:
        """See `Engine`."""
        self._optimizer.zero_grad(set_to_none=True)

    def update_teacher(self, ema_momentum: float) -> None:
        """See `Engine`."""
        update_ema_(self.teacher.parameters(), self.student.parameters(), ema_momentum)

    def iterate_state(self) -> Any:
        """Not part of the race."""
        raise NotImplementedError

    def load_state(self, state: Any) -> None:
        """Not part of the race."""
        raise NotImplementedError


class Contestant:
    """One engine and one estimator, with their own crops."""

    def __init__(
        self,
        name: str,
        mixture: bool,
        model: str,
        precision: str,
        batch: int,
        process: Process,
        sync: Synchronization,
    ) -> None:
        config, (num_global, global_size), (num_local, local_size), num_prototypes, dim, _ = MODELS[model]
        self.batch = batch
        self._engine = build_engine(name, config, precision, batch, process)
        self._estimator = build_estimator(
            PrototypesConfig(
                mode="full" if mixture else "frozen_random",
                num_prototypes=num_prototypes,
                dim=dim,
                partition=PartitionConfig(size=512),
            ),
            seed=0,
            num_observations_per_epoch=100_000,
            total_steps=10_000,
            rank=process.rank,
            world_size=process.world_size,
            rows_per_rank=num_global * batch,
            reduce_sum=sync.reduce_sum,
            gather=sync.gather,
            device=process.device,
        )
        self._sync, self._device, self._steps = sync, process.device, 0
        torch.manual_seed(process.rank)
        shape = (config.channels, global_size, global_size)
        self._global_crops = torch.randn(num_global * batch, *shape, device=process.device)
        shape = (config.channels, local_size, local_size)
        self._local_crops = torch.randn(num_local * batch, *shape, device=process.device)

    def step(self) -> None:
        """The step's order, as `training/step.py` has it."""
        engine, estimator = self._engine, self._estimator
        teacher = engine.forward_teacher([self._global_crops])
        observation = estimator.observe(teacher.projections)
        student = engine.forward_student([self._global_crops, self._local_crops])
        estimator.commit(observation)
        partition = draw_partition(
            estimator.num_prototypes, 512, seed=0, step=self._steps, micro_step=0, device=self._device
        )
        rows, columns = estimator.logit_operands(student.projections, "student")
        goal_rows, goal_columns = estimator.logit_operands(teacher.projections, "teacher")
        loss = carp_loss(
            rows.unflatten(0, (-1, self.batch)),
            goal_rows.unflatten(0, (-1, self.batch)),
            columns,
            goal_columns,
            partition,
            mean_over_ranks=self._sync.mean_over_ranks,
        ).total
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


def build_engine(name: str, config: ModelConfig, precision: str, batch: int, process: Process) -> Engine:
    """Returns one contestant's engine; all start from the same weights."""
    torch.manual_seed(0)
    student = TrainedNetwork(SelfSupervisedNetwork(config, "student"), None).to(process.device)
    teacher = TrainedNetwork(SelfSupervisedNetwork(config, "teacher"), None).to(process.device)
    teacher.load_state_dict(student.state_dict())
    optim = OptimConfig()
    if name == "ddp":
        return ReplicaEngine(student, teacher, optim, precision)
    sizes: dict[str, Any] = {
        "batch": BatchConfig(global_batch_size=batch * process.world_size),
        "world_size": process.world_size,
    }
    if name == "fsdp2":
        return FSDPEngine(student, teacher, optim=optim, precision=precision, **sizes)
    path = f"ds_configs/{name}_{precision}.json"
    return DeepSpeedEngine(student, teacher, optim=optim, deepspeed_config=path, **sizes)


def dense_flops(model: str) -> float:
    """Returns FLOPs of one image: student forward and backward on all crops, teacher forward on global crops."""
    config, (num_global, global_size), (num_local, local_size), *_ = MODELS[model]
    with torch.device("meta"):
        network = SelfSupervisedNetwork(config, "student")
        crops = [
            torch.empty(n, config.channels, s, s)
            for n, s in ((num_global, global_size), (num_local, local_size))
        ]
    counts = []
    for part in (crops[:1], crops):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(part)
        counts.append(counter.get_total_flops())
    return counts[0] + 3.0 * counts[1]


def race(options: argparse.Namespace) -> dict[str, Any] | None:
    """Runs on every rank; returns rank 0's seconds per step by contestant. Collective."""
    process = distributed.start(options.device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // process.world_size))
    sync = Synchronization(process.world_size)
    contestants: dict[str, Contestant] = {}
    for name in options.engines:
        for mixture in (True, False):
            key = f"{name}/{'gmm' if mixture else 'frozen'}"
            contestants[key] = Contestant(
                name, mixture, options.model, options.precision, options.batch, process, sync
            )
            contestants[key].time_steps(2)
    seconds: dict[str, list[float]] = {key: [] for key in contestants}
    for _ in range(options.rounds):
        for key in [*contestants, *reversed(contestants)]:
            seconds[key] += contestants[key].time_steps(options.steps)
    peak = torch.cuda.max_memory_allocated() / 1e9 if process.device.type == "cuda" else 0.0
    return (
        {"seconds": seconds, "world_size": process.world_size, "peak_gb": peak} if process.is_main else None
    )


def report(found: dict[str, Any], options: argparse.Namespace) -> int:
    """Prints the table and returns 1 where a ratio is below its floor."""
    medians = {key: statistics.median(values) for key, values in found["seconds"].items()}
    flops = dense_flops(options.model)
    images = options.batch * found["world_size"]
    print(describe_noise())
    print(f"{options.model} {options.precision}, {found['world_size']} ranks, {options.batch} images a rank")
    print(
        f"{'engine':8} {'steps/s':>8} {'of DDP':>7} {'gmm/frozen':>10} {'images/s':>9} {'TFLOP/s/rank':>12}  floor"
    )
    failed = False
    for name in options.engines:
        with_mixture, without = medians[f"{name}/gmm"], medians[f"{name}/frozen"]
        ratio = medians["ddp/gmm"] / with_mixture if "ddp" in options.engines else float("nan")
        floor = FLOORS.get(name)
        verdict = "" if floor is None else f"{'PASS' if ratio >= floor else 'FAIL'} >= {floor}"
        failed |= "FAIL" in verdict
        tflops = images / with_mixture * flops / found["world_size"] / 1e12
        print(
            f"{name:8} {1 / with_mixture:8.2f} {ratio:7.2f} {without / with_mixture:10.2f} "
            f"{images / with_mixture:9.1f} {tflops:12.3f}  {verdict}"
        )
    if found["peak_gb"]:
        print(f"peak allocated by all contestants together: {found['peak_gb']:.1f} GB")
    return int(failed)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--engines", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, help="images a rank")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the order and its reverse")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--timeout-s", type=float, default=1200)
    parser.add_argument("--result", help="used by the parent")
    options = parser.parse_args(arguments)
    options.batch = options.batch or MODELS[options.model][-1]
    return options


def main() -> int:
    """Starts the ranks (or is one of them) and prints the table."""
    options = parse()
    if options.result:
        found = race(options)
        if found is not None:
            Path(options.result).write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)  # hooks of six engines need no orderly end
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        rendezvous = {
            "WORLD_SIZE": str(options.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "TORCH_EXTENSIONS_DIR": folder,
        }
        command = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:], "--result", str(result)]
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
            print(f"exit codes of the ranks: {codes}", file=sys.stderr)
            return 1
        return report(json.loads(result.read_text()), options)


if __name__ == "__main__":
    sys.exit(main())
