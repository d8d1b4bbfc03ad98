"""Backbones: timm's architectures by name, and the arguments that rebuild them."""

from __future__ import annotations

import difflib
import warnings
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from models.config import ModelConfig

if TYPE_CHECKING:
    from jaxtyping import Float


def build_backbone(config: ModelConfig, *, drop_path_rate: float | None = None) -> nn.Module:
    """Returns a timm backbone without classifier whose `forward` gives the embedding [B, D].

    ViTs accept crops of any size (`dynamic_img_size`): position embeddings are interpolated to the crop's grid.

    Args:
        config: the backbone's options.
        drop_path_rate: overrides `config.drop_path_rate`; the teacher is built with 0.

    Raises:
        ValueError: unknown architecture, or an option that this architecture does not have.
    """
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"model.name is {config.name!r}; expected a timm architecture; set model.name{hint}")
    arguments = backbone_arguments(config)
    rate = config.drop_path_rate if drop_path_rate is None else drop_path_rate
    if rate > 0:
        arguments["drop_path_rate"] = rate
    try:
        backbone = timm.create_model(config.name, pretrained=False, num_classes=0, **arguments)
    except TypeError as error:
        raise ValueError(
            f"model.name is {config.name!r}, which refuses an option ({error}); "
            "expected options of that architecture; unset the option under model"
        ) from error
    if config.activation_checkpointing:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    return backbone


def backbone_arguments(config: ModelConfig) -> dict[str, Any]:
    """Returns the timm arguments that rebuild this backbone: what an export writes as `model_args`."""
    arguments: dict[str, Any] = {}
    if config.channels != 3:
        arguments["in_chans"] = config.channels
    if config.global_pool is not None:
        arguments["global_pool"] = config.global_pool
    if is_vit(config.name):
        arguments |= {"img_size": config.image_size, "dynamic_img_size": True}
        optional = {
            "patch_size": config.patch_size,
            "embed_dim": config.embed_dim,
            "depth": config.depth,
            "num_heads": config.num_heads,
            "init_values": config.init_values,
            "reg_tokens": config.num_registers,
        }
        arguments |= {name: value for name, value in optional.items() if value is not None}
    return arguments


def is_vit(name: str) -> bool:
    """Returns whether a timm name is a vision transformer (and takes ViT-only options)."""
    return name.startswith(("vit_", "deit_", "deit3_", "eva_", "eva02_"))


def embed_dim(backbone: nn.Module) -> int:
    """Returns D, the width of the embedding."""
    return int(backbone.num_features)  # type: ignore[arg-type]


def compile_blocks(backbone: nn.Module) -> None:
    """Compiles each transformer block's forward in place, for training: at most two graphs per crop size.

    The graphs differ only where a block has no drop path (the first of a schedule that starts at 0). Left alone, the
    rate of every block would be a constant of a graph of its own, and torch gives up after eight. So what the drop
    paths keep is drawn beside the graph, by the same calls in the same order as timm's: a compiled run sees the
    masks of an uncompiled one. Hooks of an engine stay outside of the graph, and in eval mode blocks run
    uncompiled: evaluation has other batch sizes, and each would be another graph.

    Raises:
        ValueError: the backbone has no `blocks`.
    """
    blocks = getattr(backbone, "blocks", None)
    if blocks is None:
        raise ValueError(
            "model.compile_blocks is true; expected a ViT with blocks; set model.compile_blocks=false"
        )
    for block in blocks:
        block.forward = _CompiledForward(block)


class _CompiledForward:
    """A block's forward, compiled where it trains, with the draws of its drop paths outside of the graph."""

    def __init__(self, block: nn.Module) -> None:
        self._block, self._plain = block, block.forward
        self._paths: list[_DrawnDropPath] = []
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, DropPath):
                    self._paths.append(_DrawnDropPath(child.drop_prob, child.scale_by_keep))
                    setattr(parent, name, self._paths[-1])
        self._compiled = torch.compile(block.forward, dynamic=False)

    def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if not self._block.training:
            return self._plain(x, *arguments, **options)
        for path in self._paths:
            path.draw(x)
        return self._compiled(x, *arguments, **options)


class _DrawnDropPath(nn.Module):
    """timm's DropPath in two parts: `draw` says which samples keep the branch, `forward` multiplies.

    branch_i * m_i / (1 - p), m_i ~ Bernoulli(1 - p) for each sample (Huang et al. 2016), the scale rounded to the
    branch's dtype once, as there. The rate is no constant of `forward`'s graph.
    """

    def __init__(self, drop_prob: float, scale_by_keep: bool) -> None:
        super().__init__()
        self._keep_prob = 1.0 - drop_prob
        self._divisor = self._keep_prob if scale_by_keep and self._keep_prob > 0 else 1.0
        self._scale: Tensor | None = None

    def draw(self, like: Float[Tensor, "B ..."]) -> None:
        """Draws this forward pass's scale of every sample of a batch like this one; changes the generator."""
        kept = torch.empty(len(like), device=like.device).bernoulli_(self._keep_prob)
        self._scale = kept.div_(self._divisor)

    def forward(self, branch: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """Returns the branch, scaled sample by sample; as it is in eval mode."""
        if not self.training:
            return branch
        assert self._scale is not None
        return branch * self._scale.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))


def initialise_from(backbone: nn.Module, source: str) -> dict[str, list[str]]:
    """Copies released weights into the backbone in place and returns which keys were `loaded` and `missing`.

    Position embeddings and patch kernels are resampled by timm where sizes differ. Nothing is skipped in silence:
    keys of the source that the backbone lacks are returned as `unexpected`.

    Args:
        backbone: a timm backbone.
        source: `timm:NAME` or `hf:NAME` (fetched from the hub by timm) or the path of an exported folder.

    Raises:
        ValueError: the source cannot be read or shares no tensor with the backbone.
    """
    if source.startswith("timm:"):
        name = source.removeprefix("timm:")
    elif source.startswith("hf:"):
        name = "hf-hub:" + source.removeprefix("hf:")
    else:
        name = f"local-dir:{source}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            donor = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:
        raise ValueError(
            f"model.init is {source!r}, which cannot be loaded ({type(error).__name__}: {error}); "
            "expected timm:NAME, hf:NAME or an exported folder; set model.init"
        ) from error
    own = backbone.state_dict()
    donor = _resample(donor, backbone)
    fitting = {key: value for key, value in donor.items() if key in own and own[key].shape == value.shape}
    if not fitting:
        raise ValueError(
            f"model.init is {source!r}, which shares no tensor with the backbone; set model.init"
        )
    with torch.no_grad():
        for key, value in fitting.items():
            own[key].copy_(value)
    return {
        "loaded": sorted(fitting),
        "missing": sorted(set(own) - set(fitting)),
        "unexpected": sorted(set(donor) - set(fitting)),
    }


def _resample(donor: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    if isinstance(backbone, VisionTransformer):
        return dict(checkpoint_filter_fn(donor, backbone))
    return donor
