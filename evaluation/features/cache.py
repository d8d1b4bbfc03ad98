"""Where features are kept on the disk, and the key under which they are found again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.datasets import Manifest
from evaluation.config import FeaturesConfig
from evaluation.encoders.encoder import Encoder
from evaluation.tensor_files import DamagedFileError, load_tensors

logger = logging.getLogger(__name__)

# Raised when the meaning of a cached file changes: older files are then not found.
CACHE_SCHEMA = 3


def cache_file(
    encoder: Encoder,
    manifest: Manifest,
    features: FeaturesConfig,
    limit: int | None,
    reading: dict[str, Any],
) -> Path:
    """Returns where the features of one split lie: its name holds a hash of all that they depend on.

    `reading`: what `Reading.describe` says of preprocessing and of what is kept.
    """
    parts = {
        "schema": CACHE_SCHEMA,
        "weights": encoder.weights_sha256,
        "network": describe_network(encoder.module),
        **reading,
        "manifest": manifest.hash,
        "split": manifest.split,
        "precision": features.precision,
        "num_blocks": features.num_blocks,
        "limit": limit,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return Path(features.cache_dir) / f"{encoder.label}-{manifest.split}-{key}.safetensors"


def describe_network(module: nn.Module) -> str:
    """Returns a hash of a network's structure and of every plain setting in it.

    Weights and `repr` do not tell everything: the number of attention heads, a pooling or an epsilon can differ
    between networks of equal tensors.
    """
    plain = (bool, int, float, str, tuple, type(None))
    settings = {
        name: {
            key: repr(value)
            for key, value in sorted(vars(part).items())
            if not key.startswith("_") and key != "training" and isinstance(value, plain)
        }
        for name, part in module.named_modules()
    }
    return hashlib.sha256((repr(module) + json.dumps(settings, sort_keys=True)).encode()).hexdigest()


def read_cached(path: Path) -> dict[str, Tensor] | None:
    """Returns the features in a cache file; None where there is none, or where it is damaged, which is said."""
    if not path.is_file():
        return None
    try:
        tensors, _ = load_tensors(path)
    except DamagedFileError as error:
        logger.warning("features are extracted again: %s", error)
        return None
    # When it was last of use, for `evaluation.cache --prune`. Not the time of access: looking at a file renews that.
    with contextlib.suppress(OSError):  # a cache that others own, or that is read-only, is as good
        os.utime(path)
    return tensors
