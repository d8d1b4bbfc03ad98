"""Bytes and time of the ways in which ranks share a step's observations: python -m benchmarks.comm [--ranks 2 4].

For every number of ranks: the bytes that a rank sends in a step (a ring's for an all-reduce), the time that its
collectives take by themselves, and what of it is exposed: a step with its collectives - the same step without any.
Between `observe` and `commit` runs a product that stands for the student's forward pass (--overlap-ms of it), behind
which an asynchronous exchange can hide. Methods take turns (forwards, then backwards) in one process group. On CPU
ranks the exchange uses the cores that the product needs, so what hides on a GPU does not hide here: exposed times have
no bar. Exit code 1 if `sparse` sends more than a tenth of the bytes of `all_reduce`, or its collectives take more than
a third of the time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from runtime.usage import HelpFormatter, positive


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.comm", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--ranks", type=positive, nargs="+", default=[2, 4], help="numbers of processes, one after another"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where they compute")
    parser.add_argument(
        "--overlap-ms", type=float, default=100.0, help="work behind which to hide an exchange"
    )
    parser.add_argument("--rounds", type=positive, default=3, help="rounds of all methods")
    for name, value, meaning in (("N", 128, "rows"), ("K", 65536, "prototypes"), ("D", 256, "dimension")):
        parser.add_argument(f"--{name}", type=positive, default=value, help=meaning)
    return parser.parse_args(arguments)


if __name__ == "__main__":  # usage and mistakes are answered before the slow imports
    parse(sys.argv[1:])

import torch

from benchmarks._bars import judge
from benchmarks._timing import describe_noise
from prototypes.build import build_estimator
from prototypes.config import PartitionConfig, PrototypesConfig
from prototypes.estimator import PrototypeEstimator
from prototypes.mixture.config import AnnealingConfig, GmmConfig, SynchronizationConfig, VarianceConfig
from prototypes.mixture.exchange import estimate_costs
from runtime import distributed
from runtime.distributed import Process
from runtime.rendezvous import free_port
from training.engines.synchronization import Handle, Synchronization

METHODS = ("all_reduce", "all_gather", "sharded", "sparse")
MAX_SHARE_OF_BYTES = 0.1
MIN_SPEED_UP = 3.0
_BANDWIDTH_BYTES = 2**26
_LATE_STEP = 1000


def main() -> int:
    """Starts the ranks, or is one of them; returns the exit code."""
    arguments = parse(sys.argv[1:])
    if "RANK" in os.environ:
        return 0 if run_rank(arguments) else 1
    return max(start_ranks(number) for number in arguments.ranks)


def start_ranks(number: int) -> int:
    """Returns the largest exit code of so many ranks of this program."""
    shared = {**os.environ, "WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    command = [sys.executable, "-m", "benchmarks.comm", *sys.argv[1:]]
    ranks = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(number)
    ]
    return max(abs(rank.wait()) for rank in ranks)


def run_rank(arguments: argparse.Namespace) -> bool:
    """Times every method on this rank; rank 0 prints and judges. Collective."""
    process = distributed.start(arguments.device, timeout_s=120.0)
    if arguments.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // process.world_size))
    sync = Recorder(process.world_size)
    bandwidth = measure_bandwidth(process, sync)
    student = _Student(process, sync, arguments.overlap_ms)
    contestants = {name: build(name, arguments, process, sync) for name in ("none", *METHODS)}
    rows = torch.randn(arguments.N, arguments.D, device=process.device)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    sent: dict[str, list[tuple[str, int]]] = {}
    for turn in range(2 * arguments.rounds + 2):
        for name in contestants if turn % 2 else reversed(list(contestants)):
            sync.reduce_sum(torch.zeros(1, device=process.device)).wait()
            _finish(process.device)
            sync.sent.clear()
            started = time.perf_counter()
            observation = contestants[name].observe(rows)
            student.forward()
            contestants[name].commit(observation)
            contestants[name].accept()
            _finish(process.device)
            if turn > 1:  # The first turns allocate; sparse steps begin with the second.
                seconds[name].append(time.perf_counter() - started)
            sent[name] = list(sync.sent)
    alone = {name: replay(sent[name], process, sync, arguments.rounds) for name in METHODS}
    passed = True
    if process.is_main:
        moved = {name: count_bytes(sent[name], process.world_size) for name in METHODS}
        print_table(arguments, process.world_size, seconds, moved, alone, bandwidth)
        passed = judge_sparse(arguments.device, moved, alone)
    distributed.stop()
    return passed


class Recorder(Synchronization):
    """Collectives that remember what they were asked to move: (name, number of fp32 values)."""

    def __init__(self, world_size: int) -> None:
        super().__init__(world_size)
        self.sent: list[tuple[str, int]] = []

    def reduce_sum(self, tensor: torch.Tensor) -> Handle:
        """As the base class."""
        self.sent.append(("reduce_sum", tensor.numel()))
        return super().reduce_sum(tensor)

    def gather(self, tensor: torch.Tensor) -> Handle:
        """As the base class."""
        self.sent.append(("gather", tensor.numel()))
        return super().gather(tensor)


def count_bytes(sent: list[tuple[str, int]], world_size: int) -> float:
    """Returns the bytes that a rank sends: 2 (W - 1) / W of a tensor that is summed, W - 1 times a part to gather."""
    shares = {"reduce_sum": 2 * (world_size - 1) / world_size, "gather": world_size - 1}
    return sum(4 * number * shares[name] for name, number in sent)


def replay(sent: list[tuple[str, int]], process: Process, sync: Recorder, rounds: int) -> float:
    """Returns the least seconds of a step's collectives, one after another and nothing else. Collective."""
    tensors = [(name, torch.zeros(number, device=process.device)) for name, number in sent]
    best = float("inf")
    for _ in range(2 * rounds):
        sync.reduce_sum(torch.zeros(1, device=process.device)).wait()
        _finish(process.device)
        started = time.perf_counter()
        for name, tensor in tensors:
            getattr(sync, name)(tensor).wait()
        _finish(process.device)
        best = min(best, time.perf_counter() - started)
    return best


def measure_bandwidth(process: Process, sync: Synchronization) -> float:
    """Returns GB/s of an all-reduce of 64 MiB as the cost rule counts them: 2 bytes moved per byte reduced."""
    tensor = torch.zeros(_BANDWIDTH_BYTES // 4, device=process.device)
    best = float("inf")
    for _ in range(4):
        _finish(process.device)
        started = time.perf_counter()
        sync.reduce_sum(tensor).wait()
        _finish(process.device)
        best = min(best, time.perf_counter() - started)
    return 2 * _BANDWIDTH_BYTES / best / 1e9


class _Student:
    """Products for about `overlap_ms`; their number is the same on every rank and for every method."""

    def __init__(self, process: Process, sync: Synchronization, overlap_ms: float) -> None:
        device = process.device
        self._matrix = torch.randn(512, 512, device=device)
        self._out = torch.empty_like(self._matrix)
        self._repetitions = 20
        self.forward()
        _finish(device)
        started = time.perf_counter()
        self.forward()
        _finish(device)
        elapsed_ms = torch.tensor(1e3 * (time.perf_counter() - started), device=device)
        mean_ms = float(sync.reduce_sum(elapsed_ms).wait()) / process.world_size
        self._repetitions = max(1, round(20 * overlap_ms / mean_ms))

    def forward(self) -> None:
        for _ in range(self._repetitions):
            torch.mm(self._matrix, self._matrix, out=self._out)


def build(
    method: str, arguments: argparse.Namespace, process: Process, sync: Synchronization
) -> PrototypeEstimator:
    """Returns an estimator that exchanges by `method`; "none" is one that believes to be alone."""
    options = {} if method == "none" else {"method": method}
    config = PrototypesConfig(
        num_prototypes=arguments.K,
        dim=arguments.D,
        partition=PartitionConfig(size=arguments.K // 4),
        gmm=GmmConfig(
            synchronization=SynchronizationConfig(**options),  # type: ignore[arg-type]
            beta=AnnealingConfig(schedule="constant", guard=None),
            variance=VarianceConfig(shrinkage=0.0),
        ),
    )
    estimator = build_estimator(
        config,
        seed=0,
        num_observations_per_epoch=2_560_000,
        total_steps=1000,
        rank=0 if method == "none" else process.rank,
        world_size=1 if method == "none" else process.world_size,
        rows_per_rank=arguments.N,
        reduce_sum=sync.reduce_sum,
        gather=sync.gather,
        device=process.device,
    )
    estimator.step = _LATE_STEP  # past the start, in which natural parameters move with every step
    return estimator


def print_table(
    arguments: argparse.Namespace,
    world_size: int,
    seconds: dict[str, list[float]],
    moved: dict[str, float],
    alone: dict[str, float],
    bandwidth: float,
) -> None:
    """Prints bytes, times and what each exchange adds, and the rule's estimate at the measured bandwidth."""
    rule = SynchronizationConfig(bandwidth_gb_per_s=bandwidth, overlap_ms=arguments.overlap_ms)
    costs = estimate_costs(
        rule,
        num_prototypes=arguments.K,
        dim=arguments.D,
        rows_per_rank=arguments.N,
        world_size=world_size,
    )
    without = statistics.median(seconds["none"])
    print(
        f"comm N={arguments.N} K={arguments.K} D={arguments.D} ranks={world_size} {arguments.device} | "
        f"all-reduce {bandwidth:.2f} GB/s | no exchange {1e3 * without:.1f} ms | {describe_noise()}"
    )
    for method in METHODS:
        total = statistics.median(seconds[method])
        print(
            f"  {method:10s} sends {moved[method] / 1e6:.2f} MB in {1e3 * alone[method]:.1f} ms | step median "
            f"{1e3 * total:.1f} ms, exposed {1e3 * (total - without):+.1f} ms | "
            f"cost rule (for a GPU's products) {1e3 * costs[method]:.2f} ms"
        )


def judge_sparse(device: str, moved: dict[str, float], alone: dict[str, float]) -> bool:
    """Prints the verdicts on `sparse` beside `all_reduce` and returns whether all pass."""
    share, speed_up = moved["sparse"] / moved["all_reduce"], alone["all_reduce"] / alone["sparse"]
    bytes_verdict = judge(share, device, most=MAX_SHARE_OF_BYTES, unit="")
    time_verdict = judge(speed_up, device, least=MIN_SPEED_UP)
    print(f"  sparse sends {share:.4f} of the bytes of all_reduce | {bytes_verdict.text}")
    print(f"  collectives of all_reduce over those of sparse {speed_up:.1f}x | {time_verdict.text}")
    return bytes_verdict.passed and time_verdict.passed


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
