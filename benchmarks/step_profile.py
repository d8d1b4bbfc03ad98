"""Where a training step's time goes, on the device and on the host: python -m benchmarks.step_profile [--model vitl].

The trainer's own step on one process, undisturbed first (images/s, peak memory), then under torch's profiler. For every
stage: how long it lasts on the host, waits included, the kernels and copies that it launches, and how long these keep
the device busy. A step whose device is busy for much less than it lasts waits for its launches. On a CPU there is the
host alone. A launch belongs to the stage at its time, whatever the thread: the backward pass has its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._step_options import ENGINES, add_step_options
from runtime.usage import HelpFormatter, positive


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_profile", description=__doc__, formatter_class=HelpFormatter
    )
    add_step_options(parser)
    parser.add_argument("--engine", choices=ENGINES, default="zero1", help="what executes it")
    parser.add_argument(
        "--mode",
        choices=("full", "joint", "frozen_random"),
        default="full",
        help="what trains the prototypes",
    )
    parser.add_argument("--batch", type=positive, help="images; the model's own where left out")
    parser.add_argument(
        "--steps", type=positive, default=12, help="undisturbed steps; a quarter of them are profiled"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":  # usage and mistakes are answered before the slow imports
    parse(sys.argv[1:])

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks._stages import STAGES, StageClock
from benchmarks._step_contestants import MODELS, Contestant, build_config, open_stream, write_images
from benchmarks._timing import describe_noise
from runtime import distributed
from runtime.rendezvous import free_port
from training.cost import count_flops
from training.engines.synchronization import Synchronization
from training.throughput import measure_product_ceiling

_WARM_STEPS = 5
_MARK = "stage:"
_LAUNCHES, _DEVICE_WORK = ("cuda_runtime", "cuda_driver"), ("kernel", "gpu_memcpy", "gpu_memset")


class StageMarks(StageClock):
    """Marks a step's stages in the profiler's trace, and waits for nothing."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Marks what runs inside."""
        with record_function(_MARK + name):
            yield


class Profile(NamedTuple):
    """What a trace says of all its steps, in milliseconds; a stage inside another one counts for itself alone.

    Attributes:
        host: from its begin to its end on the host, by stage.
        launches: number of kernels and copies, by the stage that launched them.
        device: their time, by the same; kernels side by side count each.
        busy: while the device did anything.
    """

    host: Mapping[str, float]
    launches: Mapping[str, int]
    device: Mapping[str, float]
    busy: float


def read_trace(events: Iterable[Mapping[str, Any]]) -> Profile:
    """Returns what the events of a Chrome trace (microseconds) say of the stages marked in it."""
    events = [event for event in events if "dur" in event]
    stages = sorted(
        (
            (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(_MARK))
            for event in events
            if event.get("cat") == "user_annotation" and event["name"].startswith(_MARK)
        ),
        key=lambda stage: (stage[0], -stage[1]),
    )
    starts = [start for start, _, _ in stages]
    host: Counter[str] = Counter()
    enclosing: list[tuple[float, str]] = []
    for start, end, name in stages:
        while enclosing and enclosing[-1][0] <= start:
            enclosing.pop()
        host[name] += (end - start) / 1e3
        if enclosing:
            host[enclosing[-1][1]] -= (end - start) / 1e3
        enclosing.append((end, name))

    def innermost(moment: float) -> str:
        for start, end, name in reversed(stages[: bisect_right(starts, moment)]):
            if start <= moment < end:
                return name
        return "outside"

    launched_in = {
        event["args"]["correlation"]: innermost(event["ts"])
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    launches: Counter[str] = Counter()
    device: Counter[str] = Counter()
    busy, reached = 0.0, 0.0
    work = [event for event in events if event.get("cat") in _DEVICE_WORK]
    for event in sorted(work, key=lambda one: one["ts"]):
        stage = launched_in.get(event["args"].get("correlation"), "outside")
        launches[stage] += 1
        device[stage] += event["dur"] / 1e3
        end = event["ts"] + event["dur"]
        busy += max(0.0, end - max(event["ts"], reached)) / 1e3
        reached = max(reached, end)
    return Profile(host, launches, device, busy)


def main() -> int:
    """Prints the undisturbed step and the table."""
    options = parse(sys.argv[1:])
    options.batch = [options.batch or MODELS[options.model].batch]
    os.environ |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    print(describe_noise())
    with tempfile.TemporaryDirectory() as folder:
        options.shards = folder
        write_images(options, folder)
        measure(options, Path(folder) / "trace.json")
    sys.stdout.flush()
    os._exit(0)  # hooks of the engine need no orderly end


def measure(options: argparse.Namespace, trace: Path) -> None:
    """Runs the steps and prints what they took."""
    process = distributed.start(options.device)
    is_gpu = process.device.type == "cuda"
    config = build_config(options, options.mode, options.engine, 1)
    contestant = Contestant(
        options.engine,
        config,
        open_stream(config, process),
        process,
        Synchronization(1, device=process.device),
        StageMarks(process.device),
    )
    contestant.time_steps(_WARM_STEPS)
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(options.steps):
        contestant.step()
    if is_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / options.steps
    images_per_s = options.batch[0] / seconds
    peak = f", peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if is_gpu else ""
    ceiling = measure_product_ceiling(
        process.device, torch.bfloat16 if options.precision == "bf16" else torch.float32
    )
    dense, _ = count_flops(config)
    print(
        f"{options.model} {options.objective} {options.mode} {options.engine} {options.precision}"
        f"{' compiled' if options.compile else ''}, {options.batch[0]} images, "
        f"2 + {config.data.num_local_crops} crops: {1e3 * seconds:.1f} ms a step, {images_per_s:.1f} images/s, "
        f"{images_per_s * dense / ceiling:.1%} of a product's {ceiling / 1e12:.3g} TFLOP/s{peak}",
        flush=True,
    )
    profiled = max(1, options.steps // 4)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with contestant.clock.watching_the_loss(), profile(activities=activities) as profiler:
        for _ in range(profiled):
            with contestant.clock.stage("rest"):
                contestant.step()
        if is_gpu:
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    print("\n".join(describe(read_trace(json.loads(trace.read_text())["traceEvents"]), profiled)))


def describe(found: Profile, num_steps: int) -> list[str]:
    """Returns the lines of the table: milliseconds and launches of one step by stage."""
    host, device = sum(found.host.values()) / num_steps, sum(found.device.values()) / num_steps
    lines = [f"{'stage':16}{'host ms':>9}{'launches':>10}{'device ms':>11}{'share':>8}"]
    for stage in (*STAGES, "outside"):
        if stage in found.host or stage in found.device:
            share = found.device.get(stage, 0.0) / num_steps / device if device else 0.0
            lines.append(
                f"{stage:16}{found.host.get(stage, 0.0) / num_steps:9.2f}"
                f"{found.launches.get(stage, 0) / num_steps:10.0f}"
                f"{found.device.get(stage, 0.0) / num_steps:11.2f}{share:8.1%}"
            )
    lines.append(
        f"{'sum':16}{host:9.2f}{sum(found.launches.values()) / num_steps:10.0f}{device:11.2f}"
        f"    the device is busy for {found.busy / num_steps:.1f} ms of a profiled step"
    )
    return lines


if __name__ == "__main__":
    sys.exit(main())
