"""Adapters that turn networks into named features and patch tokens: the interface, and timm's networks behind it."""

from __future__ import annotations

from abc import abstractmethod
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evaluation.encoders.exported import EncoderError

if TYPE_CHECKING:
    from jaxtyping import Float

Features = dict[str, Tensor]
# What timm's models call the tokens that they put before the patches.
_PREFIX_PARAMETERS = {"cls_token", "dist_token", "reg_token"}


class FeatureModule(nn.Module):
    """Images to features: `embedding` always; `cls` [B, blocks, D] and `mean` [B, D] where the network has them.

    `embedding` is what the encoder itself hands on (its own pooling), `cls` the CLS token after each of the last
    blocks (newest last), `mean` the average of the patch tokens of the last block.
    """

    @abstractmethod
    def forward(self, images: Float[Tensor, "B C H W"]) -> Features:
        """Returns the features of a batch, in the autocast type of the caller."""

    @abstractmethod
    def patch_tokens(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"] | None:
        """Returns the last block's patch tokens, or None for a network without a token grid.

        As the network hands them on; of ours behind the norm that they pass before a head in training.
        """

    def with_patches(
        self, images: Float[Tensor, "B C H W"]
    ) -> tuple[Features, Float[Tensor, "B N D"] | None]:
        """Returns what `forward` and `patch_tokens` return; networks of which both are asked pass once."""
        return self(images), self.patch_tokens(images)


class TimmFeatures(FeatureModule):
    """A timm model without classifier: `embedding` is its own `forward_head`.

    Tokens before the patches are those that the model declares (`num_prefix_tokens`); one that keeps such tokens and
    does not say how many (CaiT's relatives VOLO and PiT), or that hands on several sequences, gives no patches.

    Args:
        model: built with `num_classes=0`.
        num_blocks: last blocks whose CLS token is kept.
        is_ours: whether it is a network of this project, whose heads see patch tokens behind `fc_norm`. Models that
            pool patches have their last norm there, behind the pooling; elsewhere no token ever passed it by itself.

    Raises:
        EncoderError: several blocks are asked for, and the model hands on the CLS token of the last alone.
    """

    def __init__(self, model: nn.Module, num_blocks: int = 1, *, is_ours: bool = False) -> None:
        super().__init__()
        self.model: Any = model
        self.num_blocks = num_blocks
        self.is_ours = is_ours
        prefixes = {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters()} & _PREFIX_PARAMETERS
        declared = getattr(model, "num_prefix_tokens", None)
        self._num_prefix_tokens = 0 if declared is None and not prefixes else declared
        # With registers and no CLS token, the first token is a register.
        self._has_class_token = bool(self._num_prefix_tokens) and "cls_token" in prefixes
        if num_blocks > 1 and self._has_class_token:
            depth = len(getattr(model, "blocks", ()))
            if 0 < depth < num_blocks:
                raise EncoderError(
                    f"features.num_blocks is {num_blocks}; expected at most {depth}, the encoder's blocks; set "
                    "features.num_blocks"
                )
            intermediates = getattr(model, "forward_intermediates", None)
            if intermediates is None or "return_prefix_tokens" not in signature(intermediates).parameters:
                raise EncoderError(
                    f"features.num_blocks is {num_blocks}; expected 1 for {type(model).__name__}, which hands on the "
                    "CLS token of its last block alone; set features.num_blocks"
                )

    def forward(self, images: Float[Tensor, "B C H W"]) -> Features:
        """Returns embedding, and CLS and patch mean for token models, patch mean alone for grids."""
        return self.with_patches(images)[0]

    def with_patches(
        self, images: Float[Tensor, "B C H W"]
    ) -> tuple[Features, Float[Tensor, "B N D"] | None]:
        """Returns features and patch tokens of one pass."""
        earlier: list[Tensor] = []
        if self.num_blocks > 1 and self._has_class_token:
            tokens, blocks = self.model.forward_intermediates(
                images, indices=self.num_blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC"
            )
            earlier = [prefix[:, 0] for _, prefix in blocks[:-1]]
        else:
            tokens = self.model.forward_features(images)
        features = {"embedding": self.model.forward_head(tokens, pre_logits=True)}
        patches = self._patches(tokens)
        if patches is None:
            return features, None
        if tokens.ndim == 4:
            return {**features, "mean": patches.mean(dim=1)}, patches
        # Models that pool patches normalise after pooling, the others before: fc_norm is then an identity.
        features["mean"] = self._normalise(patches.mean(dim=1))
        if self._has_class_token:
            features["cls"] = torch.stack([self._normalise(cls) for cls in [*earlier, tokens[:, 0]]], dim=1)
        return features, self._normalise(patches) if self.is_ours else patches

    def patch_tokens(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"] | None:
        """Returns the last block's patch tokens, or the cells of the last grid."""
        tokens = self.model.forward_features(images)
        patches = self._patches(tokens)
        if patches is None or tokens.ndim == 4 or not self.is_ours:
            return patches
        return self._normalise(patches)

    def _normalise(self, tokens: Tensor) -> Tensor:
        norm = getattr(self.model, "fc_norm", None)
        return tokens if norm is None else norm(tokens)

    def _patches(self, tokens: Any) -> Float[Tensor, "B N D"] | None:
        if not isinstance(tokens, Tensor) or tokens.ndim not in (3, 4):
            return None
        if tokens.ndim == 4:
            last = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")
            return tokens.flatten(1, 2) if last else tokens.flatten(2).transpose(1, 2)
        return None if self._num_prefix_tokens is None else tokens[:, self._num_prefix_tokens :]


class NoFeatures(FeatureModule):
    """Of a weights file that is audited for its prototypes alone: there is no network to ask."""

    def forward(self, images: Float[Tensor, "B C H W"]) -> Features:
        """Raises ValueError: a weights file sees no images."""
        raise ValueError(
            "encoder is a weights file, which gives no features; expected probes=[prototypes] alone; set probes, "
            "or set encoder to a network and prototypes.weights to the file"
        )

    def patch_tokens(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"] | None:
        """Returns None."""
        return None
