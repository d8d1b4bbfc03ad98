"""A small set of drawn images with label maps, as shards: coloured boxes on a background, with a void margin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from data.make_shards import main

CLASSES = ("ground", "box", "ball", "never")
_COLOURS = np.array([[60, 90, 60], [200, 60, 50], [70, 80, 210]])
_SIZE = (40, 32)  # width, height


def draw_scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns an image uint8 [32, 40, 3] and its label map uint8 [32, 40]."""
    generator = np.random.default_rng(seed)
    width, height = _SIZE
    labels = np.zeros((height, width), dtype=np.uint8)
    for label in (1, 2):
        top, left = generator.integers(2, height - 14), generator.integers(2, width - 14)
        labels[top : top + generator.integers(8, 14), left : left + generator.integers(8, 14)] = label
    pixels = _COLOURS[labels] + generator.normal(0, 25, (height, width, 3))
    labels[:2], labels[:, :2] = 255, 255
    return pixels.clip(0, 255).astype(np.uint8), labels


def write_label_map_shards(root: Path, *, num_train: int = 24, num_test: int = 6) -> str:
    """Writes splits `train` and `test` under a folder and returns the folder of the shards."""
    for split, count, first in (("train", num_train, 0), ("test", num_test, 1000)):
        folder = root / "images" / split
        folder.mkdir(parents=True)
        for number in range(count):
            pixels, labels = draw_scene(first + number)
            Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=95)
            Image.fromarray(labels).save(folder / f"{number}.png")
    (root / "images" / "classes.txt").write_text("\n".join(CLASSES))
    arguments = ["segmentation", str(root / "images"), "--out", str(root / "shards"), "--processes", "1"]
    assert main(arguments) == 0
    return str(root / "shards")
