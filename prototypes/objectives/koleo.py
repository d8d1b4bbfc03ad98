"""KoLeo: the entropy estimator that pushes every prototype away from its nearest neighbour."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor

_EPS = 1e-8


def compute_koleo(prototypes: Float[Tensor, "K P"], partition: Int64[Tensor, "G S"]) -> Float[Tensor, ""]:
    """Returns -mean log distance of each unit prototype to its nearest neighbour in its block, fp32.

    Kozachenko-Leonenko entropy estimator (Sablayrolles et al. 2019; DINOv2 applies it to features), here on
    prototypes inside the random blocks of the loss: G products of [S, S] instead of one [K, K]. Gradient flows
    through the distance, not through the choice of the neighbour. Not collective: prototypes are replicated.

    Args:
        prototypes: unit rows.
        partition: random blocks, every prototype once.
    """
    with torch.autocast(prototypes.device.type, enabled=False):
        blocks = prototypes.float()[partition]
        with torch.no_grad():
            cosine = blocks @ blocks.transpose(1, 2)
            cosine.diagonal(dim1=1, dim2=2).fill_(-2.0)
            nearest = cosine.argmax(dim=2)
        neighbours = torch.gather(blocks, 1, nearest[..., None].expand_as(blocks))
        return -((blocks - neighbours).square().sum(-1) + _EPS).sqrt().log().mean()
