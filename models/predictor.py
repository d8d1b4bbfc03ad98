"""CAPI's predictor: what stands at hidden positions, from the tokens of those that are seen."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

# Position of a token that stands nowhere: the class token, a register.
NOWHERE = -1

# Turns across the grid of the fastest and of the slowest rotation: CAPI's.
_MOST_TURNS, _FEWEST_TURNS = 7.0, 7e-4
_NORM_EPS = 1e-5
_INIT_STD = 0.02


class Predictor(nn.Module):
    """Blocks of cross-attention from mask queries to the encoder's tokens, and MLPs; no query sees another one.

    x <- x + Attention(norm x, tokens), x <- x + MLP(norm x), where x starts as one learned vector at every hidden
    position and positions enter as rotations of attention's queries and keys. Source: CAPI (Darcet et al. 2025),
    section 3 and its code, whence pre-RMSNorm, linear maps without bias and the range of frequencies. It differs in the
    tokens that stand nowhere, which are not rotated (CAPI spreads its registers along the border), and in drop path,
    which is timm's.

    Args:
        embed_dim: width of the encoder's tokens and of the predictions, D.
        num_layers: blocks.
        num_heads: attention heads; D must be a multiple of four times as many.
        drop_path_rate: of both branches of every block, while training.
        activation_checkpointing: recompute the blocks in the backward pass.

    Raises:
        ValueError: heads of a width that is no multiple of 4.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        num_layers: int = 12,
        num_heads: int,
        drop_path_rate: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim % (4 * num_heads):
            raise ValueError(
                f"model.predictor.num_heads is {num_heads}; expected a number that divides {embed_dim} / 4: rows and "
                "columns rotate pairs of a head's channels; set model.predictor.num_heads"
            )
        self.mask_token = nn.Parameter(torch.empty(embed_dim))
        self.blocks = nn.ModuleList(_Block(embed_dim, num_heads, drop_path_rate) for _ in range(num_layers))
        self.norm = nn.RMSNorm(embed_dim, eps=_NORM_EPS, elementwise_affine=False)
        self._head_dim = embed_dim // num_heads
        self._activation_checkpointing = activation_checkpointing
        nn.init.normal_(self.mask_token, std=_INIT_STD)
        self.apply(_initialise)

    def forward(
        self,
        tokens: Float[Tensor, "N L D"],
        token_positions: Int64[Tensor, "N L"],
        positions: Int64[Tensor, "N R"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "N R D"]:
        """Returns what stands at the positions; gradient flows to the tokens.

        A prediction is a function of its position and of its image's tokens with theirs, in whatever order they come.

        Args:
            tokens: the encoder's.
            token_positions: number of each token's patch in its crop, row by row, or `NOWHERE`.
            positions: numbers of the patches to predict.
            grid: height and width of the crop in patches.
        """
        of_keys = _compute_angles(token_positions, grid, self._head_dim)
        of_queries = _compute_angles(positions, grid, self._head_dim)
        # A sum and no view: counters of FLOPs ask every input of a module for its graph.
        seen = tokens.new_zeros(*positions.shape, tokens.shape[-1]) + self.mask_token.to(tokens.dtype)
        for block in self.blocks:
            if self._activation_checkpointing and torch.is_grad_enabled():
                seen = checkpoint(block, seen, tokens, of_queries, of_keys, use_reentrant=False)
            else:
                seen = block(seen, tokens, of_queries, of_keys)
        return self.norm(seen)


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, drop_path_rate: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=_NORM_EPS)
        self.attention = _CrossAttention(dim, num_heads)
        self.mlp_norm = nn.RMSNorm(dim, eps=_NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False)
        )
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, tokens: Tensor, of_queries: Tensor, of_keys: Tensor) -> Tensor:
        attended = self.attention(self.attention_norm(x), tokens, of_queries, of_keys)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))


class _CrossAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_queries = nn.Linear(dim, dim, bias=False)
        self.to_keys_and_values = nn.Linear(dim, 2 * dim, bias=False)
        self.to_output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, tokens: Tensor, of_queries: Tensor, of_keys: Tensor) -> Tensor:
        queries = self._by_head(self.to_queries(x))
        keys, values = (self._by_head(part) for part in self.to_keys_and_values(tokens).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(
            _rotate(queries, of_queries), _rotate(keys, of_keys), values
        )
        return self.to_output(attended.transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _compute_angles(
    positions: Int64[Tensor, "N T"], grid: tuple[int, int], head_dim: int
) -> Float[Tensor, "N 1 T A"]:
    """Returns by how much each pair of a head's channels turns: a half of the pairs by row, a half by column; fp32."""
    height, width = grid
    spread = torch.linspace(0, 1, head_dim // 4, device=positions.device)
    turns = _MOST_TURNS * (_FEWEST_TURNS / _MOST_TURNS) ** spread
    rows = torch.div(positions, width, rounding_mode="floor") / max(height - 1, 1)
    columns = positions.remainder(width) / max(width - 1, 1)
    angles = torch.cat([rows[..., None] * turns, columns[..., None] * turns], dim=-1) * (2 * math.pi)
    return angles.masked_fill((positions == NOWHERE)[..., None], 0.0)[:, None]


def _rotate(x: Float[Tensor, "N H T W"], angles: Float[Tensor, "N 1 T A"]) -> Float[Tensor, "N H T W"]:
    """Returns rotary embeddings (Su et al. 2021) in two dimensions: channel i is turned with channel i + W / 2."""
    first, second = x.chunk(2, dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
