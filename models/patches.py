"""A ViT that gives its patch tokens beside the embedding, with patches hidden behind a mask token, or left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64


def give_patches(backbone: nn.Module) -> None:
    """Lets a ViT's forward give patch tokens as well when it is asked: `backbone(x, tokens=True, ...)`; in place.

    Without being asked it gives what it always gave. Names of parameters stay, and engines see one call of the whole
    backbone.

    Raises:
        ValueError: the backbone is no plain ViT of timm.
    """
    if not (
        isinstance(backbone, VisionTransformer)
        and type(backbone).forward_features is VisionTransformer.forward_features
    ):
        raise ValueError(
            f"objective.patch needs patch tokens, which {type(backbone).__name__} does not give in the way of timm's "
            "VisionTransformer; expected a plain ViT, such as vit_small_patch16_224; set model.name or "
            "objective.patch.name=none"
        )
    backbone.forward = _PatchForward(backbone)  # type: ignore[method-assign, assignment]


class _PatchForward:
    """A ViT's forward, step by step as timm's own `forward_features`, with a say in which patches it sees."""

    def __init__(self, backbone: VisionTransformer) -> None:
        self._backbone: Any = backbone
        self._plain = backbone.forward

    def __call__(
        self,
        images: Float[Tensor, "N C H W"],
        *,
        tokens: bool = False,
        hidden: Bool[Tensor, "N n"] | None = None,
        mask_token: Float[Tensor, " D"] | None = None,
        visible: Int64[Tensor, "N L"] | None = None,
    ) -> Float[Tensor, "N D"] | tuple[Float[Tensor, "N D"], Float[Tensor, "N L D"]]:
        """Returns the embedding, with `tokens` also the last block's patch tokens, normalised.

        Args:
            images: crops of one size.
            tokens: whether tokens are asked for.
            hidden: patches whose embedding becomes `mask_token`, before positions are added (iBOT, DINOv2).
            mask_token: learnable.
            visible: the patches that the blocks see, as many of each image (CAPI); tokens come in this order.
        """
        if not tokens:
            return self._plain(images)
        vit = self._backbone
        seen = vit.patch_embed(images)
        if hidden is not None:
            assert mask_token is not None
            seen = torch.where(hidden.view(seen.shape[:-1])[..., None], mask_token.to(seen.dtype), seen)
        seen = vit._pos_embed(seen)
        num_prefix = vit.num_prefix_tokens
        if visible is not None:
            index = visible[..., None].expand(-1, -1, seen.shape[-1])
            seen = torch.cat([seen[:, :num_prefix], seen[:, num_prefix:].gather(1, index)], dim=1)
        seen = vit.norm_pre(vit.patch_drop(seen))
        seen = checkpoint_seq(vit.blocks, seen) if vit.grad_checkpointing else vit.blocks(seen)
        seen = vit.norm(seen)
        return vit.forward_head(seen), vit.fc_norm(seen[:, num_prefix:])
