"""What the loader's speed is worth over a long run: how soon it resumes, and whether its memory grows."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.loader_contestants import BATCH_SIZE, data_config
from data.config import DataConfig
from data.shards import INDEX_DTYPE, Manifest, Shard, load_index, load_manifest, save_index, save_manifest
from data.stream.pipeline import TrainingStream
from data.stream.workers import measure_rss_mib

_IMAGENET_SAMPLES, _IMAGENET_SHARDS = 1_281_167, 1024
RESUME_AT = 1_000_000
_SAMPLES_A_READING = 1000
# What the loader has touched by then, it holds: torch, its buffers, the windows of all lanes.
_WARM_SAMPLES = 2000


def measure_resumption(work: Path) -> dict[str, float]:
    """Returns seconds from opening the stream at sample 1,000,000 of an ImageNet-sized set to its first batch.

    Everything of a real resumption happens: the manifest and the index of 1,281,167 samples are read, the sizes of
    1,024 tars compared, and every lane finds its place. Only the tars are synthetic: names of two files of tiny JPEGs.
    """
    folder = work / "imagenet-sized"
    manifest = _make_imagenet_sized(folder)
    config = DataConfig(
        shards=str(folder), num_workers=0, num_local_crops=0, global_crop_size=8, num_lanes=64
    )
    per_lane = RESUME_AT // config.num_lanes
    position = {
        "seed": 0,
        "num_lanes": config.num_lanes,
        "shuffle_window": config.shuffle_window,
        "sampler": config.sampler,
        "manifest": manifest.hash,
        "samples_seen": RESUME_AT,
        "used": {str(lane): per_lane for lane in range(config.num_lanes)},
    }
    measured = {}
    for name in ("with_index_s", "without_index_s"):
        if name == "without_index_s":
            (folder / manifest.index_path).unlink()
        started = time.perf_counter()
        stream = TrainingStream(
            config, seed=0, global_batch_size=64, micro_batch_size=64, rank=0, world_size=1, position=position
        )
        batch = next(iter(stream))
        measured[name] = time.perf_counter() - started
        assert batch.position["samples_seen"] == RESUME_AT + 64
    return measured


def measure_memory(shards: str, num_samples: int) -> dict[str, float]:
    """Returns the resident memory of a loader process and of its trainer early and late in a long run, in MiB."""
    config = dataclasses.replace(data_config(shards), num_workers=1)
    stream = TrainingStream(
        config,
        seed=0,
        global_batch_size=BATCH_SIZE,
        micro_batch_size=BATCH_SIZE,
        rank=0,
        world_size=1,
    )
    readings: list[tuple[int, float, float]] = []
    seen = 0
    for batch in stream:
        seen += len(batch.keys)
        if seen // _SAMPLES_A_READING > len(readings) or seen >= num_samples:
            readings.append((seen, batch.worker_rss_mib, measure_rss_mib()))
            print(f"{seen} photographs: loader {batch.worker_rss_mib:.0f} MiB", file=sys.stderr, flush=True)
        if seen >= num_samples:
            break
    stream.close()
    warm = next((reading for reading in readings if reading[0] >= _WARM_SAMPLES), readings[-1])
    return {
        "samples": seen,
        "worker_early_mib": warm[1],
        "worker_late_mib": readings[-1][1],
        "worker_peak_mib": max(reading[1] for reading in readings),
        "trainer_early_mib": warm[2],
        "trainer_late_mib": readings[-1][2],
    }


def _make_imagenet_sized(folder: Path) -> Manifest:
    """Returns the manifest of 1,281,167 samples in 1,024 tars, which are names of two files."""
    from data.writing.shard_writing import write_split
    from data.writing.sources import ImageSource, SourceSample

    class TinyImages(ImageSource):
        fingerprint = "tiny"

        def __init__(self, count: int) -> None:
            self.count = count

        def __len__(self) -> int:
            return self.count

        def size(self, index: int) -> int:
            return 500

        def load(self, index: int) -> SourceSample:
            encoded = io.BytesIO()
            Image.new("RGB", (16, 16), (index % 256, 80, 160)).save(encoded, format="JPEG")
            return SourceSample(f"{index:06d}", {"jpg": encoded.getvalue()}, index % 2)

    folder.mkdir(parents=True, exist_ok=True)
    smaller, num_larger = divmod(_IMAGENET_SAMPLES, _IMAGENET_SHARDS)
    shards: list[Shard] = []
    indices: list[np.ndarray] = []
    for count, names in ((smaller + 1, range(num_larger)), (smaller, range(num_larger, _IMAGENET_SHARDS))):
        original = folder / f"of-{count}"
        original.mkdir(exist_ok=True)
        write_split(TinyImages(count), "train", str(original), samples_per_shard=count)
        written = load_manifest(str(original), "train")
        index = load_index(written)
        assert index is not None
        for number in names:
            name = f"train-{number:06d}.tar"
            (folder / name).unlink(missing_ok=True)
            os.link(written.path_of(written.shards[0]), folder / name)
            shards.append(dataclasses.replace(written.shards[0], name=name))
            indices.append(np.asarray(index))
    manifest = Manifest(split="train", shards=tuple(shards), directory=str(folder), index_path="train.index")
    manifest = save_index(manifest, np.concatenate(indices).astype(INDEX_DTYPE))
    save_manifest(manifest)
    return manifest
