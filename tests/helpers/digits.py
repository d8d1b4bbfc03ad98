"""A small set of real images that every machine has: scikit-learn's 1,797 handwritten digits, as shards."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

from data.verify_shards import write_manifests

DEMO = "configs/pretrain_vit-mini_fashion-mnist_full.yaml"
# The demo made small enough for tests: two blocks, 64 prototypes, 32 images a step.
TINY = (
    "batch.global_batch_size=32",
    "data.num_workers=0",
    "data.num_lanes=8",
    "data.shuffle_window=16",
    "data.num_local_crops=1",
    "data.local_crop_size=14",
    "model.patch_size=14",
    "model.embed_dim=24",
    "model.depth=2",
    "model.num_heads=2",
    "model.head.hidden_dim=32",
    "model.head.projection_dim=16",
    "model.head.use_bn=true",
    "prototypes.num_prototypes=64",
    "prototypes.dim=16",
    "prototypes.partition.size=16",
    "logging.every_steps=1",
    "run.device=cpu",
)


def write_digit_shards(
    directory: Path, *, num_train: int = 384, num_test: int = 96, per_shard: int = 48
) -> str:
    """Writes splits `train` and `test`, 28 x 28 grey PNGs in a mixed order, and returns the folder."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    directory.mkdir(parents=True, exist_ok=True)
    for split, indices in (("train", order[:num_train]), ("test", order[num_train : num_train + num_test])):
        for shard in range(0, len(indices), per_shard):
            path = directory / f"{split}-{shard // per_shard:06d}.tar"
            with webdataset.TarWriter(str(path), mtime=0) as writer:
                for index in indices[shard : shard + per_shard]:
                    image = Image.fromarray((digits.images[index] * 255 / 16).astype(np.uint8)).resize(
                        (28, 28)
                    )
                    encoded = io.BytesIO()
                    image.save(encoded, format="PNG")
                    label = str(int(digits.target[index])).encode()
                    writer.write({"__key__": f"{split}-{index:05d}", "png": encoded.getvalue(), "cls": label})
    assert not write_manifests(str(directory), num_decoded=0)
    return str(directory)
