"""What the encoder is: options of the backbone and of the projection head. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

WeightsKind = Literal["random", "raw-pixels", "random-init", "timm", "hf", "local-dir", "file", "folder"]
# Kind to how it is written; what is neither a word nor behind one of these prefixes is a path.
_FORMS: dict[WeightsKind, str] = {
    "random": "random",
    "raw-pixels": "raw-pixels",
    "random-init": "random-init:RUN[:SEED]",
    "timm": "timm:NAME",
    "hf": "hf:NAME",
    "local-dir": "local-dir:PATH",
    "file": "a weights file PATH[#TENSOR]",
    "folder": "the path of a run, a checkpoint or an exported folder",
}
_WORDS: tuple[WeightsKind, ...] = ("random", "raw-pixels")
_PREFIXED: tuple[WeightsKind, ...] = ("random-init", "timm", "hf", "local-dir")
_FILE_ENDS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl", ".index.json")
_MAX_SEED = 2**32 - 1
_Side = Annotated[int, "[1, 1e4]"]


@dataclass(frozen=True)
class WeightsSpec:
    """Where weights come from, read from what a user wrote.

    Attributes:
        text: what was written.
        kind: which of the forms it has.
        name: the released model's name, or the path of the folder or file.
        tensor: of a file, the one that is named behind `#`.
        seed: of a fresh initialisation.
    """

    text: str
    kind: WeightsKind
    name: str
    tensor: str | None = None
    seed: int = 0

    @property
    def path(self) -> Path:
        """`name` as a path."""
        return Path(self.name)


def parse_weights_spec(text: str, option: str, kinds: Collection[WeightsKind]) -> WeightsSpec:
    """Returns what `text` names; looks at the disk only to tell a folder from a file.

    Args:
        text: as written.
        option: whose value it is.
        kinds: the forms that this option takes.

    Raises:
        ValueError: it has another form, or lacks a part of its own.
    """
    spec = _parse(text) if text else None
    if spec is None or spec.kind not in kinds:
        forms = ", ".join(form for kind, form in _FORMS.items() if kind in kinds)
        raise ValueError(f"{option} is {text!r}; expected {forms}; set {option}")
    return spec


def _parse(text: str) -> WeightsSpec | None:
    """Returns what a text names, or None where a prefix stands before nothing or a seed is none."""
    for word in _WORDS:
        if text == word:
            return WeightsSpec(text, word, word)
    prefix, _, name = text.partition(":")
    for kind in _PREFIXED:
        if prefix == kind:
            seed = 0
            if kind == "random-init" and ":" in name:
                name, _, digits = name.rpartition(":")
                seed = int(digits) if re.fullmatch("[0-9]{1,10}", digits) else -1
            return WeightsSpec(text, kind, name, seed=seed) if name and 0 <= seed <= _MAX_SEED else None
    path, mark, tensor = text.rpartition("#")
    try:
        is_folder, is_file = Path(text).is_dir(), Path(text).is_file()
    except OSError:  # no path can be that long
        is_folder = is_file = False
        if not mark:
            return None
    if mark and not (is_folder or is_file):
        return WeightsSpec(text, "file", path, tensor or None)
    is_file = is_file or (text.endswith(_FILE_ENDS) and not is_folder)
    return WeightsSpec(text, "file" if is_file else "folder", text)


INIT_KINDS: tuple[WeightsKind, ...] = ("random", "timm", "hf", "local-dir", "folder")


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
    normalize_bottleneck: bool = False
    """Projections of unit length, as DINO's head ends before its last layer; CARP's length is learned."""


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """The student's predictor of patches that it did not see (CAPI)."""

    depth: Annotated[int, "[1, 1000]"] = 12
    """Layers of cross-attention."""
    num_heads: Annotated[int, "[1, 1e4]"] = 12
    """Attention heads; four times as many divide the encoder's width."""
    drop_path_rate: Annotated[float, "[0, 1)"] = 0.0
    """Stochastic depth of every layer (CAPI: .2)."""


@dataclass(frozen=True, kw_only=True)
class OutputsConfig:
    """What the objective asks of the networks; no option, it follows from those of the objective."""

    projections: bool = True
    """Projections of all crops, for a term on views."""
    embeddings: bool = False
    """The embeddings of the first group of crops, for what regularises features."""
    patches: Literal["none", "hidden", "left_out"] = "none"
    """Projections of patches of the first group, for a term on patches, some of which the student does not see: they
    are hidden behind a mask token (iBOT), or left out and predicted (CAPI).
    """


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone, by its timm name, and its head. `None` keeps timm's own value for that name."""

    name: str = "vit_small_patch16_224"
    """A timm architecture, e.g. `vit_large_patch16_224`, `vit_so400m_patch14_siglip_224`, `resnet50`."""
    image_size: _Side | Annotated[tuple[_Side, _Side], "[height, width]"] = 224
    """Side in pixels of the global crops, or their height and width, for which position embeddings are made."""
    patch_size: Annotated[int, "[1, 1e4]"] | None = None
    """Side in pixels of a ViT's patch, or of a ConvNeXt's stem."""
    embed_dim: Annotated[int, "[1, 1e6]"] | None = None
    """D, the width of a ViT."""
    depth: Annotated[int, "[1, 1000]"] | None = None
    """Number of a ViT's blocks."""
    num_heads: Annotated[int, "[1, 1e4]"] | None = None
    """Attention heads of a ViT's block."""
    channels: Annotated[int, "[1, 1e4]"] = 3
    """Channels of the images: 3 for colour, 1 for grey, others for spectra and stains; RGB weights are adapted."""
    init_values: Annotated[float, "[0, 10]"] | None = None
    """LayerScale's initial value of a ViT."""
    num_registers: Annotated[int, "[0, 1000]"] | None = None
    """Register tokens of a ViT."""
    output_stride: Literal[8, 16, 32] | None = None
    """Pixels per cell of a convolutional network's last map, by dilation: 8 keeps 4 x 4 cells of a 32-pixel image."""
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
    patch_head: HeadConfig | None = None
    """A head of its own for the term on patches, with the options of `head`; null: `head` projects both."""
    predictor: PredictorConfig = field(default_factory=PredictorConfig)

    @property
    def height_and_width(self) -> tuple[int, int]:
        """Of the global crops."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    def __post_init__(self) -> None:
        """Refuses an origin of weights that is none."""
        spec = parse_weights_spec(self.init, "model.init", INIT_KINDS)
        is_path = spec.kind == "folder" and "/" in spec.name
        if spec.kind == "folder" and not is_path:  # a misspelt word
            raise ValueError(
                f"model.init is {self.init!r}; expected random, timm:NAME, hf:NAME or a folder's path (./{self.init} "
                "where it is one); set model.init"
            )
        if self.init_head and not is_path:
            raise ValueError(
                f"model.init_head is True with model.init {self.init!r}; expected the path of a run; set model.init"
            )
