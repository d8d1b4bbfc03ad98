"""Images per second and core of five loaders, side by side, on real photographs of ImageNet's size.

    python -m benchmarks.loader
    python -m benchmarks.loader --images photos/ --seconds 20 --rounds 5

Photographs come from Debian's wallpaper packages (fetched without root), cut into 500 x 375 JPEGs. Every contestant
runs in a child process with one thread; rounds alternate between them. The clock is the child's CPU time, so that
other programs on the machine disturb the figures little; wall time is printed beside it. All of a contestant's
stages are in its clock. The colour stage of our loader is measured on the device it runs on and printed apart: the
stage moves there, it does not vanish.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

PACKAGES = ("lomiri-wallpapers", "plasma-workspace-wallpapers")
SIZE = (500, 375)
_JPEG_QUALITY = 92
# Tiles below this are sky or gradients: ImageNet's photographs have about 110 KB.
_LEAST_BYTES = 30_000
_IMAGENET_SAMPLES, _IMAGENET_SHARDS, _RESUME_AT = 1_281_167, 1024, 1_000_000


def main(arguments: list[str] | None = None) -> int:
    """Prints the table, or runs one contestant in a child process; returns the exit code."""
    options = _parse(arguments)
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
    from benchmarks.loader_contestants import CONTESTANTS

    work = Path(options.work)
    images = Path(options.images) if options.images else make_images(work, options.num_images)
    shards = make_shards(images, work)
    rounds: dict[str, list[dict]] = {name: [] for name in CONTESTANTS}
    for _ in range(options.rounds):
        for name in CONTESTANTS:
            rounds[name].append(_run_child(name, str(images), str(shards), options.seconds))
    paths = list(images.rglob("*.jpg"))
    return {
        "images": len(paths),
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
        "resume_s": measure_resumption(),
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
    from data.augmentations import DeviceAugmentation

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


def measure_resumption() -> float:
    """Returns the seconds until every lane of an ImageNet-sized set stands at sample 1,000,000 with its first read."""
    from data.plan import SamplePlan
    from data.shards import Manifest, Shard

    sizes = [_IMAGENET_SAMPLES // _IMAGENET_SHARDS] * _IMAGENET_SHARDS
    sizes[0] += _IMAGENET_SAMPLES - sum(sizes)
    shards = tuple(Shard(name=str(i), samples=size, bytes=1, sha256="") for i, size in enumerate(sizes))
    started = time.perf_counter()
    plan = SamplePlan(Manifest(split="train", shards=shards), seed=0, num_lanes=64, window=64)
    for lane in range(plan.num_lanes):
        epoch, place = plan.locate(lane, _RESUME_AT // plan.num_lanes)
        begin, _ = plan.window_order(lane, epoch, place)
        start, stop = plan.lane_range(lane, epoch)
        next(plan.segments(epoch, start + begin, stop))
    return time.perf_counter() - started


def make_images(work: Path, num_images: int) -> Path:
    """Returns a folder of 500 x 375 JPEGs in two class folders, cut from wallpaper photographs.

    Raises:
        ValueError: the packages cannot be fetched.
    """
    out = work / f"photographs-{num_images}"
    if len(list(out.rglob("*.jpg"))) == num_images:
        return out
    with tempfile.TemporaryDirectory() as scratch:
        for package in PACKAGES:
            for command in (
                ["apt-get", "download", package],
                ["sh", "-c", f"dpkg -x {package}_*.deb unpacked"],
            ):
                try:
                    subprocess.run(command, cwd=scratch, check=True, capture_output=True)
                except (OSError, subprocess.SubprocessError) as error:
                    raise ValueError(
                        f"photographs cannot be fetched ({' '.join(command[:3])}: {error}); expected a Debian package "
                        "index; pass --images FOLDER with class folders of JPEG photographs"
                    ) from error
        tiles = cut_tiles(Path(scratch) / "unpacked", num_images)
    for number, tile in enumerate(tiles):
        folder = out / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:05d}.jpg").write_bytes(tile)
    return out


def cut_tiles(photographs: Path, num_tiles: int) -> list[bytes]:
    """Returns encoded tiles of the photographs under a folder, the most detailed ones."""
    tiles: list[bytes] = []
    for path in sorted(photographs.rglob("*.jpg")):
        with Image.open(path) as opened:
            photograph = opened.convert("RGB")
        # Halved photographs show whole objects at ImageNet's scale; small ones are cut as they are.
        while min(photograph.size) > 3 * SIZE[1]:
            photograph = photograph.reduce(2)
        for top in range(0, photograph.height - SIZE[1] + 1, SIZE[1] // 2):
            for left in range(0, photograph.width - SIZE[0] + 1, SIZE[0] // 2):
                encoded = io.BytesIO()
                tile = photograph.crop((left, top, left + SIZE[0], top + SIZE[1]))
                tile.save(encoded, format="JPEG", quality=_JPEG_QUALITY)
                tiles.append(encoded.getvalue())
    detailed = sorted((tile for tile in tiles if len(tile) > _LEAST_BYTES), key=len, reverse=True)
    if len(detailed) < num_tiles:
        raise ValueError(
            f"--num-images is {num_tiles}; expected at most {len(detailed)} tiles; set --num-images"
        )
    return detailed[:num_tiles]


def make_shards(images: Path, work: Path) -> Path:
    """Returns a folder of shards with the same files."""
    from data.image_sources import FileSource, list_image_folder
    from data.shard_writing import write_split

    out = work / f"{images.name}-shards"
    out.mkdir(parents=True, exist_ok=True)
    files, classes = list_image_folder(str(images))
    write_split(FileSource(files, classes), "train", str(out), samples_per_shard=max(8, len(files) // 8))
    return out


def print_report(report: dict) -> None:
    """Prints the table for people."""
    print(f"{report['images']} photographs of {report['mean_kilobytes']:.0f} KB, {report['rounds']} rounds")
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
    print(f"loader {loader:.1f}x (bar 4x, goal 7x); with the colours on the same CPU {total:.1f}x")
    print(f"like for like, all on the CPU: {alike:.2f}x of torchvision v2 (bar 1.2x)")
    print(f"plan at sample 1,000,000 of an ImageNet-sized set: {report['resume_s']:.3f} s (bar 10 s)")


def _run_child(name: str, images: str, shards: str, seconds: float) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loader", "--contestant", name, "--images", images]
    command += ["--shards", shards, "--seconds", str(seconds)]
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise ValueError(f"contestant {name!r} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", default="", help="folder of class folders of JPEGs; default: wallpapers")
    parser.add_argument("--num-images", type=int, default=400)
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="of CPU time for each contestant and round"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--work", default="outputs/benchmarks/loader", help="where photographs and shards are kept"
    )
    parser.add_argument("--out", default="outputs/benchmarks/loader.json")
    parser.add_argument("--contestant", default="", help=argparse.SUPPRESS)
    parser.add_argument("--shards", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
