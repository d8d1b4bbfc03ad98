"""The prototype audit of any checkpoint: of ours, and of other projects' weights files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from data.datasets import Manifest
from evaluation.encoders.backbones import TimmFeatures
from evaluation.encoders.projections import (
    PATCH_PROTOTYPES_FILE,
    PROTOTYPES_FILE,
    Space,
    find_spaces,
    project,
)
from evaluation.encoders.public_heads import PrototypeMatrix, project_by_state, read_prototypes
from evaluation.features.extract import first_id_after, open_stream
from evaluation.features.processes import Processes
from evaluation.features.session import Outcome, Session
from evaluation.probes.prototype_audit import (
    audit,
    count_usage,
    load_exported_prototypes,
    read_training_usage,
)

# Test images whose patches are counted: of 64 patches each they use up to 64,000 prototypes.
_PATCH_IMAGES = 1000


def probe_prototypes(session: Session) -> Outcome:
    """Returns the audit of every prototype matrix, and which of them the test images use where that can be told.

    Patches' own prototypes bear `patch` before the role; use by patches is `patch_usage`, whosever the prototypes.

    A weights file (`encoder=PATH` or `prototypes.weights=PATH`) takes precedence over what an exported folder holds.

    Raises:
        ValueError: the encoder has no prototypes.
    """
    config, encoder = session.config.prototypes, session.encoder
    weights = config.weights or encoder.weights_file
    if weights is not None:
        return _audit_weights_file(session, weights)
    if encoder.folder is None:
        raise ValueError(
            f"probes hold 'prototypes', and {encoder.spec} has none; expected a run, a checkpoint or an exported "
            "folder of this project, or a weights file; set prototypes.weights or probes"
        )
    exported = load_exported_prototypes(encoder.folder)
    if (encoder.folder / PATCH_PROTOTYPES_FILE).is_file():
        of_patches = load_exported_prototypes(encoder.folder, PATCH_PROTOTYPES_FILE)
        exported |= {f"patch {role}": matrix for role, matrix in of_patches.items()}
    figures: dict[str, Any] = {"roles": {role: _audit(session, matrix) for role, matrix in exported.items()}}
    if encoder.run_dir is not None:
        figures["training_usage"] = read_training_usage(encoder.run_dir, encoder.step)
        if "patch teacher" in exported:
            figures["patch_training_usage"] = read_training_usage(
                encoder.run_dir, encoder.step, "patch_prototypes"
            )
    if config.use_images and session.has_features:
        spaces = find_spaces(encoder.folder, encoder.run_dir)
        if "instance" in spaces:
            projections = project(encoder.folder, session.banks[1].select("embedding"), spaces["instance"])
            if projections is not None:
                figures["image_usage"] = {"teacher": count_usage(projections, exported["teacher"])}
        if "patch" in spaces:
            figures |= _count_patch_usage(session, spaces["patch"], exported)
    return Outcome(figures)


@torch.inference_mode()
def project_patches(
    session: Session, manifest: Manifest, space: Space, limit: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the first images of a split as the encoder sees them and their patches' projections [B, N, P].

    Nothing where the encoder gives no patches or its folder has no head. Not collective.
    """
    encoder, device = session.encoder, session.processes.device
    module = encoder.module
    if encoder.folder is None or not isinstance(module, TimmFeatures):
        return
    module.to(device)
    before = first_id_after(manifest, limit)
    stream = open_stream(
        manifest,
        encoder.transform,
        data=session.config.data,
        processes=Processes(),
        limit=limit,
        format=encoder.transform.format,
    )
    for images, _, sample_ids in stream:
        images = images if before is None else images[sample_ids < before]
        tokens = module.patch_tokens(images.to(device)) if len(images) else None
        if tokens is None:
            continue
        rows = project(encoder.folder, tokens.flatten(0, 1).float().cpu(), space)
        if rows is not None:
            yield images, rows.unflatten(0, tokens.shape[:2])


def _count_patch_usage(session: Session, space: Space, exported: dict[str, Tensor]) -> dict[str, Any]:
    """Returns `patch_usage` of the role whose prototypes patches are compared with."""
    manifest = session.splits[1]
    limit = min(_PATCH_IMAGES, session.config.data.max_test_images or _PATCH_IMAGES)
    rows = [projections for _, projections in project_patches(session, manifest, space, limit)]
    if not rows:
        return {}
    role = "teacher" if space.prototypes == PROTOTYPES_FILE else "patch teacher"
    projections = torch.cat(rows)
    counted = count_usage(projections.flatten(0, 1), exported[role])
    return {"patch_usage": {role: counted | {"images": len(projections), "patches": counted["images"]}}}


def _audit_weights_file(session: Session, weights: str) -> Outcome:
    matrices = read_prototypes(weights)
    figures: dict[str, Any] = {
        "weights": weights,
        "families": {matrix.name: matrix.family for matrix in matrices},
        "roles": {matrix.name: _audit(session, matrix.tensor) for matrix in matrices},
    }
    if session.config.prototypes.use_images and session.has_features:
        usage = {matrix.name: _count_image_usage(session, matrix) for matrix in matrices if matrix.mlp}
        figures["image_usage"] = usage
    return Outcome(figures)


def _audit(session: Session, matrix: torch.Tensor) -> dict[str, Any]:
    config = session.config.prototypes
    return audit(
        matrix.to(session.processes.device),
        thresholds=config.thresholds,
        angle_pairs=config.angle_pairs,
        seed=session.config.seed,
    )


def _count_image_usage(session: Session, matrix: PrototypeMatrix) -> dict[str, Any]:
    test = session.banks[1]
    # Heads of the DINO family stand behind the normalised CLS token, those of convnets behind the pooled grid.
    feature = "cls" if "cls" in test.available() else "embedding"
    projections = project_by_state(matrix, test.select(feature))
    return {"feature": feature, **count_usage(projections, matrix.tensor, unit=matrix.unit)}
