"""Features of images out of any encoder, into one file.

    python -m evaluation.embed ENCODER IMAGES --out FILE.npz [--patches] [--batch N]
    torchrun --nproc_per_node 4 -m evaluation.embed ...        (or accelerate launch -m; one process needs no launcher)

ENCODER is what `evaluate.py` takes: a run directory, a checkpoint, an exported folder, `timm:NAME`, `hf:NAME`,
`local-dir:PATH`, `random-init:RUN[:SEED]` or `raw-pixels`. IMAGES is a folder, with whatever folders are in it, or
shards with a `manifest.json`. FILE.npz then holds `paths` [N], `features` [N, D] in fp32, with --patches `patches`
[N, h, w, D], and the images that could not be decoded as `bad_paths` and `bad_reasons`. What is finished is on the
disk: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
import time
from collections import defaultdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.views.config import FULL_SCALE
from runtime.program import UserError, run_program
from runtime.progress import describe_progress
from runtime.requirements import ENCODER_PACKAGES, require_packages
from runtime.usage import HelpFormatter

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.encoders.load import Encoder
    from evaluation.features.image_lists import ImageBatch, ImageList
    from evaluation.features.npz_parts import PartFiles
    from evaluation.features.processes import Processes

logger = logging.getLogger("evaluation.embed")  # also where this file is the program

_PART_IMAGES = 256  # of a part on the disk: what a killed job does again, and what memory holds
_OVERRIDES = ("image_size", "channels", "pixels", "mean", "std")
# Options of the rooms that do the work, by what this command line calls them.
_OWN_WORDS = {f"transform.{name}": "--" + name.replace("_", "-") for name in _OVERRIDES} | {
    "data.split": "--split",
    "data.shards": "IMAGES",
}
_OTHERS_WORDS = re.compile(rf"\b({'|'.join(map(re.escape, _OWN_WORDS))})\b")
_SAY_EVERY_S = 30.0
_NUM_NAMED = 5


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.embed", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("encoder", metavar="ENCODER", help="as evaluate.py takes it")
    parser.add_argument("images", metavar="IMAGES", help="a folder of images, or shards")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="the file to write")
    parser.add_argument(
        "--patches", action="store_true", help="also the last block's patch tokens, as a grid"
    )
    parser.add_argument("--batch", type=int, default=64, help="images of one forward pass, 1 to 256")
    parser.add_argument("--feature", default="embedding", help="embedding, cls, mean or both")
    parser.add_argument("--split", default="train", help="of shards")
    parser.add_argument("--role", choices=("teacher", "student"), default="teacher", help="of a checkpoint")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="N",
        help="side in pixels, or height and width, in place of the encoder's",
    )
    parser.add_argument(
        "--channels", type=int, metavar="N", help="of the images, where the encoder says nothing: raw-pixels"
    )
    parser.add_argument(
        "--pixels",
        choices=tuple(FULL_SCALE),
        help="type of the images' numbers, where the encoder says nothing",
    )
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="X",
            help="of each channel in 0..1, in place of the encoder's",
        )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the forward pass")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes on each process")
    options = parser.parse_args(arguments)
    for name, lowest, highest in (("batch", 1, _PART_IMAGES), ("workers", 0, 1024)):
        value = getattr(options, name)
        if not lowest <= value <= highest:
            raise UserError(f"--{name} is {value}; expected {lowest} to {highest}; set --{name}")
    if options.out.suffix != ".npz":
        raise UserError(f"--out is {str(options.out)!r}; expected a name that ends in .npz; set --out")
    return options


def main(arguments: list[str]) -> int:
    """Runs the command line and returns its exit code."""
    options = parse(arguments)
    require_packages(*ENCODER_PACKAGES, "accelerate")
    # Imported once the command line is known to be right: torch takes seconds.
    from evaluation.features.processes import start_processes
    from runtime.logging_setup import set_up_logging

    processes = start_processes(options.device)
    set_up_logging(processes.rank)
    embed(options, processes)
    return 0


def embed(options: argparse.Namespace, processes: Processes) -> None:
    """Embeds every image and writes the file. Collective.

    Raises:
        UserError: whatever the user can mend, in one line and in the words of this command line.
    """
    try:
        _embed(options, processes)
    except ValueError as error:
        raise UserError(_OTHERS_WORDS.sub(lambda found: _OWN_WORDS[found[0]], str(error))) from error


def _embed(options: argparse.Namespace, processes: Processes) -> None:
    from evaluation.features.image_lists import open_images
    from evaluation.features.npz_parts import PartFiles

    images = open_images(options.images, options.split)
    encoder = _load(options)
    if encoder.weights_file is not None:
        raise UserError(
            f"ENCODER is {encoder.spec!r}, a weights file; expected a network, which has features"
        )
    about = _describe(options, encoder, images)
    files = PartFiles(options.out, math.ceil(len(images) / _PART_IMAGES), about)
    missing = processes.do_on_first(lambda: None if files.is_done() else _open(files, images))
    if missing is None:
        if processes.rank == 0:
            logger.info("%s holds these features already", options.out)
        return
    own = [missing[index] for index in processes.mine(len(missing))]
    if processes.rank == 0 and len(missing) < files.num_parts:
        logger.info("%d of %d parts are there already", files.num_parts - len(missing), files.num_parts)
    _extract_parts(options, encoder, images, files, own, processes)
    processes.wait()
    processes.do_on_first(lambda: _finish(files, len(images)))


def _load(options: argparse.Namespace) -> Encoder:
    from evaluation.config import EvaluationConfig
    from evaluation.encoders.load import load_encoder
    from runtime.config import build_config

    given = {name: getattr(options, name) for name in _OVERRIDES}
    if options.image_size is not None and len(options.image_size) == 1:
        (given["image_size"],) = options.image_size
    config = build_config(EvaluationConfig, {"encoder": options.encoder, "transform": given})
    return load_encoder(options.encoder, role=options.role, transform=config.transform)


def _open(files: PartFiles, images: ImageList) -> list[int]:
    for line in images.passed_over:
        logger.info("%s", line)
    files.open()
    return files.missing()


def _describe(options: argparse.Namespace, encoder: Encoder, images: ImageList) -> dict[str, Any]:
    from evaluation.features.cache import describe_network

    return {
        "encoder": encoder.describe(),
        "network": describe_network(encoder.module),
        "images": {"place": options.images, "number": len(images), "fingerprint": images.fingerprint},
        "feature": options.feature,
        "patches": options.patches,
        "precision": options.precision,
    }


def _extract_parts(
    options: argparse.Namespace,
    encoder: Encoder,
    images: ImageList,
    files: PartFiles,
    parts: list[int],
    processes: Processes,
) -> None:
    """Writes this process's parts; every process ends its own alone."""
    import torch

    from evaluation.features.image_lists import iterate_batches
    from evaluation.features.npz_parts import Part

    encoder.module.to(processes.device)
    batches = iterate_batches(
        images,
        encoder.transform,
        parts,
        part_images=_PART_IMAGES,
        batch_size=options.batch,
        num_workers=min(options.workers, len(parts)),
    )
    teller = _Teller(sum(_size_of(part, len(images)) for part in parts), processes)
    with torch.inference_mode():
        for number, of_part in groupby(batches, key=lambda batch: batch.part):
            part, rows = Part(), defaultdict(list)
            for batch in of_part:
                part.names += batch.names
                part.bad += batch.bad
                for name, tensor in _forward(options, encoder, batch, processes).items():
                    rows[name].append(tensor)
                teller.add(len(batch.names) + len(batch.bad))
            part.arrays = {name: torch.cat(tensors) for name, tensors in rows.items()}
            files.save(number, part)


def _size_of(part: int, num_images: int) -> int:
    return min(_PART_IMAGES, num_images - part * _PART_IMAGES)


def _forward(
    options: argparse.Namespace, encoder: Encoder, batch: ImageBatch, processes: Processes
) -> dict[str, Tensor]:
    """Returns the rows of one batch, fp32 on the CPU.

    Raises:
        ValueError: the encoder has no such feature or no patches, or a feature is not finite.
    """
    import torch

    from evaluation.features.bank import NonFiniteFeatureError, available_features, select_feature

    if not batch.names:
        return {}
    images = batch.images.to(processes.device, non_blocking=True)
    with torch.autocast(processes.device.type, dtype=torch.bfloat16, enabled=options.precision == "bf16"):
        module = encoder.module
        features, patches = module.with_patches(images) if options.patches else (module(images), None)
        if options.feature not in (known := available_features(features)):
            rule = f"expected one of {', '.join(known)} for this encoder"
            raise UserError(f"--feature is {options.feature!r}; {rule}; set --feature")
        rows = {"features": select_feature(features, options.feature)}
        if options.patches:
            if patches is None:
                raise UserError(
                    f"--patches is given, and {encoder.spec} has no patch tokens; leave --patches out"
                )
            rows["patches"] = to_grid(patches, *images.shape[-2:])
    rows = {name: tensor.float().cpu() for name, tensor in rows.items()}
    for name, tensor in rows.items():
        finite = tensor.flatten(1).isfinite().all(dim=1)
        if not bool(finite.all()):
            raise NonFiniteFeatureError(
                f"{name} of {batch.names[int((~finite).nonzero()[0])]} hold NaN or infinity; expected finite "
                "features; look at the encoder's weights, or set --precision fp32"
            )
    return rows


def to_grid(patches: Tensor, height: int, width: int) -> Tensor:
    """Returns patch tokens [B, N, D] as a grid [B, h, w, D] of the image's proportions.

    Raises:
        UserError: N tokens make no such grid.
    """
    number = patches.shape[1]
    rows = round(math.sqrt(number * height / width))
    if rows < 1 or number % rows or rows * width != number // rows * height:
        raise UserError(
            f"--patches is given, and {number} tokens make no grid on {height} x {width} pixels; leave --patches out"
        )
    return patches.unflatten(1, (rows, number // rows))


def _finish(files: PartFiles, num_images: int) -> None:
    shapes, bad = files.assemble()
    described = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes.items())
    gib = files.out.stat().st_size / 2**30
    logger.info("%s: %s, %.3f GiB", files.out, described, gib)
    if bad:
        named = "; ".join(f"{name}: {reason}" for name, reason in bad[:_NUM_NAMED])
        more = "; all in bad_paths of the file" if len(bad) > _NUM_NAMED else ""
        logger.warning("left out %d of %d images (%s%s)", len(bad), num_images, named, more)


class _Teller:
    """Says from time to time how far the first process is, which has as much to do as any other."""

    def __init__(self, total: int, processes: Processes) -> None:
        self._total, self._processes = total, processes
        self._done, self._said = 0, time.monotonic()
        self._started = self._said

    def add(self, images: int) -> None:
        self._done += images
        now = time.monotonic()
        if self._processes.rank or (now - self._said < _SAY_EVERY_S and self._done < self._total):
            return
        self._said = now
        each = (now - self._started) / self._done
        progress = describe_progress(self._done, self._total, each)
        logger.info("embedded %s  %.0f images/s", progress, self._processes.world_size / each)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
