"""The loaders that `benchmarks.loader` compares, each an endless iterator of batches of one process.

All cut 2 x 224 and 10 x 96 crops by DINO's recipe out of the same JPEG files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import webdataset
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from data.config import DataConfig
from data.stream.pipeline import TrainingStream
from data.views.augmentations import DeviceAugmentation
from data.views.config import RECIPES

GLOBAL_SIZE, LOCAL_SIZE, NUM_LOCAL = 224, 96, 10
BATCH_SIZE = 32
_RECIPE = RECIPES["dino"]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SOLARIZE_THRESHOLD = 128


def data_config(shards: str) -> DataConfig:
    """Returns the configuration of our loader in this benchmark: one process, DINO's crops."""
    return DataConfig(shards=shards, recipe="dino", num_local_crops=NUM_LOCAL, num_workers=0, num_lanes=4)


class _PilBlur:
    """The reference's blur: Pillow's, with a random radius."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*_RECIPE.blur_sigma)))


class _PilSolarize:
    """The reference's solarisation."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image, _SOLARIZE_THRESHOLD)


def _views() -> list[tuple[int, tuple[float, float], float, float]]:
    """Returns (size, scale, probability of blur, probability of solarisation) of each view."""
    globals_ = [
        (GLOBAL_SIZE, _RECIPE.global_crop_scale, _RECIPE.global_blur[view], _RECIPE.global_solarize[view])
        for view in range(2)
    ]
    return globals_ + [(LOCAL_SIZE, _RECIPE.local_crop_scale, _RECIPE.local_blur, 0.0)] * NUM_LOCAL


def _transforms_v1() -> list[Callable[[Image.Image], Tensor]]:
    bicubic = transforms.InterpolationMode.BICUBIC
    return [
        transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=scale, interpolation=bicubic),
                transforms.RandomHorizontalFlip(_RECIPE.flip),
                transforms.RandomApply([transforms.ColorJitter(*_RECIPE.jitter_strength)], _RECIPE.jitter),
                transforms.RandomGrayscale(_RECIPE.gray),
                transforms.RandomApply([_PilBlur()], blur),
                transforms.RandomApply([_PilSolarize()], solarize),
                transforms.ToTensor(),
                transforms.Normalize(_MEAN, _STD),
            ]
        )
        for size, scale, blur, solarize in _views()
    ]


def _transforms_v2() -> list[nn.Module]:
    return [
        v2.Compose(
            [
                v2.RandomResizedCrop(
                    size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True
                ),
                v2.RandomHorizontalFlip(_RECIPE.flip),
                v2.RandomApply([v2.ColorJitter(*_RECIPE.jitter_strength)], _RECIPE.jitter),
                v2.RandomGrayscale(_RECIPE.gray),
                v2.RandomApply([v2.GaussianBlur(13, _RECIPE.blur_sigma)], blur),
                v2.RandomSolarize(_SOLARIZE_THRESHOLD, solarize),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(_MEAN, _STD),
            ]
        )
        for size, scale, blur, solarize in _views()
    ]


class _MultiCrop:
    """Applies every view's transform to one image."""

    def __init__(self, views: list) -> None:
        self.views = views

    def __call__(self, image: Image.Image | Tensor) -> list[Tensor]:
        return [view(image) for view in self.views]


def _read_rgb(path: str) -> Tensor:
    return decode_jpeg(read_file(path), mode=ImageReadMode.RGB)


def pil_folder(images: str, shards: str) -> Iterator[int]:
    """Yields batch sizes: torchvision's ImageFolder with Pillow and the v1 transforms, the usual loader."""
    dataset = datasets.ImageFolder(images, transform=_MultiCrop(_transforms_v1()))
    while True:
        for crops, _ in DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, drop_last=True):
            yield len(crops[0])


def plain_webdataset(images: str, shards: str) -> Iterator[int]:
    """Yields batch sizes: webdataset's own pipeline over the shards, with the same v1 transforms."""
    urls = sorted(str(path) for path in Path(shards).glob("*.tar"))
    while True:
        dataset = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(256).decode("pil")
        pipeline = dataset.to_tuple("jpg").map_tuple(_MultiCrop(_transforms_v1())).batched(BATCH_SIZE)
        for (crops,) in pipeline:
            yield len(crops)


def torchvision_v2(images: str, shards: str) -> Iterator[int]:
    """Yields batch sizes: ImageFolder with turbo JPEG decoding and the v2 transforms on tensors, all on the CPU."""
    dataset = datasets.ImageFolder(images, loader=_read_rgb, transform=_MultiCrop(_transforms_v2()))
    while True:
        for crops, _ in DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, drop_last=True):
            yield len(crops[0])


def ours_loader_only(images: str, shards: str) -> Iterator[int]:
    """Yields batch sizes: our stream's uint8 crops; the colours are the device's work and are not in this figure."""
    for batch in open_stream(shards):
        yield len(batch.keys)


def ours_all_on_cpu(images: str, shards: str) -> Iterator[int]:
    """Yields batch sizes: our stream and its colours, blur and normalisation, all on the CPU in one process."""
    augment = DeviceAugmentation(data_config(shards))
    for batch in open_stream(shards):
        augment(batch)
        yield len(batch.keys)


def open_stream(shards: str) -> TrainingStream:
    """Returns our stream over the shards, in this process."""
    return TrainingStream(
        data_config(shards),
        seed=0,
        global_batch_size=BATCH_SIZE,
        micro_batch_size=BATCH_SIZE,
        rank=0,
        world_size=1,
        pin=torch.cuda.is_available(),
    )


CONTESTANTS: dict[str, Callable[[str, str], Iterator[int]]] = {
    "ImageFolder, PIL, torchvision v1": pil_folder,
    "plain webdataset, PIL, torchvision v1": plain_webdataset,
    "ImageFolder, turbo JPEG, torchvision v2": torchvision_v2,
    "ours, all colours on the CPU": ours_all_on_cpu,
    "ours, colours on the device (loader only)": ours_loader_only,
}
