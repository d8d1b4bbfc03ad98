"""Features of every labelled image, extracted once, kept on disk, the same for every probe.

The cache's key is made of weights, preprocessing, manifest, split and precision: whatever changes the features
changes the key. Each process extracts its part of the stream; parts are merged by sample, so that nothing is
counted twice however the stream was cut or padded.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data.datasets import EvaluationStream, Manifest
from data.views.config import PixelFormat
from data.views.pictures import RGB, fill_picture
from evaluation.config import EvaluationDataConfig, FeaturesConfig
from evaluation.encoders.encoder import Encoder
from evaluation.encoders.preprocessing import PictureTransform
from evaluation.features.bank import FeatureBank, FeatureError, NonFiniteFeatureError
from evaluation.features.cache import cache_file, read_cached
from evaluation.features.patches import POOLED, PatchTokens, Reading
from evaluation.features.processes import Processes, require_writable
from evaluation.tensor_files import load_tensors, save_tensors

if TYPE_CHECKING:
    from jaxtyping import Float

logger = logging.getLogger(__name__)

_KEYS = ("labels", "sample_ids")


def load_features(
    encoders: Sequence[Encoder],
    manifest: Manifest,
    *,
    data: EvaluationDataConfig,
    features: FeaturesConfig,
    processes: Processes,
    limit: int | None = None,
    reading: Reading = POOLED,
) -> list[FeatureBank]:
    """Returns one split's features of every encoder, from the cache or extracted now. Collective.

    Encoders with the same preprocessing are extracted in one pass: images are decoded once for all of them.

    Args:
        encoders: frozen encoders.
        manifest: of the split.
        data: batch size and workers.
        features: cache directory, precision.
        processes: who extracts together; they share the cache's file system.
        limit: keep only the first images of the split.
        reading: pooled features, or patch tokens with classes or label maps.

    Raises:
        FeatureError: labels are missing, the stream lost samples, a feature is not finite, or there are no patches.
    """
    _require_classes(manifest, reading)
    about = [reading.describe(encoder) for encoder in encoders]
    files = [
        cache_file(encoder, manifest, features, limit, said)
        for encoder, said in zip(encoders, about, strict=True)
    ]
    cached = [read_cached(file) if features.reuse else None for file in files]
    # A file counts where every process could read it whole: all agree on what is missing before anybody writes.
    views = processes.gather([tensors is not None for tensors in cached])
    whole = [all(found) for found in zip(*views, strict=True)]
    groups: dict[str, list[int]] = {}
    for index, (encoder, file) in enumerate(zip(encoders, files, strict=True)):
        if whole[index]:
            logger.info("features of %s, %s: read from %s", encoder.label, manifest.split, file)
        else:
            groups.setdefault(json.dumps(about[index], sort_keys=True), []).append(index)
    seconds = [0.0] * len(encoders)
    if groups:
        require_writable(Path(features.cache_dir), "features.cache_dir", processes)
    for members in groups.values():
        started = time.perf_counter()
        chosen = [encoders[index] for index in members]
        extracted = _extract_group(chosen, manifest, data, features.precision, processes, limit, reading)
        for index, own in zip(members, extracted, strict=True):
            _merge_into(files[index], own, encoders[index], manifest, processes, limit)
            cached[index], _ = load_tensors(files[index])
            seconds[index] = time.perf_counter() - started
        if processes.rank == 0:
            names = ", ".join(encoder.label for encoder in chosen)
            took = time.perf_counter() - started
            logger.info("features of %s, %s: extracted in %.1f s", names, manifest.split, took)
    return [_bank(tensors or {}, manifest, took) for tensors, took in zip(cached, seconds, strict=True)]


@torch.inference_mode()
def extract_batches(
    module: nn.Module,
    stream: EvaluationStream,
    blank: Float[Tensor, "C H W"],
    *,
    device: torch.device,
    precision: str,
    before: int | None = None,
    stored: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Returns features, labels and sample ids of this process's batches, on the CPU.

    Every process runs the network equally often, `stream.most_batches` times: a forward pass through sharded
    parameters (FSDP2, ZeRO-3) is collective, and one rank's part may have fewer batches than another's, or batches of
    which nothing is kept. It then passes a blank image, whose features are dropped.

    Args:
        module: images to named features.
        stream: this process's part.
        blank: any preprocessed image.
        device: where `module` lives.
        precision: `fp32` or `bf16` (autocast).
        before: keep only samples whose id is below this; None keeps all.
        stored: type of the features that are returned.
    """
    collected: dict[str, list[Tensor]] = {}
    batches = iter(stream)
    nothing = torch.empty(0, dtype=torch.int64)
    for _ in range(stream.most_batches):
        images, labels, sample_ids = next(batches, (blank[None][:0], nothing, nothing))
        if before is not None:
            keep = sample_ids < before
            images, labels, sample_ids = images[keep], labels[keep], sample_ids[keep]
        number = len(labels)
        images = images if number else blank[None]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            named = module(images.to(device, non_blocking=True))
        if not number:
            continue
        named = {name: tensor.to(stored).cpu() for name, tensor in named.items()}
        for name, tensor in {**named, "labels": labels, "sample_ids": sample_ids}.items():
            collected.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in collected.items()}


def extract_together(
    module: nn.Module,
    manifest: Manifest,
    transform: PictureTransform,
    data: EvaluationDataConfig,
    processes: Processes,
    limit: int | None,
) -> dict[str, Tensor]:
    """Returns a split's features, labels and sample ids in memory, on every process. Collective.

    For subsets: every process holds everything, nothing touches the disk.
    """
    stream = open_stream(
        manifest, transform, data=data, processes=processes, limit=limit, format=transform.format
    )
    before = first_id_after(manifest, limit)
    part = extract_batches(
        module, stream, _blank_image(transform), device=processes.device, precision="fp32", before=before
    )
    merged = merge_parts(processes.gather(part))
    _check_merged(merged, manifest, limit, "the network")
    return merged


def _blank_image(transform: PictureTransform) -> Float[Tensor, "C H W"]:
    return transform(fill_picture((64, 64), transform.format))


def merge_parts(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the parts of all processes as one, sorted by sample id, each sample once.

    A sample that two processes saw (a padded last batch) is kept from the lower rank.
    """
    filled = [part for part in parts if part]
    if not filled:
        return {}
    joined = {name: torch.cat([part[name] for part in filled]) for name in filled[0]}
    ids, order = torch.sort(joined["sample_ids"], stable=True)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    chosen = order[first]
    return {name: tensor[chosen].contiguous() for name, tensor in joined.items()}


def open_stream(
    manifest: Manifest,
    transform: Any,
    *,
    data: EvaluationDataConfig,
    processes: Processes,
    limit: int | None = None,
    dense: bool = False,
    format: PixelFormat = RGB,
) -> EvaluationStream:
    """Returns this process's stream over a split, or over a short beginning that holds its first `limit` images.

    `transform` is that of a picture of this format, or where the stream is `dense` that of a picture and its label map:
    see `EvaluationStream`.
    """
    # Parts of the stream are contiguous and equal: a `limit` of a tenth is the first of ten parts.
    thinned = 1 if limit is None else max(1, manifest.num_samples // limit)
    return EvaluationStream(
        manifest.directory,
        manifest.split,
        None if dense else transform,
        dense_transform=transform if dense else None,
        format=format,
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        rank=processes.rank,
        world_size=processes.world_size * thinned,
    )


def first_id_after(manifest: Manifest, limit: int | None) -> int | None:
    """Returns the smallest sample id behind the first `limit` images of a split; None where that is all of them."""
    if limit is None or limit >= manifest.num_samples:
        return None
    first_id, remaining = 0, limit
    for shard in manifest.shards:
        if remaining < shard.num_selected:
            return first_id + (remaining if shard.ordinals is None else shard.ordinals[remaining])
        remaining -= shard.num_selected
        first_id += shard.samples
    return first_id


class _SideBySide(nn.Module):
    """Several encoders on the same images; names of features start with the encoder's number."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        named = ((index, member(images)) for index, member in enumerate(self.members))
        return {f"{index}/{name}": tensor for index, features in named for name, tensor in features.items()}


def _extract_group(
    encoders: Sequence[Encoder],
    manifest: Manifest,
    data: EvaluationDataConfig,
    precision: str,
    processes: Processes,
    limit: int | None,
    reading: Reading,
) -> list[dict[str, Tensor]]:
    """Returns this process's part for every encoder."""
    transform = reading.transform(encoders[0])
    stream = open_stream(
        manifest,
        transform,
        data=data,
        processes=processes,
        limit=limit,
        dense=reading.label_maps,
        format=encoders[0].transform.format,
    )
    members = [PatchTokens(encoder) if reading.patches else encoder.module for encoder in encoders]
    part = extract_batches(
        _SideBySide(members).to(processes.device),
        stream,
        _blank_image(encoders[0].transform),
        device=processes.device,
        precision=precision,
        before=first_id_after(manifest, limit),
        stored=reading.stored,
    )
    if stream.skipped:
        logger.warning(
            "%s, %s: left out %d images, the first %s",
            *(encoders[0].label, manifest.split, len(stream.skipped), stream.skipped[0]),
        )
    # An empty part is still a file: the merging process must find one from everybody.
    about = {name: part.get(name, torch.empty(0, dtype=torch.int64)) for name in _KEYS}
    parts: list[dict[str, Tensor]] = []
    for index in range(len(encoders)):
        own = {name.split("/", 1)[1]: t for name, t in part.items() if name.startswith(f"{index}/")}
        parts.append({**own, **about})
    return parts


def _merge_into(
    file: Path,
    own: dict[str, Tensor],
    encoder: Encoder,
    manifest: Manifest,
    processes: Processes,
    limit: int | None,
) -> None:
    """Writes the parts of all processes as one cache file. Collective.

    Part files carry the first process's host and number: another evaluation of the same encoder has others.

    Raises:
        FeatureError: on every process, where the parts do not make the split.
    """
    token = processes.gather(f"{socket.gethostname()}-{os.getpid()}")[0]
    parts = [file.with_name(f".{file.name}.{token}.part-{rank:05d}") for rank in range(processes.world_size)]
    save_tensors(own, parts[processes.rank], {"split": manifest.split})
    processes.wait()
    failed: ValueError | OSError | None = None
    if processes.rank == 0:
        try:
            loaded = [load_tensors(part)[0] for part in parts]
            merged = merge_parts([tensors for tensors in loaded if len(tensors["labels"])])
            _check_merged(merged, manifest, limit, encoder.label)
            save_tensors(merged, file, {"encoder": encoder.describe(), "split": manifest.split})
        except (ValueError, OSError) as error:
            failed = error
        for part in parts:
            part.unlink(missing_ok=True)
    # The others learn it too: they would wait for the next collective for hours.
    failed = processes.gather(failed)[0]
    if failed is not None:
        raise failed


def _check_merged(merged: dict[str, Tensor], manifest: Manifest, limit: int | None, encoder: str) -> None:
    """Raises FeatureError unless every image is there once, with a label of a class and finite features."""
    expected = manifest.num_samples if limit is None else min(limit, manifest.num_samples)
    found = len(merged.get("labels", ()))
    if found != expected:
        raise FeatureError(
            f"{manifest.directory}:{manifest.split} gave {found} images; expected {expected}, as its manifest says; "
            "run python -m data.verify_shards on it"
        )
    # Label maps are judged where they are decoded.
    labels = merged["labels"] if merged["labels"].ndim == 1 else merged["labels"][:0, 0, 0]
    outside = (labels < 0) | (labels >= len(manifest.classes))
    if bool(outside.any()):
        index = int(outside.nonzero()[0])
        where = f"{manifest.directory}:{manifest.split}"
        raise FeatureError(
            f"label of image {int(merged['sample_ids'][index])} in {where} is {int(labels[index])}; "
            f"expected 0..{len(manifest.classes) - 1}; make the shards with a label for every image"
        )
    for name in sorted(set(merged) - set(_KEYS)):
        finite = merged[name].flatten(1).isfinite().all(dim=1)
        if not bool(finite.all()):
            first = int(merged["sample_ids"][int((~finite).nonzero()[0])])
            key = "patch_precision" if merged[name].dtype == torch.float16 else "precision"
            raise NonFiniteFeatureError(
                f"feature {name!r} of {encoder} holds NaN or infinity for {int((~finite).sum())} of {found} images, "
                f"the first {_locate(manifest, first)}; expected finite features; look at the encoder's weights, or "
                f"set features.{key}=fp32"
            )


def _require_classes(manifest: Manifest, reading: Reading) -> None:
    if not reading.label_maps and not any(manifest.images_per_class):
        raise FeatureError(
            f"{manifest.directory}:{manifest.split} names {len(manifest.classes)} classes and no image has one; "
            "expected labelled images; of shards with label maps ask probes=[segmentation]"
        )


def _locate(manifest: Manifest, sample_id: int) -> str:
    """Returns where a sample lies, as a person finds it: shard and position in it."""
    index = bisect_right(manifest.first_ids, sample_id) - 1
    return f"{manifest.path_of(manifest.shards[index])}, sample {sample_id - manifest.first_ids[index]}"


def _bank(tensors: dict[str, Tensor], manifest: Manifest, seconds: float) -> FeatureBank:
    labels, sample_ids = (tensors.pop(name) for name in _KEYS)
    return FeatureBank(
        tensors=tensors, labels=labels, sample_ids=sample_ids, manifest=manifest, seconds=seconds
    )
