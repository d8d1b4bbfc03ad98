"""The control that any encoder should beat: the image itself as its feature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import unfold

from evaluation.encoders.backbones import FeatureModule, Features
from evaluation.encoders.encoder import Encoder, LoadOptions, freeze
from evaluation.encoders.exported import EncoderError
from evaluation.encoders.preprocessing import Preprocessing
from models.config import WeightsSpec

if TYPE_CHECKING:
    from jaxtyping import Float

# Where no encoder stands beside them: the patches of most ViTs.
PATCH_SIZE = 16


class PixelFeatures(FeatureModule):
    """The image itself, flattened.

    Args:
        mean: that the preprocessing subtracted, one number or one per channel.
        std: that it divided by; both are undone, because cosines depend on where zero is.
        patch_size: side in pixels of a patch.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], patch_size: int = PATCH_SIZE) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Features:
        """Returns the pixels in 0..1 as `embedding`."""
        return {"embedding": self._undo(images).flatten(1)}

    def patch_tokens(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"] | None:
        """Returns the pixels of every patch in 0..1, in row order; None where patches do not divide the image."""
        size = self.patch_size
        if images.shape[2] % size or images.shape[3] % size:
            return None
        return unfold(self._undo(images), size, stride=size).transpose(1, 2)

    def _undo(self, images: Tensor) -> Tensor:
        return images * self.std.to(images) + self.mean.to(images)


def load_pixels(spec: WeightsSpec, options: LoadOptions) -> Encoder:
    """Returns the pixels in 0..1 of images of `transform.image_size`.

    Raises:
        EncoderError: no size is given.
    """
    overrides = options.transform
    if overrides.image_size is None:
        raise EncoderError(
            "transform.image_size is null; expected the size at which raw pixels are compared; "
            "set transform.image_size"
        )
    return build_pixels(
        Preprocessing(
            channels=overrides.channels or 3,
            image_size=overrides.image_size,
            crop_fraction=overrides.crop_fraction or 1.0,
            interpolation=overrides.interpolation or "bicubic",
            mean=overrides.mean or (0.0,),
            std=overrides.std or (1.0,),
            pixels=overrides.pixels or "uint8",
        )
    )


def build_pixels(transform: Preprocessing, patch_size: int = PATCH_SIZE) -> Encoder:
    """Returns the pixels in 0..1 that are seen through `transform`."""
    return freeze(
        Encoder(
            spec="raw-pixels",
            label="raw-pixels",
            role="control",
            module=PixelFeatures(transform.mean, transform.std, patch_size),
            transform=transform,
            weights_sha256="none",
        )
    )
