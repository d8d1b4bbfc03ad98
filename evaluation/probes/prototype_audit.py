"""The audit of a checkpoint's prototypes: how many are distinct, where they point, which of them images use."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from evaluation.encoders.projections import PROTOTYPES_FILE
from evaluation.tensor_files import read_exported
from prototypes.diagnostics import UsageCounter, count_unique, effective_rank, find_directions, mean_cosine
from runtime.record import read_record

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

# Tensor names in an exported folder, and the role whose prototypes they are.
_ROLES = {"means": "teacher", "student_means": "student"}
_LEAST_DIM = 2  # directions lie on a plane at least
_ANGLE_BINS = 36
_COSINE_BINS = 50
# Rows of one block of image-prototype similarities: 1,024 x 262,144 in fp32 is 1 GiB.
_IMAGE_BLOCK = 1024
_LISTED_COUNTS = 1024
USAGE_FIGURES = (
    "used",
    "used_by_mass",
    "used_by_logits",
    "dead",
    "usage_perplexity",
    "used_ceiling",
    "usage_rows",
)


class AuditError(ValueError):
    """Prototypes that cannot be audited; the message is one line."""


def load_exported_prototypes(folder: Path, name: str = PROTOTYPES_FILE) -> dict[str, Float[Tensor, "K P"]]:
    """Returns role to prototypes of a file of an exported folder of ours, as they were saved (unit or not), fp32.

    Raises:
        AuditError: the folder has no prototypes.
        DamagedFileError: they cannot be read.
    """
    path = folder / name
    if not path.is_file():
        raise AuditError(
            f"{folder} has no {name}; expected an exported encoder of this project or a weights file; "
            "remove prototypes from probes or set encoder"
        )
    tensors = read_exported(path)
    found = {role: tensors[name].float() for name, role in _ROLES.items() if name in tensors}
    if "teacher" not in found:
        raise AuditError(
            f"{path} has no tensor 'means'; found {', '.join(sorted(tensors))}; export the encoder again"
        )
    return found


def audit(
    prototypes: Float[Tensor, "K P"], *, thresholds: tuple[float, ...], angle_pairs: int, seed: int
) -> dict[str, Any]:
    """Returns the figures of one prototype matrix. Not collective; on the tensor's device.

    Args:
        prototypes: effective weights, unit or not.
        thresholds: eps of Definition 2.1 (Govindarajan et al. 2024): two prototypes are one when 1 - cosine < eps,
            counted by a greedy leader cover in index order.
        angle_pairs: random pairs behind the histogram of cosines.
        seed: of the random plane and pairs.

    Returns:
        `num_prototypes`, `dim`, `zero_rows` (which point nowhere and count as none), `unique` and `unique_fraction` by
        eps (as text), `angle_density` on a random plane with its maximum / minimum ratio (1 is isotropic; an empty bin
        counts as one prototype, so K is the most), `cosine_histogram`, `mean_cosine`, `effective_rank`.

    Raises:
        AuditError: a row is not finite, or none points anywhere.
    """
    num_prototypes, dim = prototypes.shape
    if dim < _LEAST_DIM:
        raise AuditError(
            f"prototypes are {list(prototypes.shape)}; expected at least {_LEAST_DIM} columns; inspect the checkpoint"
        )
    has_direction = find_directions(prototypes)
    bad = ~prototypes.isfinite().all(dim=1)
    if bool(bad.any()) or not bool(has_direction.any()):
        what = (
            f"prototype {int(bad.nonzero()[0])} is not finite"
            if bool(bad.any())
            else "all prototypes are zero"
        )
        raise AuditError(f"{what}; expected directions; inspect the checkpoint")
    unique = count_unique(prototypes, thresholds)
    unit = normalize(prototypes[has_direction].float(), dim=1)
    density = _angle_density(unit, seed)
    return {
        "num_prototypes": num_prototypes,
        "dim": dim,
        "zero_rows": num_prototypes - len(unit),
        "unique": {f"{eps:g}": unique[eps] for eps in thresholds},
        "unique_fraction": {f"{eps:g}": unique[eps] / num_prototypes for eps in thresholds},
        "angle_density": density,
        "angle_density_max_over_min": max(density) / max(min(density), _one_prototype(num_prototypes)),
        "cosine_histogram": _cosine_histogram(unit, angle_pairs, seed),
        "mean_cosine": mean_cosine(unit),
        "effective_rank": effective_rank(unit),
    }


def count_usage(
    projections: Float[Tensor, "B P"], prototypes: Float[Tensor, "K P"], *, unit: bool = True
) -> dict[str, Any]:
    """Returns which prototypes the projections use by the logits: argmax over all K of the dot product.

    `used_by_logits` is a share of K and `used_ceiling` = min(K, images) / K the largest there can be;
    `usage_perplexity` is exp(entropy of the histogram) / K. A mixture's E-step may use far fewer: see its record.

    Args:
        projections: of images.
        prototypes: effective weights.
        unit: L2-normalise the prototypes first, as the method's logits do.
    """
    counter = UsageCounter(len(prototypes), prototypes.device)
    weights = normalize(prototypes.float(), dim=1) if unit else prototypes.float()
    for block in projections.split(_IMAGE_BLOCK):
        counter.update(block, weights)
    counted = counter.metrics(find_directions(prototypes))
    figures = {
        key: counted[f"prototypes/{key}"] for key in ("used_by_logits", "used_ceiling", "usage_perplexity")
    }
    largest = counter.by_logits.long().sort(descending=True).values[:_LISTED_COUNTS]
    return {"images": len(projections), **figures, "largest_counts": largest.tolist()}


@torch.no_grad()
def assign(projections: Float[Tensor, "B P"], prototypes: Float[Tensor, "K P"]) -> Int64[Tensor, " B"]:
    """Returns the prototype of largest logit (dot product with unit prototypes) for every projection."""
    unit = normalize(prototypes.float(), dim=1)
    blocks = [(block.float() @ unit.T).argmax(dim=1) for block in projections.split(_IMAGE_BLOCK)]
    return torch.cat(blocks)


def read_training_usage(run_dir: Path, step: int | None, section: str = "prototypes") -> dict[str, Any]:
    """Returns the usage figures that training wrote last, at or before `step`; empty where there are none.

    They are over the views (or patches) of one training epoch, counted before any revival of the step.
    """
    found: dict[str, Any] = {}
    for line in read_record(run_dir):
        if step is not None and line["step"] > step:
            continue
        for key in USAGE_FIGURES:
            if f"{section}/{key}" in line:
                found[key] = line[f"{section}/{key}"]
                found["step"] = line["step"]
    return found


def _angle_density(unit: Tensor, seed: int) -> list[float]:
    """Density over [-pi, pi] of the directions seen on a random plane; 1 / (2 pi) = 0.159 is isotropic."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(unit.shape[1], 2, generator=generator, dtype=torch.float64)
    plane = torch.linalg.qr(gaussian).Q.to(unit.device, unit.dtype)
    on_plane = unit @ plane
    angles = torch.atan2(on_plane[:, 1], on_plane[:, 0]).cpu()
    counts = torch.histc(angles, bins=_ANGLE_BINS, min=-math.pi, max=math.pi)
    return (counts / counts.sum() * _ANGLE_BINS / (2 * math.pi)).tolist()


def _one_prototype(num_prototypes: int) -> float:
    """The density of a bin that holds one prototype."""
    return _ANGLE_BINS / (2 * math.pi * num_prototypes)


def _cosine_histogram(unit: Tensor, pairs: int, seed: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(seed)
    num = len(unit)
    left = torch.randint(num, (pairs,), generator=generator)
    right = (left + torch.randint(1, max(num, 2), (pairs,), generator=generator)) % num
    cosines = (unit[left.to(unit.device)] * unit[right.to(unit.device)]).sum(dim=1).cpu()
    counts = torch.histc(cosines, bins=_COSINE_BINS, min=-1.0, max=1.0)
    edges = torch.linspace(-1.0, 1.0, _COSINE_BINS + 1)
    return {"edges": edges.tolist(), "share": (counts / counts.sum()).tolist()}
