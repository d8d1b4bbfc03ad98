"""A frozen encoder under evaluation, how its loaders are asked for it, and the trial that every network passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.views.pictures import make_picture
from evaluation.config import TransformConfig
from evaluation.encoders.backbones import FeatureModule
from evaluation.encoders.exported import EncoderError, Role, one_line
from evaluation.encoders.preprocessing import NoPreprocessing, Preprocessing, ProcessorTransform

Transform = Preprocessing | ProcessorTransform | NoPreprocessing
# Height and width of the pictures of noise on which an encoder is tried.
_TRIAL_SIZE = (80, 96)


@dataclass(frozen=True)
class LoadOptions:
    """What is asked of a loader besides the name.

    Attributes:
        role: teacher or student; only checkpoints of ours can hold both.
        transform: overrides of the encoder's own preprocessing.
        num_blocks: last blocks whose CLS token becomes the feature `blocks`.
    """

    role: Role = "teacher"
    transform: TransformConfig = field(default_factory=TransformConfig)
    num_blocks: int = 1


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder and what a reader of its results must know.

    Attributes:
        spec: the name under which it was asked for.
        label: short name for tables and directories.
        role: teacher or student, for our checkpoints; `released` for others; `control`.
        module: images to named features, in eval mode, without gradients.
        transform: its own preprocessing.
        weights_sha256: over every tensor's name, type, shape and bytes.
        folder: the exported folder with `prototypes.safetensors`, where it is one of ours.
        weights_file: `PATH` or `PATH#TENSOR` where it is a weights file, of which prototypes alone can be audited.
        run_dir: the run that it belongs to.
        step: optimizer updates behind it, where known.
    """

    spec: str
    label: str
    role: str
    module: FeatureModule
    transform: Transform
    weights_sha256: str
    folder: Path | None = None
    weights_file: str | None = None
    run_dir: Path | None = None
    step: int | None = None

    def describe(self) -> dict[str, Any]:
        """Returns what every result says about its encoder."""
        return {
            "spec": self.spec,
            "label": self.label,
            "role": self.role,
            "step": self.step,
            "weights_sha256": self.weights_sha256,
            "num_parameters": sum(parameter.numel() for parameter in self.module.parameters()),
            "transform": self.transform.describe(),
        }


def freeze(encoder: Encoder) -> Encoder:
    """Returns the encoder in eval mode and without gradients, after a trial on images of noise.

    Raises:
        EncoderError: it cannot take images of its own preprocessing, or gives other features the second time.
    """
    encoder.module.eval().requires_grad_(False)
    _require_same_twice(encoder)
    return encoder


@torch.no_grad()
def _require_same_twice(encoder: Encoder) -> None:
    """Raises EncoderError unless the encoder takes images of its own preprocessing and gives the same features twice.

    A network that masks, samples or drops in eval mode has no features: every figure would be a draw.
    """
    generator = np.random.default_rng(0)
    format = encoder.transform.format
    shape = (*_TRIAL_SIZE, format.channels)
    pictures = [make_picture(generator.random(shape), format) for _ in range(2)]
    try:
        images = torch.stack([encoder.transform(picture) for picture in pictures])
        first, second = encoder.module(images), encoder.module(images)
    except EncoderError:
        raise
    except Exception as error:
        raise EncoderError(
            f"encoder is {encoder.spec!r}, which cannot take images of its preprocessing "
            f"({type(error).__name__}: {one_line(error)}); expected a size and channels that fit; set "
            "transform.image_size, or transform.channels"
        ) from error
    for name, features in first.items():
        if not torch.allclose(features, second[name], rtol=1e-3, atol=1e-5, equal_nan=True):
            raise EncoderError(
                f"encoder is {encoder.spec!r}, whose feature {name!r} differs between two forwards of the same images; "
                "expected a network without random masking or dropout in eval mode; set encoder"
            )
