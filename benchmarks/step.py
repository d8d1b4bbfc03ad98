"""Steps per second of every engine beside plain DDP, and of three modes beside each other: python -m benchmarks.step.

Each contestant runs what the trainer runs at an ordinary step: loader, collation, copy, augmentation, teacher, E-step
and M-step, student with drop path, loss, guards, optimizer, average and usage. Contestants live in one process group,
share one loader and take turns (forwards, then backwards), so that a drift of the machine falls on all alike. A table
of stages follows, measured in extra steps that wait at every border. Exit code 1 where a ratio is below its bar on CPU
ranks: to DDP 0.85 for ZeRO-1 and ZeRO-2, 0.6 for ZeRO-3 and FSDP2; `full` (the mixture) to `joint` 0.97 in the median
over engines; with `--objective ibot` (DINO and iBOT, 8,192 prototypes of patches) 0.95.

    python -m benchmarks.step --model vitl --ranks 1 --precision bf16 --batch 32 64 128 --workers 14 [--local-crops 8]

is the form for GPUs: one process group per engine and batch, with images/s, dense and executed TFLOP/s, their share
of a measured matrix product (MFU), peak memory, and the mixture's share of the step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._step_options import ENGINES, add_step_options
from runtime.usage import HelpFormatter, positive

CONTESTANTS = ("ddp", *ENGINES)
FULL_OVER_JOINT = {"carp": 0.97, "ibot": 0.95}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=HelpFormatter
    )
    add_step_options(parser)
    parser.add_argument(
        "--engines", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="who competes"
    )
    parser.add_argument(
        "--batch", type=positive, nargs="+", help="images a rank; the model's own where left out"
    )
    parser.add_argument("--ranks", type=positive, default=2, help="processes")
    parser.add_argument("--rounds", type=positive, default=3, help="rounds of the order and its reverse")
    parser.add_argument("--steps", type=positive, default=3, help="steps a turn")
    parser.add_argument("--timeout-s", type=float, default=1200, help="for one group of ranks")
    parser.add_argument("--shards", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":  # usage and mistakes are answered before the slow imports
    parse(sys.argv[1:])

import torch

from benchmarks._bars import judge
from benchmarks._stages import describe_stages
from benchmarks._step_contestants import MODELS, MODES, Contestant, build_config, open_stream, write_images
from benchmarks._timing import describe_noise
from runtime import distributed
from runtime.rendezvous import free_port
from training.cost import count_flops
from training.engines.synchronization import Synchronization
from training.throughput import measure_product_ceiling

FLOORS = {"zero1": 0.85, "zero2": 0.85, "zero3": 0.6, "fsdp2": 0.6}
_WARM_STEPS = 2
_STAGED_STEPS = 3


def race(options: argparse.Namespace) -> dict[str, Any] | None:
    """Runs on every rank; returns rank 0's seconds per step by contestant. Collective."""
    process = distributed.start(options.device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // process.world_size))
    synchronization = Synchronization(process.world_size, device=process.device)
    configs = {
        f"{name}/{mode}": build_config(options, mode, name, process.world_size)
        for name in options.engines
        for mode in MODES
    }
    own = next(iter(configs.values()))
    stream = open_stream(own, process)
    contestants: dict[str, Contestant] = {}
    peak_gb = 0.0
    for key, config in configs.items():
        contestants[key] = Contestant(key.split("/")[0], config, stream, process, synchronization)
        contestants[key].time_steps(_WARM_STEPS)
        if process.device.type == "cuda" and len(contestants) == 1:
            peak_gb = torch.cuda.max_memory_allocated() / 1e9
    seconds: dict[str, list[float]] = {key: [] for key in contestants}
    for _ in range(options.rounds):
        for key in [*contestants, *reversed(contestants)]:
            seconds[key] += contestants[key].time_steps(options.steps)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    found = {
        "seconds": seconds,
        "stages": {name: contestants[f"{name}/full"].time_stages(_STAGED_STEPS) for name in options.engines},
        "flops": count_flops(own),
        "ceiling": measure_product_ceiling(process.device, dtype),
        "world_size": process.world_size,
        "peak_gb": peak_gb,
        "batch": options.batch[0],
        "device": process.device.type,
    }
    return found if process.is_main else None


def report(found: dict[str, Any], options: argparse.Namespace) -> bool:
    """Prints one group's tables and returns whether a ratio is below its floor."""
    medians = {key: statistics.median(values) for key, values in found["seconds"].items()}
    dense, executed = found["flops"]
    images = found["batch"] * found["world_size"]
    print(
        f"{options.model} {options.objective} {options.precision}, {found['world_size']} ranks, "
        f"{found['batch']} images a rank"
    )
    print(
        f"{'engine':8} {'steps/s':>8} {'of DDP':>7} {'full/joint':>10} {'full/frozen':>11} {'images/s':>9} "
        f"{'TFLOP/s/rank':>12} {'executed':>9} {'MFU':>6}  floor"
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
        flops_per_s = images / full / found["world_size"]
        print(
            f"{name:8} {1 / full:8.2f} {ratio:7.2f} {joint / full:10.3f} {frozen / full:11.3f} "
            f"{images / full:9.1f} {flops_per_s * dense / 1e12:12.3f} {flops_per_s * executed / 1e12:9.3f} "
            f"{flops_per_s * dense / found['ceiling']:6.1%}  {verdict}"
        )
        if found["peak_gb"]:
            print(
                f"         peak {found['peak_gb']:.1f} GB (mode full alone), "
                f"{flops_per_s * executed / found['ceiling']:.1%} of the measured "
                f"{found['ceiling'] / 1e12:.0f} TFLOP/s executed, mixture {1 - frozen / full:.2%} of the step"
            )
    median = statistics.median(against_joint)
    passed, verdict = judge(median, found["device"], least=FULL_OVER_JOINT[options.objective], unit="")
    print(f"full over joint, median of engines: {median:.3f} {verdict}")
    print(f"(MFU: dense FLOPs of a product's {found['ceiling'] / 1e12:.3f} TFLOP/s, measured by every rank)")
    print("\n".join(describe_stages(found["stages"])))
    return failed or not passed


def run_group(
    options: argparse.Namespace, engines: Sequence[str], batch: int, shards: str
) -> dict[str, Any] | None:
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
        command += ["--engines", *engines, "--batch", str(batch), "--shards", shards]
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
    with tempfile.TemporaryDirectory() as shards:
        write_images(options, shards)
        for batch in options.batch:
            for engines in groups:
                group = run_group(options, engines, batch, shards)
                if group is None:
                    failed = True
                    continue
                failed |= report(group, argparse.Namespace(**{**vars(options), "engines": engines}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
