"""The projection head: embedding (D) to projection (P)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from models.config import HeadConfig

if TYPE_CHECKING:
    from jaxtyping import Float


UNIT_LENGTH = "unit_length"
"""In a file with a head's tensors: its projections have unit length, which no tensor of its own tells."""


class ProjectionHead(nn.Module):
    """The MLP head of CARP and DINO: (Linear, [BatchNorm,] GELU) x (layers - 1), Linear, [unit length]. No temperature.

    Silva & Ramirez Rivera 2023 (CARP), section 4 and the authors' released head: linear weights are drawn from a
    truncated normal of standard deviation 0.02, biases start at 0. CARP's projection is not normalised; its norm is
    the learned inverse temperature of the logits. DINO's is (Caron et al. 2021, appendix C).
    """

    def __init__(self, embed_dim: int, config: HeadConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = embed_dim
        for _ in range(config.num_layers - 1):
            # BatchNorm subtracts the mean: a bias before it would be a parameter without a gradient.
            layers.append(nn.Linear(width, config.hidden_dim, bias=not config.use_bn))
            if config.use_bn:
                layers.append(nn.BatchNorm1d(config.hidden_dim))
            layers.append(nn.GELU())
            width = config.hidden_dim
        layers.append(nn.Linear(width, config.projection_dim))
        self.mlp = nn.Sequential(*layers)
        self.normalize_bottleneck = config.normalize_bottleneck
        self.apply(_initialise)

    def forward(self, embedding: Float[Tensor, "N D"]) -> Float[Tensor, "N P"]:
        """Returns the projections; gradients flow to the head and to the embedding."""
        projection = self.mlp(embedding)
        return (
            nn.functional.normalize(projection.float(), dim=-1) if self.normalize_bottleneck else projection
        )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
