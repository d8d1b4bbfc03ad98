"""What a user could install instead, for the same minutes: python -m benchmarks.peers --data SHARDS --minutes 15.

lightly's DINO, SwAV and SimCLR, put together from its public parts as its examples do (`_lightly_method.py`) in an
environment of their own, beside our `full` and `joint`: the same encoder (timm's test_resnet), images, two crops of 32
pixels, batch, optimizer, schedules, widths, K = 1,024, threads and minutes. First all of them in turn, several times
over, as a machine's speed drifts by more than they differ, show with how many loader processes each is fastest, and how
many steps fit into the minutes; then each trains for so many, with its whole schedule. k-NN and linear probe are ours,
of the frozen encoders (of `full`, `joint` and `dino` the teacher).

Nobody's learning rate, augmentation or loss is tuned here; with --lr every contestant runs at each of several rates.
Writes OUT/peers.md and OUT/peers.json. Stopped and started again, it goes on; what is done with other settings is
refused. Linux; CPU alone; needs the package index once, for lightly.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.report import describe_machine, replace_file
from runtime.program import EXIT_DONE, UserError, run_program
from runtime.usage import HelpFormatter

_CALIBRATION_STEPS = 60
_WORKERS = (0, 1, 2)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--data", default="datasets/cifar10", help="shards with labelled splits train and test"
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="of training for each")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="of full, joint, dino, swav, simclr; all by default"
    )
    parser.add_argument("--lr", type=float, nargs="+", help="peak rates per 256 images; our own by default")
    parser.add_argument(
        "--threads", type=int, default=2, help="cores that a contestant may use, and its threads"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=list(_WORKERS), help="loader processes to try"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of all contestants in turn, for the speed")
    parser.add_argument(
        "--calibration-steps", type=int, default=_CALIBRATION_STEPS, help="the second half is timed"
    )
    parser.add_argument("--batch", type=int, help="images a step; the configuration's by default")
    parser.add_argument("--seed", type=int, default=0, help="of every contestant")
    parser.add_argument("--out", default="outputs/peers", help="folder of everything that is written")
    parser.add_argument(
        "--environment", default="outputs/peers_environment", help="virtual environment of lightly's"
    )
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> tuple[str, ...]:
    """Returns the contestants' names, and keeps this process and all that it starts on so many cores.

    Raises:
        UserError: an option has no meaning; one line.
    """
    from benchmarks._peer_runs import LIGHTLY, OURS

    names = (*OURS, *LIGHTLY)
    for name in options.only or ():
        if name not in names:
            raise UserError(f"--only is {name}; expected names of {', '.join(names)}; set --only")
    cores = sorted(os.sched_getaffinity(0))
    rules = {
        "--minutes": (options.minutes, 0 < options.minutes < math.inf, "more than 0"),
        "--threads": (
            options.threads,
            0 < options.threads <= len(cores),
            f"1 to {len(cores)}, the cores there are",
        ),
        "--workers": (options.workers, min(options.workers) >= 0, "0 or more"),
        "--lr": (options.lr, all(0 < lr < math.inf for lr in options.lr or ()), "more than 0"),
        "--batch": (options.batch, options.batch is None or options.batch > 1, "2 or more"),
        "--rounds": (options.rounds, options.rounds >= 1, "1 or more"),
        "--calibration-steps": (options.calibration_steps, options.calibration_steps >= 2, "2 or more"),
        "--seed": (options.seed, 0 <= options.seed < 2**32, "0 to 4294967295"),
    }
    for flag, (value, holds, rule) in rules.items():
        if not holds:
            raise UserError(f"{flag} is {value}; expected {rule}; set {flag}")
    os.sched_setaffinity(0, cores[: options.threads])
    return tuple(dict.fromkeys(options.only)) if options.only else names


def main(arguments: list[str]) -> int:
    """Trains, measures and compares; returns the exit code."""
    options = parse(arguments)
    names = check(options)
    from benchmarks._peer_runs import LIGHTLY, OURS, Bench, describe_versions, install, unpack
    from evaluation.config import EvaluationDataConfig
    from evaluation.features.splits import load_splits
    from runtime.config import load_config
    from training.config import PretrainConfig

    out, shards = Path(options.out).absolute(), Path(options.data).absolute()
    load_splits(EvaluationDataConfig(shards=str(shards)), "--data")
    chosen = [f"data.shards={shards}"]
    chosen += [f"batch.global_batch_size={options.batch}"] if options.batch else []
    config = load_config(PretrainConfig, str(OURS["full"]), chosen)
    needs_lightly = any(name in LIGHTLY for name in names)
    python = install(Path(options.environment).absolute()) if needs_lightly else Path(sys.executable)
    num_images = unpack(shards, out / "train")
    rows: list[dict[str, Any]] = []
    bench = Bench(
        config=config,
        shards=shards,
        images=out / "train" / "images",
        num_images=num_images,
        out=out,
        python=python,
        threads=options.threads,
        seed=options.seed,
    )
    speeds = take_turns(bench, names, options)
    for lr in options.lr or (config.optim.lr,):
        at_rate = load_config(PretrainConfig, str(OURS["full"]), [*chosen, f"optim.lr={lr}"])
        bench = replace(bench, config=at_rate)
        for name in names:
            rows.append(compete(bench, name, options, speeds[name], controls=not rows))
            print(write_table(rows), flush=True)
            record = {
                "options": vars(options),
                "contestants": rows,
                "lightly": dict(describe_versions(python)) if needs_lightly else {},
                **describe_machine("cpu"),
            }
            replace_file(out / "peers.json", json.dumps(record, indent=1) + "\n")
            replace_file(out / "peers.md", write_table(rows))
    return EXIT_DONE


def take_turns(bench: Any, names: tuple[str, ...], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns how fast each contestant is in short runs, all in turn, back and forth: from its file where it is done.

    Returns:
        By name, `images_per_s`: number of loader processes to the speed of each round; and `load` of the machine before
        each round.

    Raises:
        UserError: it was done with other settings.
    """
    done = bench.out / "speeds.json"
    settings = {"names": list(names)} | _settings(
        options, "data", "threads", "workers", "batch", "rounds", "calibration_steps"
    )
    if done.is_file():
        known = json.loads(done.read_text())
        _require_same(known["settings"], settings, done)
        return known["speeds"]
    speeds: dict[str, dict[str, Any]] = {
        name: {"images_per_s": {str(number): [] for number in sorted(set(options.workers))}, "load": []}
        for name in names
    }
    for turn in range(options.rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            of_name = speeds[name]
            of_name["load"].append(os.getloadavg()[0])
            for workers, found in of_name["images_per_s"].items():
                tried = bench.train(
                    name, bench.out / "trial" / name, steps=options.calibration_steps, workers=int(workers)
                )
                found.append(statistics.median(tried.images_per_s[len(tried.images_per_s) // 2 :]))
        print(f"turn {turn + 1} of {options.rounds}: {_last_speeds(speeds)}", flush=True)
    replace_file(done, json.dumps({"settings": settings, "speeds": speeds}, indent=1) + "\n")
    return speeds


def compete(
    bench: Any, name: str, options: argparse.Namespace, speeds: dict[str, Any], *, controls: bool
) -> dict[str, Any]:
    """Returns one contestant's row: from its file where it is done, else after training and evaluation.

    Raises:
        UserError: it was done with other settings.
    """
    lr = bench.config.optim.lr
    folder = bench.out / f"{name}-lr{lr:g}"
    done = folder / "result.json"
    settings = _settings(
        options, "data", "minutes", "threads", "workers", "batch", "seed", "rounds", "calibration_steps"
    )
    settings |= {"lr": lr}
    if done.is_file():
        row: dict[str, Any] = json.loads(done.read_text())
        _require_same(row["settings"], settings, folder)
        return row
    loads = [os.getloadavg()[0]]
    medians = {number: statistics.median(found) for number, found in speeds["images_per_s"].items()}
    workers = max(medians, key=lambda number: medians[number])
    steps = bench.num_steps(options.minutes, medians[workers])
    print(f"{folder.name}: {steps} steps with {workers} loader processes", flush=True)
    trained = bench.train(name, folder / "training", steps=steps, workers=int(workers))
    loads.append(os.getloadavg()[0])
    probed = bench.evaluate(trained.encoder, folder / "evaluation", controls=controls)
    row = {
        "name": name,
        "settings": settings,
        "in_turn": speeds["images_per_s"][workers],
        "workers": int(workers),
        "steps": steps,
        "epochs": bench.epochs(steps),
        "minutes": trained.seconds / 60,
        "images_per_s": statistics.median(trained.images_per_s),
        "peak_gib": trained.peak_gib,
        "top1": probed,
        "load": [*speeds["load"], *loads],
        "finished_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    replace_file(done, json.dumps(row, indent=1) + "\n")
    return json.loads(done.read_text())  # as it will be read the next time


def _settings(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


def _require_same(found: dict[str, Any], settings: dict[str, Any], place: Path) -> None:
    if found != settings:
        raise UserError(
            f"{place} is of a run with other settings ({found}); expected the same; set --out anew"
        )


def _last_speeds(speeds: dict[str, dict[str, Any]]) -> str:
    best = {name: max(found[-1] for found in of["images_per_s"].values()) for name, of in speeds.items()}
    return ", ".join(f"{name} {speed:.0f}" for name, speed in best.items()) + " images/s"


def write_table(rows: list[dict[str, Any]]) -> str:
    """Returns the contestants side by side in Markdown; what was measured on a busy machine says so."""
    lines = [
        "| | lr | k-NN % | linear % | images/s in turn | in training | minutes | epochs | peak GiB | loaders | load |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        top1 = row["top1"]
        in_turn = row["in_turn"]
        speed = f"{statistics.median(in_turn):.0f} ({min(in_turn):.0f} to {max(in_turn):.0f})"
        lines.append(
            f"| {row['name']} | {row['settings']['lr']:g} | {100 * top1['knn']:.2f} | {100 * top1['linear']:.2f} "
            f"| {speed} | {row['images_per_s']:.0f} | {row['minutes']:.1f} | {row['epochs']:.1f} "
            f"| {row['peak_gib']:.2f} | {row['workers']} | {min(row['load']):.1f} to {max(row['load']):.1f} |"
        )
    for label in ("random-init", "raw-pixels"):
        known = [row["top1"][f"{label} knn"] for row in rows if f"{label} knn" in row["top1"]]
        if known:
            lines.append(f"| {label} | | {100 * known[0]:.2f} | | | | | | | | |")
    busy = [row["name"] for row in rows if max(row["load"]) > row["settings"]["threads"] + 1]
    late = [row["name"] for row in rows if abs(row["minutes"] / row["settings"]["minutes"] - 1) > 0.1]
    if busy:
        lines += ["", f"The machine had other work ({', '.join(busy)}): no evidence."]
    if late:
        lines += ["", f"More than 10 % off the minutes asked for: {', '.join(late)}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
