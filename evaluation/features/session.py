"""One encoder under evaluation, with the features that its probes share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.datasets import Manifest
from evaluation.confidence import bootstrap
from evaluation.config import EvaluationConfig
from evaluation.encoders.encoder import Encoder
from evaluation.features.bank import FeatureBank
from evaluation.features.extract import load_features
from evaluation.features.patches import POOLED, Reading
from evaluation.features.processes import Processes
from evaluation.features.splits import load_splits

logger = logging.getLogger(__name__)


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
    """One encoder under evaluation; features are extracted when the first probe asks for them.

    Attributes:
        config: what is evaluated and how.
        encoder: which.
        processes: who evaluates together.
        outcomes: of the probes that have run.
        notes: what limits the figures of the probe that runs, one line each.
    """

    config: EvaluationConfig
    encoder: Encoder
    processes: Processes
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _splits: tuple[Manifest, Manifest] | None = None
    _banks: tuple[FeatureBank, FeatureBank] | None = None
    _patches: tuple[FeatureBank, FeatureBank] | None = None

    @property
    def splits(self) -> tuple[Manifest, Manifest]:
        """Manifests of training and test split."""
        if self._splits is None:
            self._splits = load_splits(self.config.data)
        return self._splits

    @property
    def has_features(self) -> bool:
        """Whether features have been extracted already."""
        return self._banks is not None

    @property
    def banks(self) -> tuple[FeatureBank, FeatureBank]:
        """Features of training and test split. Collective on first use."""
        if self._banks is None:
            extract_together([self])
        assert self._banks is not None
        return self._banks

    @property
    def patches(self) -> tuple[FeatureBank, FeatureBank]:
        """Patch tokens of training and test split, between `open_patches` and `close_patches`."""
        assert self._patches is not None
        return self._patches

    def open_patches(self, *, label_maps: bool) -> None:
        """Extracts the patch tokens, or reads them from the cache. Collective.

        Args:
            label_maps: labels are a class for every pixel of the whole, squashed image; else one class for an image
                of the encoder's own preprocessing.
        """
        stored = torch.float16 if self.config.features.patch_precision == "fp16" else torch.float32
        reading = Reading(patches=True, label_maps=label_maps, stored=stored)
        train, test = _load_splits([self], reading)
        self._patches = (train[0], test[0])

    def close_patches(self) -> None:
        """Lets go of the patch tokens: they are hundreds of times larger than the other features."""
        self._patches = None

    def note(self, text: str) -> None:
        """Says once what limits a figure of the probe that runs: in the log, and under `notes` of its result."""
        if text not in self.notes:
            self.notes.append(text)
            if self.processes.rank == 0:
                logger.warning("%s: %s", self.encoder.label, text)

    def note_edge(self, key: str, chosen: float, grid: Sequence[float]) -> None:
        """Says that a choice fell on the end of its grid: it may be better beyond, the figure is a lower bound."""
        if len(grid) > 1 and chosen in (min(grid), max(grid)):
            self.note(f"{key}: {chosen:g} was chosen, the end of the grid; a wider grid may do better")

    def interval(self, predicted: Tensor, labels: Tensor) -> list[float]:
        """Returns the ends of the bootstrap interval of an accuracy, as configured."""
        confidence = self.config.confidence
        right = (predicted == labels).numpy()
        return bootstrap(
            right, resamples=confidence.resamples, level=confidence.level, seed=self.config.seed
        ).as_list()

    def features_for(self, requested: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the requested features; for controls without tokens, those that they have."""
        if self.encoder.role != "control":
            return requested
        available = self.banks[0].available()
        return tuple(name for name in requested if name in available) or ("embedding",)


def extract_together(sessions: Sequence[Session]) -> None:
    """Gives every session its features, decoding images once for all encoders of one preprocessing. Collective."""
    train, test = _load_splits(sessions, POOLED)
    for session, banks in zip(sessions, zip(train, test, strict=True), strict=True):
        session._banks, session._splits = banks, sessions[0].splits


def _load_splits(sessions: Sequence[Session], reading: Reading) -> list[list[FeatureBank]]:
    """Returns the training and the test split's features of every session's encoder. Collective."""
    config = sessions[0].config
    limits = (config.data.max_train_images, config.data.max_test_images)
    return [
        load_features(
            [session.encoder for session in sessions],
            manifest,
            data=config.data,
            features=config.features,
            processes=sessions[0].processes,
            limit=limit,
            reading=reading,
        )
        for manifest, limit in zip(sessions[0].splits, limits, strict=True)
    ]
