"""Patch tokens: what is extracted of an image besides its pooled features, and the pixels that each token stands for.

For label maps an image is squashed to the encoder's square, as in CAPI's evaluation (facebookresearch/capi@98b4fa1,
eval_segmentation.py): all of it is seen, its aspect ratio is lost, and label maps follow by their nearest pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data.views.pictures import Picture
from evaluation.encoders.encoder import Encoder
from evaluation.encoders.preprocessing import Preprocessing, ProcessorTransform
from evaluation.features.bank import FeatureError

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}
# Side of the grey squares by which a transformers processor is asked for its size, mean and std.
_TRIAL_SIDE = 512


@dataclass(frozen=True)
class Reading:
    """What is taken of every image.

    Attributes:
        patches: the last block's patch tokens instead of pooled features.
        label_maps: a class for every pixel instead of one for the image.
        stored: type in which features are kept.
    """

    patches: bool = False
    label_maps: bool = False
    stored: torch.dtype = torch.float32

    def transform(self, encoder: Encoder) -> Any:
        """Returns the encoder's preprocessing, of image and label map together where there are label maps."""
        return DensePreprocessing(square_preprocessing(encoder)) if self.label_maps else encoder.transform

    def describe(self, encoder: Encoder) -> dict[str, Any]:
        """Returns what the cache's key holds of the encoder's preprocessing and of all this."""
        about = {"transform": self.transform(encoder).describe()}
        if self.patches:
            about |= {"patches": "last block", "stored": str(self.stored), "label_maps": self.label_maps}
        return about


POOLED = Reading()


class DensePreprocessing:
    """Image and label map to what the encoder sees; picklable.

    Args:
        preprocessing: that squashes the image.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(
        self, image: Picture, label_map: Image.Image
    ) -> tuple[Float[Tensor, "C H W"], UInt8[Tensor, "H W"]]:
        """Returns the preprocessed image and the class of each of its pixels."""
        height, width = self.preprocessing.height_and_width
        small = label_map.resize((width, height), Image.Resampling.NEAREST)
        return self.preprocessing(image), torch.from_numpy(np.array(small))

    def describe(self) -> dict[str, Any]:
        """Returns the options as JSON-able values."""
        return self.preprocessing.describe()


def square_preprocessing(encoder: Encoder) -> Preprocessing:
    """Returns the encoder's own size, mean, std and interpolation, with the whole image squashed to the square.

    Raises:
        FeatureError: they cannot be known.
    """
    transform = encoder.transform
    if isinstance(transform, Preprocessing):
        return replace(transform, crop_fraction=1.0, crop_mode="squash")
    if isinstance(transform, ProcessorTransform):
        # The processor is asked, not read: each of its classes names its options differently.
        black, white = (transform(Image.new("RGB", (_TRIAL_SIDE, _TRIAL_SIDE), (v, v, v))) for v in (0, 255))
        std = 1 / (white - black).mean(dim=(1, 2)).double()
        mean = -black.mean(dim=(1, 2)).double() * std
        resample = int(getattr(transform.processor, "resample", 3) or 3)
        if black.shape[1] == black.shape[2] and bool(std.isfinite().all()) and resample in _RESAMPLING:
            return Preprocessing(
                channels=black.shape[0],
                image_size=black.shape[1],
                crop_fraction=1.0,
                interpolation=_RESAMPLING[resample],
                mean=tuple(round(value, 6) for value in mean.tolist()),
                std=tuple(round(value, 6) for value in std.tolist()),
                crop_mode="squash",
            )
    raise FeatureError(
        f"encoder is {encoder.spec!r}, of whose preprocessing size, mean and std are not known; expected all three; "
        "set transform.image_size, transform.mean and transform.std"
    )


class PatchTokens(nn.Module):
    """An encoder's patch tokens alone: images [B, C, H, W] to `patch_tokens` [B, N, D] in the grid's row order.

    Prefix tokens (CLS, registers) are removed as the encoder declares them. Cells of a last convolutional grid are
    taken, too.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.module = encoder.module
        self._spec = encoder.spec

    def forward(self, images: Float[Tensor, "B C H W"]) -> dict[str, Tensor]:
        """Returns the tokens.

        Raises:
            FeatureError: the encoder gives no patches, or no grid that divides the image.
        """
        tokens = self.module.patch_tokens(images)
        if tokens is None:
            raise FeatureError(
                f"encoder is {self._spec!r}, which hands on no patch tokens; expected a ViT, or a network with a last "
                "grid of cells; set encoder"
            )
        grid_shape(tokens.shape[1], (images.shape[-2], images.shape[-1]), self._spec)
        return {"patch_tokens": tokens}


def grid_shape(num_tokens: int, size: tuple[int, int], spec: str) -> tuple[int, int]:
    """Returns rows and columns of the grid of an image's tokens, whose patches are square.

    Args:
        num_tokens: N.
        size: height and width of the image.
        spec: the encoder's name, for the message.

    Raises:
        FeatureError: they make no such grid that divides the image.
    """
    height, width = size
    rows = round((num_tokens * height / width) ** 0.5)
    columns = num_tokens // max(1, rows)
    if rows * columns != num_tokens or height % rows or width % columns or height * columns != width * rows:
        raise FeatureError(
            f"encoder is {spec!r}, whose {num_tokens} patch tokens are no grid of squares that divides {height} x "
            f"{width} pixels; expected a ViT and a multiple of its patch size; set encoder or transform.image_size"
        )
    return rows, columns
