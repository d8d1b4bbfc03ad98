"""Tiny shard sets with webdataset's own writer; every image's colour tells which one it is."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.config import DataConfig, MaskConfig
from data.verify_shards import write_manifests

MakeSet = Callable[..., str]
MakeConfig = Callable[..., DataConfig]


def encode_image(number: int, *, size: int = 8, suffix: str = "png") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format={"jpg": "JPEG", "jpeg": "JPEG"}.get(suffix, suffix.upper()))
    return encoded.getvalue()


@pytest.fixture
def image_bytes() -> Callable[..., bytes]:
    return encode_image


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    """Writes shards of the given sizes, keys k00000, k00001, ... across them; returns the folder."""

    def make(
        sizes: Sequence[int],
        *,
        name: str = "set",
        suffix: str = "png",
        bad: dict[int, bytes] | None = None,
        labels: Sequence[int] | None = None,
    ) -> str:
        directory = tmp_path / name
        directory.mkdir()
        number = 0
        for shard, size in enumerate(sizes):
            with webdataset.TarWriter(str(directory / f"train-{shard:06d}.tar"), mtime=0) as writer:
                for _ in range(size):
                    image = (bad or {}).get(number, encode_image(number, suffix=suffix))
                    label = str(labels[number] if labels else number % 3).encode()
                    writer.write({"__key__": f"k{number:05d}", suffix: image, "cls": label})
                    number += 1
        assert not write_manifests(str(directory), num_decoded=0)
        return str(directory)

    return make


@pytest.fixture
def make_config() -> MakeConfig:
    def make(shards: str, **changes: object) -> DataConfig:
        values: dict[str, object] = {
            "shards": shards,
            "recipe": "none",
            "global_crop_size": 8,
            "num_local_crops": 1,
            "local_crop_size": 4,
            "num_workers": 0,
            "num_lanes": 4,
            "shuffle_window": 3,
            "masks": MaskConfig(kind="block", patch_size=2, crops=0.8, predicted=0.5),
        }
        return DataConfig(**{**values, **changes})

    return make
