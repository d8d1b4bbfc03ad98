"""Random draws that every rank repeats alike without a message: pure functions of a purpose and numbers."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def make_generator(purpose: str, *numbers: int) -> torch.Generator:
    """Returns a CPU generator seeded by a hash of its purpose and numbers: streams never overlap by chance."""
    text = ":".join([purpose, *(str(number) for number in numbers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def draw_unit_vectors(num_prototypes: int, dim: int, seed: int) -> Float[Tensor, "K P"]:
    """Returns random directions, uniform on the sphere, fp32: a pure function of its arguments."""
    rows = torch.randn(num_prototypes, dim, generator=make_generator("prototypes", seed))
    return nn.functional.normalize(rows, dim=1)
