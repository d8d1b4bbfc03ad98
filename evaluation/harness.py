"""One evaluation: an encoder, its controls and the probes that were asked for, each into its results file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from data.datasets import Manifest
from evaluation.config import EvaluationConfig
from evaluation.encoder import Encoder, load_controls, load_encoder
from evaluation.features import FeatureBank, load_features, load_splits
from evaluation.knn import HEADLINE_K, classify_knn
from evaluation.processes import Processes, start_processes
from evaluation.prototypes import audit, load_exported_prototypes, read_training_usage
from evaluation.results import collect_provenance, write_result
from runtime.config import config_hash, config_to_dict

logger = logging.getLogger(__name__)

# Controls are measured by what needs no fitting.
CONTROL_PROBES = ("knn",)


@dataclass
class Outcome:
    """What a probe found.

    Attributes:
        figures: JSON-able figures.
        predictions: predicted classes of the test images by name, with `labels`.
    """

    figures: dict[str, Any]
    predictions: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Session:
    """One encoder under evaluation; features are extracted when the first probe asks for them."""

    config: EvaluationConfig
    encoder: Encoder
    processes: Processes
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    _splits: tuple[Manifest, Manifest] | None = None
    _banks: tuple[FeatureBank, FeatureBank] | None = None

    @property
    def splits(self) -> tuple[Manifest, Manifest]:
        """Manifests of training and test split."""
        if self._splits is None:
            self._splits = load_splits(self.config.data)
        return self._splits

    @property
    def banks(self) -> tuple[FeatureBank, FeatureBank]:
        """Features of training and test split. Collective on first use."""
        if self._banks is None:
            limits = (self.config.data.max_train_images, self.config.data.max_test_images)
            train, test = (
                load_features(
                    self.encoder,
                    manifest,
                    data=self.config.data,
                    features=self.config.features,
                    processes=self.processes,
                    limit=limit,
                )
                for manifest, limit in zip(self.splits, limits, strict=True)
            )
            self._banks = (train, test)
        return self._banks

    def features_for(self, requested: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the requested features; for controls without tokens, those that they have."""
        if self.encoder.role != "control":
            return requested
        available = self.banks[0].available()
        return tuple(name for name in requested if name in available) or ("embedding",)


def evaluate(config: EvaluationConfig) -> list[Path]:
    """Runs every probe on the encoder and k-NN on its controls; returns the results files. Collective.

    Raises:
        ValueError: whatever the user can mend, in one line.
    """
    processes = start_processes(config.device)
    num_blocks = config.features.num_blocks
    encoder = load_encoder(
        config.encoder, role=config.role, transform=config.transform, num_blocks=num_blocks
    )
    directory = results_directory(config, encoder)
    session = Session(config, encoder, processes)
    written = [_run_probe(session, probe, directory) for probe in config.probes]
    if config.controls:
        controls = load_controls(
            encoder,
            config.controls,
            seeds=config.control_seeds,
            transform=config.transform,
            num_blocks=num_blocks,
        )
        for control in controls:
            beside = Session(config, control, processes)
            place = directory / "controls" / control.label
            written += [_run_probe(beside, probe, place) for probe in CONTROL_PROBES]
    return written


def results_directory(config: EvaluationConfig, encoder: Encoder) -> Path:
    """Returns where results go: as configured, else beside the run, else under `outputs/evaluations`."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    if encoder.run_dir is not None and encoder.role != "control":
        return encoder.run_dir / "results"
    return Path("outputs/evaluations") / encoder.label


def _run_probe(session: Session, probe: str, directory: Path) -> Path:
    started = time.perf_counter()
    outcome = PROBE_FUNCTIONS[probe](session)
    session.outcomes[probe] = outcome
    path = directory / f"{probe}.json"
    if session.processes.rank == 0:
        config = session.config
        provenance = collect_provenance(
            config=config_to_dict(config),
            config_hash=config_hash(config),
            manifests=_manifest_hashes(session),
        )
        write_result(
            directory,
            probe,
            encoder=session.encoder.describe(),
            figures=outcome.figures,
            provenance={**provenance, "num_processes": session.processes.world_size},
            seconds=time.perf_counter() - started,
            predictions=outcome.predictions,
        )
        logger.info("%s: %s -> %s", session.encoder.label, probe, path)
    return path


def _manifest_hashes(session: Session) -> dict[str, str]:
    if session._splits is None:
        return {}
    return {f"{manifest.directory}:{manifest.split}": manifest.hash for manifest in session.splits}


def probe_knn(session: Session) -> Outcome:
    """Returns weighted k-NN accuracies for every feature and k; headline k is 20 where it is among them."""
    config, (train, test) = session.config.knn, session.banks
    names = session.features_for(config.features)
    headline = HEADLINE_K if HEADLINE_K in config.k else config.k[0]
    by_feature: dict[str, Any] = {}
    predictions: dict[str, Tensor] = {"labels": test.labels}
    for name in names:
        result = classify_knn(
            train.select(name),
            train.labels,
            test.select(name),
            test.labels,
            ks=config.k,
            num_classes=train.num_classes,
            temperature=config.temperature,
            processes=session.processes,
        )
        by_feature[name] = {
            "top1": {str(k): value for k, value in result.top1.items()},
            "top5": {str(k): value for k, value in result.top5.items()},
        }
        predictions[name] = result.predictions[headline]
    best = max(names, key=lambda name: by_feature[name]["top1"][str(headline)])
    figures = {
        "headline": {
            "top1": by_feature[names[0]]["top1"][str(headline)],
            "k": headline,
            "feature": names[0],
            "predictions": names[0],
        },
        "best_feature_on_test": best,
        "temperature": config.temperature,
        "features": by_feature,
        "train_images": len(train.labels),
        "test_images": len(test.labels),
    }
    return Outcome(figures, predictions)


def probe_prototypes(session: Session) -> Outcome:
    """Returns the audit of the checkpoint's prototypes, teacher's and student's."""
    config, encoder = session.config.prototypes, session.encoder
    if encoder.folder is None:
        raise ValueError(
            f"probes hold 'prototypes', and {encoder.spec} has none; expected a run, a checkpoint or an exported "
            "folder of this project, or a weights file; set probes"
        )
    device = session.processes.device
    roles = {
        role: audit(
            matrix.to(device),
            thresholds=config.thresholds,
            angle_pairs=config.angle_pairs,
            seed=session.config.seed,
        )
        for role, matrix in load_exported_prototypes(encoder.folder).items()
    }
    figures: dict[str, Any] = {"roles": roles}
    if encoder.run_dir is not None:
        figures["training_usage"] = read_training_usage(encoder.run_dir, encoder.step)
    return Outcome(figures)


PROBE_FUNCTIONS: dict[str, Callable[[Session], Outcome]] = {
    "prototypes": probe_prototypes,
    "knn": probe_knn,
}
