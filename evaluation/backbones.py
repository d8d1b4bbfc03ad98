"""Adapters that turn timm's and transformers' models into named features and patch tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float

Features = dict[str, Tensor]


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
        """Returns the last block's patch tokens, or None for a network without a token grid."""


class TimmFeatures(FeatureModule):
    """A timm model without classifier.

    Args:
        model: built with `num_classes=0`.
        num_blocks: last blocks whose CLS token is kept.
    """

    def __init__(self, model: nn.Module, num_blocks: int = 1) -> None:
        super().__init__()
        self.model = model
        self.num_blocks = num_blocks

    def forward(self, images: Float[Tensor, "B C H W"]) -> Features:
        """Returns embedding, and CLS and patch mean for token models, patch mean alone for grids."""
        model: Any = self.model
        earlier: list[Tensor] = []
        if self.num_blocks > 1 and self._num_prefix_tokens > 0:
            tokens, blocks = model.forward_intermediates(
                images, indices=self.num_blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC"
            )
            earlier = [prefix[:, 0] for _, prefix in blocks[:-1]]
        else:
            tokens = model.forward_features(images)
        features = {"embedding": model.forward_head(tokens, pre_logits=True)}
        # Models that pool patches normalise after pooling, the others before: fc_norm is then an identity.
        normalise = getattr(model, "fc_norm", None) or nn.Identity()
        if tokens.ndim == 3:
            patches = tokens[:, self._num_prefix_tokens :]
            features["mean"] = normalise(patches.mean(dim=1))
            if self._num_prefix_tokens > 0:
                features["cls"] = torch.stack([normalise(cls) for cls in [*earlier, tokens[:, 0]]], dim=1)
        elif tokens.ndim == 4:
            features["mean"] = tokens.mean(dim=self._grid_axes)
        return features

    def patch_tokens(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"] | None:
        """Returns the last block's patch tokens, or the cells of the last grid."""
        tokens = self.model.forward_features(images)  # type: ignore[operator]
        if tokens.ndim == 3:
            return tokens[:, self._num_prefix_tokens :]
        if tokens.ndim == 4:
            return tokens.flatten(1, 2) if self._grid_axes == (1, 2) else tokens.flatten(2).transpose(1, 2)
        return None

    @property
    def _num_prefix_tokens(self) -> int:
        return int(getattr(self.model, "num_prefix_tokens", 0))

    @property
    def _grid_axes(self) -> tuple[int, int]:
        return (1, 2) if str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC") else (2, 3)


class TransformersFeatures(FeatureModule):
    """A vision model of transformers.

    Tokens before the patch grid are counted from the sequence's length; the first of them, if any, is CLS.
    The pooler is used only where there is no CLS token: several checkpoints carry an untrained one.

    Args:
        model: what `AutoModel.from_pretrained` returned; of a two-tower model the vision tower is taken.
        num_blocks: last blocks whose CLS token is kept.
    """

    def __init__(self, model: nn.Module, num_blocks: int = 1) -> None:
        super().__init__()
        self.model = getattr(model, "vision_model", model)
        self.num_blocks = num_blocks

    def forward(self, images: Float[Tensor, "B C H W"]) -> Features:
        """Returns embedding, and CLS and patch mean where the model has tokens."""
        output = self.model(pixel_values=images, output_hidden_states=self.num_blocks > 1)
        last = output.last_hidden_state
        if last.ndim == 4:
            mean = last.mean(dim=(2, 3))
            return {"embedding": mean, "mean": mean}
        prefix = self._num_prefix_tokens(images, last)
        mean = last[:, prefix:].mean(dim=1)
        if prefix == 0:
            pooled = getattr(output, "pooler_output", None)
            return {"embedding": mean if pooled is None else pooled, "mean": mean}
        earlier: list[Tensor] = []
        if self.num_blocks > 1:
            normalise = next(
                (
                    n
                    for n in (getattr(self.model, a, None) for a in ("layernorm", "norm", "post_layernorm"))
                    if n
                ),
                nn.Identity(),
            )
            earlier = [normalise(hidden[:, 0]) for hidden in output.hidden_states[-self.num_blocks : -1]]
        return {"embedding": last[:, 0], "cls": torch.stack([*earlier, last[:, 0]], dim=1), "mean": mean}

    def patch_tokens(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"] | None:
        """Returns the last block's patch tokens, or the cells of the last grid."""
        last = self.model(pixel_values=images).last_hidden_state
        if last.ndim == 4:
            return last.flatten(2).transpose(1, 2)
        return last[:, self._num_prefix_tokens(images, last) :]

    def _num_prefix_tokens(self, images: Tensor, tokens: Tensor) -> int:
        patch_size = getattr(self.model.config, "patch_size", None)
        if patch_size is None:
            return 0
        height, width = patch_size if isinstance(patch_size, list | tuple) else (patch_size, patch_size)
        return tokens.shape[1] - (images.shape[2] // height) * (images.shape[3] // width)


class PixelFeatures(FeatureModule):
    """The image itself, flattened: the control that any encoder should beat.

    Args:
        mean: that the preprocessing subtracted, one number or one per channel.
        std: that it divided by; both are undone, because cosines depend on where zero is.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Features:
        """Returns the pixels in 0..1 as `embedding`."""
        return {"embedding": (images * self.std.to(images) + self.mean.to(images)).flatten(1)}

    def patch_tokens(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"] | None:
        """Returns None: pixels have no tokens."""
        return None


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
