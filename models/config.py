"""What the encoder is: options of the backbone and of the projection head. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The projection head: an MLP from the embedding (D) to the projection (P).

    Attributes:
        num_layers: linear layers, at least 1.
        hidden_dim: width of the hidden layers.
        projection_dim: P, the dimension in which prototypes live.
        use_bn: BatchNorm after each hidden layer, as CARP's ResNet recipe has it; ViT recipes leave it out.
    """

    num_layers: int = 3
    hidden_dim: int = 2048
    projection_dim: int = 256
    use_bn: bool = False

    def __post_init__(self) -> None:
        """Refuses sizes that are no sizes."""
        for name in ("num_layers", "hidden_dim", "projection_dim"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"model.head.{name} is {getattr(self, name)}; expected at least 1; set model.head.{name}"
                )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone, by its timm name, and its head. `None` keeps timm's own value for that name.

    Attributes:
        name: a timm architecture, e.g. `vit_large_patch16_224`, `vit_so400m_patch14_siglip_224`, `resnet50`.
        image_size: side in pixels of the global crops, for which position embeddings are made.
        patch_size: side in pixels of a ViT's patch.
        embed_dim: D of a ViT.
        depth: number of a ViT's blocks.
        num_heads: attention heads of a ViT's block.
        channels: 3 for colour, 1 for grey images.
        init_values: LayerScale's initial value of a ViT.
        num_registers: register tokens of a ViT.
        global_pool: how tokens become the embedding: `token` (CLS), `avg` (patch mean) or timm's own.
        drop_path_rate: stochastic depth of the student; the teacher's is 0.
        activation_checkpointing: recompute the backbone's blocks in the backward pass.
        compile_blocks: `torch.compile` each block of a ViT (engines that gather parameters refuse it).
        init: `random`, or weights to start from: `timm:NAME`, `hf:NAME`, the path of an exported encoder folder, or
            of a run (or checkpoint), whose teacher is taken.
        init_head: take the projection head and the prototypes of the run that `init` names as well.
        head: the projection head.
    """

    name: str = "vit_small_patch16_224"
    image_size: int = 224
    patch_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    channels: int = 3
    init_values: float | None = None
    num_registers: int | None = None
    global_pool: str | None = None
    drop_path_rate: float = 0.0
    activation_checkpointing: bool = False
    compile_blocks: bool = False
    init: str = "random"
    init_head: bool = False
    head: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        """Refuses what no architecture accepts."""
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(
                f"model.drop_path_rate is {self.drop_path_rate}; expected 0 <= rate < 1; set model.drop_path_rate"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"model.channels is {self.channels}; expected 1 or 3; set model.channels")
        if self.image_size < 1:
            raise ValueError(
                f"model.image_size is {self.image_size}; expected at least 1; set model.image_size"
            )
        known = self.init == "random" or self.init.startswith(("timm:", "hf:")) or "/" in self.init
        if not known:
            raise ValueError(
                f"model.init is {self.init!r}; expected random, timm:NAME, hf:NAME or a folder's path; set model.init"
            )
        if self.init_head and not ("/" in self.init and not self.init.startswith(("timm:", "hf:"))):
            raise ValueError(
                f"model.init_head is True with model.init {self.init!r}; expected the path of a run; set model.init"
            )
