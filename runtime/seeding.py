"""Seeds: one number in the configuration, one independent stream for every purpose, rank and step."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Returns a 63-bit seed from parts such as `seed, "drop_path", step, rank`; equal on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seeds Python, NumPy and torch (CPU and every GPU of this process) from `derive_seed(*parts)`."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
