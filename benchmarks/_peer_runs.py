"""The contestants of `benchmarks.peers`: their commands, what they leave, and what they took."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.vit import backbone_arguments
from runtime.files import write_atomically
from runtime.program import Fault, UserError
from runtime.record import read_record
from training.config import PretrainConfig
from training.run_length import steps_per_epoch, warmup_steps

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "benchmarks" / "peers_requirements.txt"
OURS = {name: f"configs/pretrain_test-resnet_cifar10_{name}.yaml" for name in ("full", "joint")}
LIGHTLY = ("dino", "swav", "simclr")
_STAMP = "installed.txt"
_SAMPLED_EVERY_S = 2.0
_STRETCH_STEPS = 10


@dataclass(frozen=True)
class Trained:
    """One training.

    Attributes:
        images_per_s: of stretches of ten steps each.
        seconds: of all steps, without start and end of the program.
        peak_gib: most memory of all its processes together, shared pages counted once.
        encoder: what `evaluate.py` takes.
    """

    images_per_s: list[float]
    seconds: float
    peak_gib: float
    encoder: str


@dataclass(frozen=True)
class Bench:
    """What all contestants have in common.

    Attributes:
        config: of `full`, whose encoder, crops, batch, schedules, widths and K everybody takes.
        shards: folder of the images, and `images` the training split unpacked, a folder a class.
        num_images: of the training split.
        out: folder for everything that is written.
        python: interpreter of lightly's environment.
        threads: of every contestant.
        seed: of every contestant.
    """

    config: PretrainConfig
    shards: Path
    images: Path
    num_images: int
    out: Path
    python: Path
    threads: int
    seed: int

    def train(self, name: str, folder: Path, *, steps: int, workers: int) -> Trained:
        """Returns one contestant's training of so many steps, made anew.

        Raises:
            Fault: it failed; its log is named.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if name in OURS:
            peak = self._run(self._our_command(name, folder, steps, workers), folder)
            lines = [line for line in read_record(folder / "run") if "throughput/step_s" in line]
            done = [line["step"] for line in lines]
            took = [line["throughput/step_s"] for line in lines]
            counts = [step - before for step, before in zip(done, [0, *done], strict=False)]
            seconds = sum(count * step_s for count, step_s in zip(counts, took, strict=True))
            speed = [line["throughput/images_per_s"] for line in lines]
            # The first step, a line of its own, warms up.
            return Trained(speed[1:] or speed, seconds, peak, str(folder / "run"))
        settings = folder / "settings.json"
        settings.write_text(json.dumps(self._settings(name, steps, workers), indent=1))
        program = str(ROOT / "benchmarks" / "_lightly_method.py")
        peak = self._run([str(self.python), program, str(settings), str(folder)], folder)
        found = json.loads((folder / "speed.json").read_text())
        self._export(folder)
        return Trained(found["images_per_s"], found["seconds"], peak, str(folder / "encoder"))

    def _our_command(self, name: str, folder: Path, steps: int, workers: int) -> list[str]:
        options = [
            "run.name=run",
            f"run.output_dir={folder}",
            f"run.seed={self.seed}",
            f"data.shards={self.shards}",
            f"data.num_workers={workers}",
            f"optim.steps={steps}",
            f"optim.lr={self.config.optim.lr}",
            f"batch.global_batch_size={self.config.batch.global_batch_size}",
            f"logging.every_steps={_STRETCH_STEPS}",
            "logging.unique_early_steps=[]",
            "checkpoint.every_steps=1000000000",
        ]
        return [sys.executable, "pretrain.py", OURS[name], *options]

    def _settings(self, name: str, steps: int, workers: int) -> dict[str, Any]:
        config, optim, head = self.config, self.config.optim, self.config.model.head
        scale = config.batch.global_batch_size / 256  # our rates are per 256 images
        return {
            "method": name,
            "images": str(self.images),
            "steps": steps,
            "workers": workers,
            "threads": self.threads,
            "seed": self.seed,
            "encoder": config.model.name,
            "encoder_arguments": backbone_arguments(config.model),
            "image_size": config.data.global_crop_size,
            "mean": config.data.mean,
            "std": config.data.std,
            "recipe": dataclasses.asdict(config.data.resolved_augmentation),
            "batch_size": config.batch.global_batch_size,
            "hidden_dim": head.hidden_dim,
            "dim": head.projection_dim,
            "num_prototypes": config.prototypes.num_prototypes,
            "lr": optim.lr * scale,
            "min_lr": optim.min_lr * scale,
            "warmup_steps": min(warmup_steps(config, self.num_images), steps // 2),
            "weight_decay": optim.weight_decay,
            "betas": optim.betas,
            "clip_grad_norm": optim.clip_grad_norm,
            "ema_momentum": (optim.ema_momentum, optim.ema_momentum_end),
        }

    def _run(self, command: Sequence[str], folder: Path) -> float:
        """Runs a program to its end in so many threads; returns the most memory that it took, in GiB."""
        log = folder / "log.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
            # `timeout` and schedulers stop a program by SIGTERM, which would leave this one's children behind.
            previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
            with MemoryGauge(process.pid) as gauge:
                try:
                    code = process.wait()
                except BaseException:
                    os.killpg(process.pid, signal.SIGKILL)
                    raise
                finally:
                    signal.signal(signal.SIGTERM, previous)
        if code:
            last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "")
            raise Fault(f"{Path(command[1]).name} ended with code {code} ({last[:200]}); read {log}")
        return gauge.peak_gib

    def _export(self, folder: Path) -> None:
        """Writes a peer's encoder as one of ours is written: the same network, strictly, and the same preprocessing."""
        from safetensors.torch import load_file

        from models.vit import build_backbone
        from training.checkpoints.exported_encoder import export_encoder

        backbone = build_backbone(self.config.model)
        backbone.load_state_dict(load_file(folder / "encoder.safetensors"))
        data = self.config.data
        export_encoder(
            backbone,
            folder / "encoder",
            model=self.config.model,
            mean=data.mean,
            std=data.std,
            prototypes={},
            provenance={"made by": f"lightly, benchmarks.peers, {folder.name}"},
        )

    def evaluate(self, encoder: str, folder: Path, *, controls: bool) -> dict[str, float]:
        """Returns top-1 of the frozen encoder by probe, of its controls too where they are asked for.

        Raises:
            Fault: the evaluation failed; its log is named.
        """
        shutil.rmtree(folder, ignore_errors=True)
        results = folder / "results"
        results.mkdir(parents=True)
        options = [
            f"encoder={encoder}",
            f"data.shards={self.shards}",
            "probes=[knn,linear]",
            f"controls=[{'random-init,raw-pixels' if controls else ''}]",
            f"output_dir={results}",
            f"features.cache_dir={self.out / 'features'}",
            "data.num_workers=0",
        ]
        self._run([sys.executable, "evaluate.py", "configs/eval_cifar10.yaml", *options], folder)
        found: dict[str, list[float]] = {}
        for path in sorted(results.rglob("*.json")):
            result = json.loads(path.read_text())
            role, label = result["encoder"]["role"], result["encoder"]["label"]
            of = "" if role != "control" else label.partition("-seed")[0] + " "
            found.setdefault(of + result["probe"], []).append(result["figures"]["headline"]["top1"])
        return {name: statistics.fmean(values) for name, values in found.items()}

    def num_steps(self, minutes: float, images_per_s: float) -> int:
        """Returns the steps that fit into so many minutes."""
        return max(1, round(60 * minutes * images_per_s / self.config.batch.global_batch_size))

    def epochs(self, steps: int) -> float:
        """Returns how often so many steps show every image."""
        return steps / steps_per_epoch(self.config, self.num_images)


class MemoryGauge:
    """The most memory that a process and its children hold together, looked at every two seconds; Linux."""

    def __init__(self, pid: int) -> None:
        self.peak_gib = 0.0
        self._pid, self._ended = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryGauge:
        """Starts to look."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            found = sum(_proportional_kib(pid) for pid in _family(self._pid))
            self.peak_gib = max(self.peak_gib, found / 2**20)
            if self._ended.wait(_SAMPLED_EVERY_S):
                return


def _family(pid: int) -> Iterable[int]:
    """Yields a process and all that it has started."""
    yield pid
    try:
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in path.read_text().split():
                yield from _family(int(child))
    except OSError:  # it has ended meanwhile
        return


def _proportional_kib(pid: int) -> float:
    """Returns a process's memory, of pages that it shares with n processes an n-th; 0 where it has ended."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return float(line.split()[1])
    except OSError:
        pass
    return 0.0


def install(environment: Path) -> Path:
    """Returns the interpreter of lightly's environment after making what is missing.

    Raises:
        UserError: pip does not get the packages, or the folder is something else.
    """
    python, stamp, wanted = environment / "bin" / "python", environment / _STAMP, REQUIREMENTS.read_text()
    if python.is_file() and stamp.is_file() and stamp.read_text() == wanted:
        return python
    if environment.exists() and any(environment.iterdir()) and not (environment / "pyvenv.cfg").is_file():
        raise UserError(
            f"--environment is {environment}, which holds something else; expected a new folder; set --environment"
        )
    print(f"installing {REQUIREMENTS.name} into {environment}, once", flush=True)
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-r",
        str(REQUIREMENTS),
    ]
    for command in ([sys.executable, "-m", "venv", str(environment)], pip):
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            last = next((line for line in reversed(made.stderr.splitlines()) if line.strip()), "no word")
            raise UserError(
                f"--environment is {environment}, where {REQUIREMENTS.name} cannot be installed ({last[:200]}); "
                "expected a reachable package index; set --environment to one that is installed, or --only full joint"
            )
    write_atomically(stamp, wanted)
    return python


def unpack(shards: Path, folder: Path) -> int:
    """Writes the images of a training split as files, a folder a class, once; returns how many there are.

    They are the same bytes that our own loader decodes.

    Raises:
        ValueError: there is no such split, or images without class.
    """
    from data.datasets import load_manifest
    from data.shards import load_index
    from data.stream.reader import Failure, ShardReader
    from data.views.decoding import find_image

    manifest = load_manifest(str(shards), "train")
    done = folder / "unpacked.txt"
    if done.is_file() and done.read_text() == manifest.hash:
        return manifest.num_samples
    shutil.rmtree(folder, ignore_errors=True)
    reader, index = ShardReader(manifest), load_index(manifest)
    first = manifest.first_ids
    for number, shard in enumerate(manifest.shards):
        chosen = np.arange(shard.samples) if shard.ordinals is None else np.asarray(shard.ordinals, np.int64)
        for ordinal, sample in reader.read(number, chosen):
            if isinstance(sample, Failure):
                raise UserError(
                    f"--data is {shards}, of which a sample cannot be read ({sample.reason}); mend it"
                )
            label = -1 if index is None else int(index["label"][first[number] + ordinal])
            name = manifest.classes[label] if label >= 0 else "unknown"
            path = (
                folder
                / "images"
                / f"{label:04d}-{name.replace('/', '-')}"
                / f"{sample.key.replace('/', '-')}.jpg"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(find_image(sample, manifest.image_key))
    write_atomically(done, manifest.hash)
    return manifest.num_samples


def describe_versions(python: Path) -> Mapping[str, str]:
    """Returns the versions of what counts in lightly's environment."""
    code = "import json; from importlib.metadata import version; "
    code += "print(json.dumps({n: version(n) for n in ('lightly', 'torch', 'torchvision', 'timm')}))"
    said = subprocess.run([str(python), "-c", code], capture_output=True, check=True).stdout
    found: dict[str, str] = json.loads(said)
    return found
