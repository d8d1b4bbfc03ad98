"""Backbones: timm's architectures by name, and the arguments that rebuild them."""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import replace
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

    ViTs accept crops of any size (`dynamic_img_size`): position embeddings are interpolated to the crop's grid. Other
    networks compute with channels last.

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
    except Exception as error:
        # An unknown option is a TypeError, a width that heads do not divide an assertion.
        unknown = re.search("unexpected keyword argument '([a-z_]+)'", str(error))
        shape = _shape_arguments(config)
        if unknown and unknown[1] in shape:
            option = "model.num_registers" if unknown[1] == "reg_tokens" else f"model.{unknown[1]}"
            raise ValueError(
                f"{option} is {shape[unknown[1]]} with {config.name}; expected null, as that architecture has no such "
                f"option; set {option}=null"
            ) from error
        raise ValueError(
            f"model.name is {config.name!r}, which refuses an option ({_one_line(error)}); "
            "expected options of that architecture; set the options under model"
        ) from error
    if config.activation_checkpointing:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    if not is_vit(config.name):  # convolutions, pooling and BatchNorm are faster with channels last
        backbone.register_forward_pre_hook(_put_channels_last)
    return backbone


def _put_channels_last(_: nn.Module, images: tuple[Float[Tensor, "B C H W"]]) -> tuple[Tensor]:
    return (images[0].contiguous(memory_format=torch.channels_last),)


def backbone_arguments(config: ModelConfig) -> dict[str, Any]:
    """Returns the timm arguments that rebuild this backbone: what an export writes as `model_args`."""
    arguments: dict[str, Any] = {}
    if config.channels != 3:
        arguments["in_chans"] = config.channels
    if config.global_pool is not None:
        arguments["global_pool"] = config.global_pool
    if is_vit(config.name):
        arguments |= {"img_size": config.image_size, "dynamic_img_size": True}
    return arguments | _shape_arguments(config)


def _shape_arguments(config: ModelConfig) -> dict[str, Any]:
    """Returns the timm arguments of the options that are set; null leaves timm's own value for the name."""
    shape = {
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "init_values": config.init_values,
        "reg_tokens": config.num_registers,
        "output_stride": config.output_stride,
    }
    return {argument: value for argument, value in shape.items() if value is not None}


def is_vit(name: str) -> bool:
    """Returns whether a timm name is a vision transformer (and takes ViT-only options)."""
    return name.startswith(("vit_", "deit_", "deit3_", "eva_", "eva02_"))


class ImageSizeError(ValueError):
    """A network that cannot take images of some size; the message is the network's reason, one line."""


@functools.cache
def measure_embed_dim(config: ModelConfig, size: tuple[int, int] | None = None) -> int:
    """Returns D, the width of the embedding, measured by a forward pass without numbers (meta device).

    Where a network computes with numbers, which the meta device lacks, the pass is a real one on the CPU. Draws
    nothing from the generators of the process. Not collective.

    Args:
        config: the backbone's options.
        size: height and width of the images of the pass; None for the backbone's own.

    Raises:
        ImageSizeError: the network cannot take images of this size.
        ValueError: the network cannot be built, or gives no embedding.
    """
    try:
        embedding = _embed_two_images(config, size, "meta")
    except Exception as error:
        if not _is_for_want_of_numbers(error):
            raise
        embedding = _embed_two_images(config, size, "cpu")
    if embedding.ndim != 2:
        raise ValueError(
            f"model.global_pool is {config.global_pool!r}, with which {config.name} gives {embedding.ndim - 1} axes "
            "per image; expected a pooling that gives one embedding; set model.global_pool"
        )
    return int(embedding.shape[1])


def _embed_two_images(config: ModelConfig, size: tuple[int, int] | None, device: str) -> Tensor:
    plain = replace(config, activation_checkpointing=False)
    # Not one image: BatchNorm refuses a batch of one value.
    shape = (2, config.channels, *(size or config.height_and_width))
    with torch.random.fork_rng(devices=[]), torch.device(device), torch.no_grad():
        backbone = build_backbone(plain, drop_path_rate=0.0)
        try:
            embedding: Tensor = backbone(torch.zeros(shape))
        except Exception as error:
            if device == "meta" and _is_for_want_of_numbers(error):
                raise
            raise ImageSizeError(_one_line(error)) from error
    return embedding


def _is_for_want_of_numbers(error: BaseException | None) -> bool:
    """Whether an error says that a meta tensor was asked for its numbers; also as another error's cause."""
    if error is None:
        return False
    lacks = isinstance(error, NotImplementedError) or "meta" in str(error).lower()
    return lacks or _is_for_want_of_numbers(error.__cause__)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def compile_blocks(backbone: nn.Module) -> None:
    """Compiles each transformer block's forward in place, for training: at most two graphs per crop size.

    The graphs differ only where a block has no drop path (the first of a schedule that starts at 0). Left alone, the
    rate of every block would be a constant of a graph of its own, and torch gives up after eight. So what the drop
    paths keep is drawn beside the graph, by the same calls in the same order as timm's: a compiled run sees the
    masks of an uncompiled one. Hooks of an engine stay outside of the graph, and in eval mode blocks run
    uncompiled: evaluation has other batch sizes, and each would be another graph. A training pass under no_grad
    runs what a pass with gradients compiles, so that accumulation's two passes give the same bits.

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


def has_compiled_blocks(network: nn.Module) -> bool:
    """Returns whether `compile_blocks` was applied to a part of the network."""
    return any(isinstance(vars(module).get("forward"), _CompiledForward) for module in network.modules())


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
        if torch.is_grad_enabled() or not any(p.requires_grad for p in self._block.parameters()):
            return self._compiled(x, *arguments, **options)
        # A pass without a graph would compile everything once more: it takes the trained graph, a block at a time.
        with torch.enable_grad():
            return self._compiled(x.detach().requires_grad_(), *arguments, **options).detach()


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
