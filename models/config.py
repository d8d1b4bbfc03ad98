"""What the encoder is: options of the backbone and of the projection head. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The projection head: an MLP from the embedding (D) to the projection (P)."""

    num_layers: Annotated[int, "[1, 100]"] = 3
    """Linear layers, at least 1."""
    hidden_dim: Annotated[int, "[1, 1e6]"] = 2048
    """Width of the hidden layers."""
    projection_dim: Annotated[int, "[1, 1e6]"] = 256
    """P, the dimension in which prototypes live."""
    use_bn: bool = False
    """BatchNorm after each hidden layer, as CARP's ResNet recipe has it; ViT recipes leave it out."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone, by its timm name, and its head. `None` keeps timm's own value for that name."""

    name: str = "vit_small_patch16_224"
    """A timm architecture, e.g. `vit_large_patch16_224`, `vit_so400m_patch14_siglip_224`, `resnet50`."""
    image_size: Annotated[int, "[1, 1e4]"] = 224
    """Side in pixels of the global crops, for which position embeddings are made."""
    patch_size: Annotated[int, "[1, 1e4]"] | None = None
    """Side in pixels of a ViT's patch."""
    embed_dim: Annotated[int, "[1, 1e6]"] | None = None
    """D, the width of a ViT."""
    depth: Annotated[int, "[1, 1000]"] | None = None
    """Number of a ViT's blocks."""
    num_heads: Annotated[int, "[1, 1e4]"] | None = None
    """Attention heads of a ViT's block."""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey images."""
    init_values: Annotated[float, "[0, 10]"] | None = None
    """LayerScale's initial value of a ViT."""
    num_registers: Annotated[int, "[0, 1000]"] | None = None
    """Register tokens of a ViT."""
    global_pool: str | None = None
    """How tokens become the embedding: `token` (CLS), `avg` (patch mean) or timm's own."""
    drop_path_rate: Annotated[float, "[0, 1)"] = 0.0
    """Stochastic depth of the student; the teacher's is 0."""
    activation_checkpointing: bool = False
    """Recompute the backbone's blocks in the backward pass."""
    compile_blocks: bool = False
    """`torch.compile` each block of a ViT (engines that gather parameters refuse it)."""
    init: str = "random"
    """`random`, or weights to start from: `timm:NAME`, `hf:NAME`, the path of an exported encoder folder, or
    of a run (or checkpoint), whose teacher is taken.
    """
    init_head: bool = False
    """Take the projection head and the prototypes of the run that `init` names as well."""
    head: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        """Refuses an origin of weights that is none."""
        known = self.init == "random" or self.init.startswith(("timm:", "hf:")) or "/" in self.init
        if not known:
            raise ValueError(
                f"model.init is {self.init!r}; expected random, timm:NAME, hf:NAME or a folder's path; set model.init"
            )
        if self.init_head and not ("/" in self.init and not self.init.startswith(("timm:", "hf:"))):
            raise ValueError(
                f"model.init_head is True with model.init {self.init!r}; expected the path of a run; set model.init"
            )
