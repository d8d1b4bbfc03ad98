"""The prototype audit of any checkpoint: of ours, and of other projects' weights files."""

from __future__ import annotations

from typing import Any

import torch

from evaluation.encoders.projections import project
from evaluation.encoders.public_heads import PrototypeMatrix, project_by_state, read_prototypes
from evaluation.features.session import Outcome, Session
from evaluation.probes.prototype_audit import (
    audit,
    count_usage,
    load_exported_prototypes,
    read_training_usage,
)


def probe_prototypes(session: Session) -> Outcome:
    """Returns the audit of every prototype matrix, and which of them the test images use where that can be told.

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
    figures: dict[str, Any] = {"roles": {role: _audit(session, matrix) for role, matrix in exported.items()}}
    if encoder.run_dir is not None:
        figures["training_usage"] = read_training_usage(encoder.run_dir, encoder.step)
    if config.use_images and session.has_features:
        projections = project(encoder.folder, session.banks[1].select("embedding"))
        if projections is not None:
            figures["image_usage"] = {"teacher": count_usage(projections, exported["teacher"])}
    return Outcome(figures)


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
