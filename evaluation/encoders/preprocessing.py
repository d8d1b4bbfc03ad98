"""From a decoded image to what one encoder wants to see: its own size, crop, interpolation, mean and std."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from data.views.config import PixelFormat, PixelType
from data.views.pictures import RGB, BandImage, Picture
from evaluation.config import TransformConfig

if TYPE_CHECKING:
    from jaxtyping import Float


@runtime_checkable
class PictureTransform(Protocol):
    """An encoder's preprocessing, and the format of the pictures that it takes."""

    @property
    def format(self) -> PixelFormat:
        """What is decoded for it."""
        ...

    def __call__(self, image: Picture) -> Float[Tensor, "C H W"]:
        """Returns the preprocessed image in fp32."""
        ...


@dataclass(frozen=True)
class Preprocessing:
    """A picklable transform, so that loader processes can run it.

    Attributes:
        channels: of 8 bits, 3 converts to RGB and 1 to grey values; else what images must hold.
        image_size: side in pixels of the square that comes out, or its height and width.
        crop_fraction: `image_size` / side to which the shorter edge is resized before the centre crop.
        interpolation: of the resize.
        mean: per channel, of values divided by their type's largest, see `data.views.config.FULL_SCALE`.
        std: per channel.
        crop_mode: timm's way to make the image square: `center`, `squash` or `border`.
        pixels: type of the images' numbers.
    """

    channels: int
    image_size: int | tuple[int, int]
    crop_fraction: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: str = "center"
    pixels: PixelType = "uint8"

    def __post_init__(self) -> None:
        """Builds timm's transform once; refuses statistics of another number of channels."""
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (1, self.channels):
                raise ValueError(
                    f"transform.{name} is {list(values)}; expected 1 or {self.channels} numbers, one per channel; "
                    f"set transform.{name}"
                )
        # Bands go through one by one, and are normalised together.
        is_photograph = self.format.is_photograph
        transform = create_transform(
            input_size=(self.channels if is_photograph else 1, *self.height_and_width),
            is_training=False,
            interpolation=self.interpolation,
            mean=self._per_channel(self.mean) if is_photograph else (0.0,),
            std=self._per_channel(self.std) if is_photograph else (1.0,),
            crop_pct=self.crop_fraction,
            crop_mode=self.crop_mode,
        )
        object.__setattr__(self, "_transform", transform)

    def __call__(self, image: Picture) -> Float[Tensor, "C H W"]:
        """Returns the preprocessed image in fp32."""
        if isinstance(image, BandImage):
            bands = torch.cat([self._transform(band) for band in image.bands])  # type: ignore[attr-defined]
            mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
            return (bands / self.format.full_scale - mean) / std
        converted = image.convert("RGB" if self.channels == 3 else "L")
        return torch.as_tensor(self._transform(converted))  # type: ignore[attr-defined]

    @property
    def format(self) -> PixelFormat:
        """What is decoded for it."""
        return PixelFormat(self.channels, self.pixels)

    @property
    def height_and_width(self) -> tuple[int, int]:
        """Of what comes out."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def side(self) -> int:
        """Of the square that comes out.

        Raises:
            ValueError: it is none.
        """
        height, width = self.height_and_width
        if height != width:
            raise ValueError(
                f"the encoder's images are {height} x {width}; expected a square for this probe; set "
                "transform.image_size to one number"
            )
        return height

    def _per_channel(self, values: tuple[float, ...]) -> tuple[float, ...]:
        return values * self.channels if len(values) == 1 else values

    def describe(self) -> dict[str, Any]:
        """Returns the options as JSON-able values: part of the cache key and of every result."""
        return {
            "channels": self.channels,
            "image_size": self.image_size if isinstance(self.image_size, int) else list(self.image_size),
            "crop_fraction": round(self.crop_fraction, 6),
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
            "crop_mode": self.crop_mode,
            **({} if self.pixels == "uint8" else {"pixels": self.pixels}),
        }


class ProcessorTransform:
    """Runs the image processor that a transformers checkpoint carries; picklable. It takes photographs.

    Args:
        processor: what `AutoImageProcessor.from_pretrained` returned.
    """

    format = RGB

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Picture) -> Float[Tensor, "C H W"]:
        """Returns the preprocessed image in fp32."""
        assert isinstance(image, Image.Image)
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0].float()

    def describe(self) -> dict[str, Any]:
        """Returns the processor's options as JSON-able values."""
        # All of them: whatever a processor can be told changes what the network sees.
        return {key: _plain(value) for key, value in sorted(self.processor.to_dict().items())}


class NoPreprocessing:
    """Of a weights file, which sees no images."""

    format = RGB

    def __call__(self, image: Picture) -> Float[Tensor, "C H W"]:
        """Raises ValueError."""
        raise ValueError("encoder is a weights file, which sees no images; set probes=[prototypes]")

    def describe(self) -> dict[str, Any]:
        """Returns nothing to describe."""
        return {}


def from_timm_config(
    config: Mapping[str, Any], overrides: TransformConfig, pixels: PixelType = "uint8"
) -> Preprocessing:
    """Returns the preprocessing that a timm data configuration declares, with overrides applied.

    Args:
        config: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`, as timm's resolvers give.
        overrides: non-null values win.
        pixels: type of the images' numbers, of which timm says nothing.
    """
    channels, height, width = config["input_size"]
    return Preprocessing(
        channels=overrides.channels or channels,
        image_size=overrides.image_size or (height if height == width else (height, width)),
        crop_fraction=overrides.crop_fraction or float(config.get("crop_pct", 1.0)),
        interpolation=overrides.interpolation or config.get("interpolation", "bicubic"),
        mean=overrides.mean or tuple(config["mean"]),
        std=overrides.std or tuple(config["std"]),
        crop_mode=config.get("crop_mode") or "center",
        pixels=overrides.pixels or pixels,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)
