"""Images per second and core of five loaders, side by side, on real photographs of ImageNet's size.

    python -m benchmarks.loader
    python -m benchmarks.loader --images photos/ --seconds 20 --rounds 5

Photographs come from Debian's wallpaper packages (fetched without root), or else from the two that scikit-learn
holds, cut into 500 x 375 JPEGs. Every contestant runs in a child process with one thread; rounds alternate between
them. The clock is the child's CPU time, so that other programs on the machine disturb the figures little; wall time
is printed beside it. All of a contestant's stages are in its clock. The colour stage of our loader is measured on the
device it runs on and printed apart: the stage moves there, it does not vanish.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.photographs import make_photographs
from runtime.usage import HelpFormatter, positive

_MEMORY = "memory"
_LOADER_BAR, _LOADER_GOAL, _ALIKE_BAR = 4.0, 7.0, 1.2
_FIRST_BAR_S, _RESUME_BAR_S, _GROWTH_BAR = 5.0, 10.0, 0.05


def main(arguments: list[str] | None = None) -> int:
    """Prints the table, or runs one contestant in a child process; returns the exit code."""
    options = _parse(arguments)
    if options.contestant == _MEMORY:
        from benchmarks.loader_endurance import measure_memory

        print(json.dumps(measure_memory(options.shards, options.memory_samples)))
        return 0
    if options.contestant:
        measured = run_contestant(options.contestant, options.images, options.shards, options.seconds)
        print(json.dumps(measured))
        return 0
    try:
        report = compare(options)
    except ValueError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    print_report(report)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def compare(options: argparse.Namespace) -> dict:
    """Returns every contestant's figures; medians over the rounds."""
    from benchmarks.loader_contestants import BATCH_SIZE, CONTESTANTS
    from benchmarks.loader_endurance import measure_resumption

    work = Path(options.work)
    images, source = Path(options.images), f"those in {options.images}"
    if not options.images:
        images, source = make_photographs(work, options.num_images)
    paths = list(images.rglob("*.jpg"))
    if len(paths) < BATCH_SIZE:  # a contestant that drops the last batch would look for a whole one for ever
        raise ValueError(
            f"images are {len(paths)}; expected at least {BATCH_SIZE}, one batch; set --num-images"
        )
    shards = make_shards(images, work)
    rounds: dict[str, list[dict]] = {name: [] for name in CONTESTANTS}
    for number in range(options.rounds):
        for name in CONTESTANTS:
            measured = _run_child(name, str(images), str(shards), options)
            rounds[name].append(measured)
            print(f"round {number + 1}: {measured['per_cpu_s']:6.1f} img/s/core, {name}", file=sys.stderr)
    return {
        "images": len(paths),
        "source": source,
        "mean_kilobytes": statistics.mean(path.stat().st_size for path in paths) / 1000,
        "rounds": options.rounds,
        "contestants": {
            name: {
                "per_core": statistics.median(result["per_cpu_s"] for result in results),
                "per_wall": statistics.median(result["per_wall_s"] for result in results),
                "first_batch_s": statistics.median(result["first_batch_s"] for result in results),
                "lowest": min(result["per_cpu_s"] for result in results),
                "highest": max(result["per_cpu_s"] for result in results),
            }
            for name, results in rounds.items()
        },
        "colour_stage": measure_colour_stage(str(shards)),
        "resumption": measure_resumption(work),
        "memory": _run_child(_MEMORY, str(images), str(shards), options) if options.memory_samples else None,
    }


def run_contestant(name: str, images: str, shards: str, seconds: float) -> dict[str, float]:
    """Returns images per second of CPU time and of wall time of one contestant in this process."""
    import torch

    from benchmarks.loader_contestants import CONTESTANTS

    torch.set_num_threads(1)
    started = time.perf_counter()
    batches = CONTESTANTS[name](images, shards)
    next(batches)
    first_batch_s = time.perf_counter() - started
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.process_time() - cpu < seconds:
        count += next(batches)
    return {
        "per_cpu_s": count / (time.process_time() - cpu),
        "per_wall_s": count / (time.perf_counter() - wall),
        "first_batch_s": first_batch_s,
    }


def measure_colour_stage(shards: str) -> dict[str, float | str]:
    """Returns images per second of the colour stage on the device where it would run."""
    import torch

    from benchmarks.loader_contestants import data_config, open_stream
    from data.views.augmentations import DeviceAugmentation

    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    augment = DeviceAugmentation(data_config(shards)).to(device)
    batch = next(iter(open_stream(shards))).to(device)
    durations = []
    for _ in range(8):
        if device == "cuda":
            torch.cuda.synchronize()
        clock = time.perf_counter if device == "cuda" else time.process_time
        started = clock()
        augment(batch)
        if device == "cuda":
            torch.cuda.synchronize()
        durations.append(clock() - started)
    torch.set_num_threads(threads)
    name = torch.cuda.get_device_name() if device == "cuda" else "one CPU core"
    return {"device": name, "per_s": len(batch.keys) / statistics.median(durations[1:])}


def make_shards(images: Path, work: Path) -> Path:
    """Returns a folder of shards with the same files."""
    from data.writing.image_sources import FileSource, list_image_folder
    from data.writing.shard_writing import write_split

    out = work / f"{images.name}-shards"
    out.mkdir(parents=True, exist_ok=True)
    listing = list_image_folder(str(images))
    source = FileSource(listing.files, listing.classes, drops_duplicates=False)
    write_split(source, "train", str(out), samples_per_shard=max(8, len(listing.files) // 8))
    return out


def print_report(report: dict) -> None:
    """Prints the table for people."""
    size = f"{report['images']} photographs of {report['mean_kilobytes']:.0f} KB"
    print(f"{size} ({report['source']}), {report['rounds']} rounds")
    header = f"{'loader (2 x 224 + 10 x 96, DINO)':44} {'img/s/core':>10} {'range':>15}"
    print(f"{header} {'ratio':>6} {'wall':>6} {'first':>7}")
    contestants = report["contestants"]
    baseline = next(iter(contestants.values()))["per_core"]
    for name, figures in contestants.items():
        spread = f"{figures['lowest']:.1f}-{figures['highest']:.1f}"
        print(
            f"{name:44} {figures['per_core']:10.1f} {spread:>15} {figures['per_core'] / baseline:5.1f}x "
            f"{figures['per_wall']:6.1f} {figures['first_batch_s']:5.1f} s"
        )
    colour = report["colour_stage"]
    per_core = [figures["per_core"] for figures in contestants.values()]
    loader, total, alike = per_core[4] / baseline, per_core[3] / baseline, per_core[3] / per_core[2]
    print(f"colour stage on {colour['device']}: {colour['per_s']:.1f} img/s")
    first = max(figures["first_batch_s"] for name, figures in contestants.items() if name.startswith("ours"))
    resumption, memory = report["resumption"], report["memory"]
    _print_bar(
        f"loader {loader:.1f}x of the first (bar {_LOADER_BAR:g}x, goal {_LOADER_GOAL:g}x); with the colours on the "
        f"same CPU {total:.1f}x",
        loader >= _LOADER_BAR,
    )
    _print_bar(
        f"like for like, all on the CPU: {alike:.2f}x of torchvision v2 (bar {_ALIKE_BAR:g}x)",
        alike >= _ALIKE_BAR,
    )
    _print_bar(f"first batch after {first:.1f} s (bar {_FIRST_BAR_S:g} s)", first <= _FIRST_BAR_S)
    _print_bar(
        f"first batch after sample 1,000,000 of an ImageNet-sized set: {resumption['with_index_s']:.1f} s (bar "
        f"{_RESUME_BAR_S:g} s); without an index {resumption['without_index_s']:.1f} s",
        resumption["with_index_s"] <= _RESUME_BAR_S,
    )
    if memory:
        growth = memory["worker_late_mib"] / memory["worker_early_mib"] - 1
        _print_bar(
            f"loader's memory over {memory['samples']:.0f} photographs: {memory['worker_early_mib']:.0f} MiB early, "
            f"{memory['worker_late_mib']:.0f} late, {memory['worker_peak_mib']:.0f} at most; its trainer "
            f"{memory['trainer_early_mib']:.0f} and {memory['trainer_late_mib']:.0f} (bar +{_GROWTH_BAR:.0%})",
            growth <= _GROWTH_BAR,
        )


def _print_bar(text: str, held: bool) -> None:
    print(f"[{'held' if held else 'MISSED'}] {text}")


def _run_child(name: str, images: str, shards: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loader", "--contestant", name, "--images", images]
    command += ["--shards", shards, "--seconds", str(options.seconds)]
    command += ["--memory-samples", str(options.memory_samples)]
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise ValueError(f"contestant {name!r} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--images", default="", help="folder of class folders of JPEGs; default: wallpapers")
    parser.add_argument("--num-images", type=positive, default=240)
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="of CPU time for each contestant and round"
    )
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument(
        "--memory-samples", type=int, default=20_000, help="length of the memory run; 0 leaves it out"
    )
    parser.add_argument(
        "--work", default="outputs/benchmarks/loader", help="where photographs and shards are kept"
    )
    parser.add_argument("--out", default="outputs/benchmarks/loader.json")
    parser.add_argument("--contestant", default="", help=argparse.SUPPRESS)
    parser.add_argument("--shards", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
