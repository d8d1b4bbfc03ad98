"""KoLeo: the entropy estimator that pushes every row away from its nearest neighbour."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor

_EPS = 1e-8


def compute_koleo(prototypes: Float[Tensor, "K P"], partition: Int64[Tensor, "G S"]) -> Float[Tensor, ""]:
    """Returns -mean log distance of each unit prototype to its nearest neighbour in its block, fp32.

    Kozachenko-Leonenko entropy estimator (Sablayrolles et al. 2019), here on prototypes inside the random blocks of
    the loss: G products of [S, S] instead of one [K, K]. Gradient flows through the distance, not through the choice
    of the neighbour. Not collective: prototypes are replicated.

    Args:
        prototypes: unit rows.
        partition: random blocks, every prototype once.
    """
    with torch.autocast(prototypes.device.type, enabled=False):
        return _spread(prototypes.float()[partition])


def compute_embedding_koleo(embeddings: Float[Tensor, "V B D"]) -> Float[Tensor, ""]:
    """Returns the sum over views of KoLeo among the images' embeddings, fp32: DINOv2's regulariser.

    Embeddings are normalised here, and each view's are compared among themselves: two views of one image are to be
    alike. DINOv2 (Oquab et al. 2023), section 4, with the class token before the head and the weight .1. Its code adds
    its epsilon after the root; here distances stay above 1e-4, which equal images would fall below. Not collective:
    neighbours are those of this rank, as there; a rank's only image has none, and 0 is returned, without a gradient.
    """
    if embeddings.shape[1] < 2:
        return embeddings.sum() * 0.0
    with torch.autocast(embeddings.device.type, enabled=False):
        return len(embeddings) * _spread(nn.functional.normalize(embeddings.float(), dim=-1))


def _spread(blocks: Float[Tensor, "G S P"]) -> Float[Tensor, ""]:
    """Returns -mean log distance of each unit row to its nearest neighbour in its block."""
    with torch.no_grad():
        cosine = blocks @ blocks.transpose(1, 2)
        cosine.diagonal(dim1=1, dim2=2).fill_(-2.0)
        nearest = cosine.argmax(dim=2)
    neighbours = torch.gather(blocks, 1, nearest[..., None].expand_as(blocks))
    return -((blocks - neighbours).square().sum(-1) + _EPS).sqrt().log().mean()
