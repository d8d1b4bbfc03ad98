"""What is evaluated and how: every option of `evaluate.py`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from data.config import require_one_source
from data.views.config import PixelType
from evaluation.probes.config import (
    AttentiveConfig,
    ClusteringConfig,
    ConfidenceConfig,
    FewShotConfig,
    FineTuneConfig,
    KnnConfig,
    LinearConfig,
    LogisticConfig,
    LongTailConfig,
    PrototypeAuditConfig,
    SegmentationConfig,
    SegmentationLinearConfig,
    refuse_unless,
)
from models.config import WeightsKind, parse_weights_spec

_Side = Annotated[int, "[1, 1e4]"]

PROBES = (
    "prototypes",
    "knn",
    "linear",
    "logistic",
    "few_shot",
    "clustering",
    "long_tail",
    "fine_tune",
    "attentive",
    "segmentation",
    "segmentation_linear",
)
CONTROLS = ("random-init", "raw-pixels")
ENCODER_KINDS: tuple[WeightsKind, ...] = (
    "folder",
    "timm",
    "hf",
    "local-dir",
    "random-init",
    "raw-pixels",
    "file",
)


@dataclass(frozen=True, kw_only=True)
class EvaluationDataConfig:
    """The labelled images."""

    images: str | None = None
    """Folder of images, with `shards` null: with folders of classes in `train` and `test` (or what the splits are
    called). They are written as shards into `cache_dir` once, and again when the folder has changed.
    """
    cache_dir: str = "datasets/cache"
    """Where shards of `images` are kept."""
    shards: str | None = None
    """Directory of the shards of both splits, `manifest.json` beside them; with `images` null."""
    train_split: str = "train"
    """The bank of k-NN and what classifiers are fitted on."""
    test_split: str = "test"
    """What is scored; never used to choose anything."""
    test_shards: str | None = None
    """Directory of the test split's shards, or null for `shards`."""
    max_train_images: Annotated[int, "[1, 1e9]"] | None = None
    """Fixed subset of the training split (its first images: shards are shuffled when written), or null for
    all.
    """
    max_test_images: Annotated[int, "[1, 1e9]"] | None = None
    """Fixed subset of the test split, or null for all."""
    batch_size: Annotated[int, "[1, 1e6]"] = 256
    """Images of one forward pass on one process."""
    num_workers: Annotated[int, "[0, 1024]"] = 2
    """Decoding processes on each process."""

    def __post_init__(self) -> None:
        """Raises ValueError, one line, for images in two places; an audit of prototypes alone needs none."""
        require_one_source(images=self.images, shards=self.shards, test_shards=self.test_shards)


@dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """Overrides of the encoder's own preprocessing; null keeps what the encoder declares."""

    image_size: _Side | Annotated[tuple[_Side, _Side], "[height, width]"] | None = None
    """Side in pixels of the square that the encoder sees, or height and width."""
    channels: Annotated[int, "[1, 1e4]"] | None = None
    """Channels of the images, where the encoder declares none (`raw-pixels` alone: 3)."""
    pixels: PixelType | None = None
    """Type of the images' numbers, as `data.pixels` in training, where the encoder declares none (then `uint8`)."""
    crop_fraction: Annotated[float, "(0, 1]"] | None = None
    """`image_size` / side to which the shorter edge is resized first, 0 < fraction <= 1."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] | None = None
    """How images are resized."""
    mean: tuple[Annotated[float, "[-1e9, 1e9]"], ...] | None = None
    """Mean of each channel, of images scaled to 0..1 (of `float32` as they are)."""
    std: tuple[Annotated[float, "[1e-6, 1e9]"], ...] | None = None
    """Standard deviation of each channel."""

    def __post_init__(self) -> None:
        """Refuses a standard deviation of no channel, and a mean of bytes that are not divided."""
        refuse_unless(
            self.std is None or bool(self.std), "transform.std", self.std, "positive numbers or null"
        )
        scaled = self.pixels == "float32" or all(0 <= value <= 1 for value in self.mean or ())
        refuse_unless(scaled, "transform.mean", self.mean, "numbers in [0, 1], or transform.pixels float32")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """One extraction for every probe."""

    cache_dir: str = "outputs/features"
    """Where features are kept, under a key of weights, transform and manifest."""
    reuse: bool = True
    """Read the cache where it holds this key; false extracts anew."""
    num_blocks: Annotated[int, "[1, 1000]"] = 1
    """Last blocks whose CLS token is kept for the feature `blocks` (1 keeps the last only)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward pass; pooled features are stored in fp32 either way."""
    patch_precision: Literal["fp16", "fp32"] = "fp16"
    """Type in which patch tokens are stored: of 224 x 224 pixels and 16-pixel patches they are 196 times the pooled
    features.
    """


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Everything that `evaluate.py` reads from a YAML file and its overrides."""

    encoder: str
    """What is evaluated: a run directory (its newest complete checkpoint), a checkpoint, an exported folder,
    `timm:NAME`, `hf:NAME` or `hf:PATH`, `local-dir:PATH`, `random-init:RUN[:SEED]`, `raw-pixels`, or for the
    prototype audit alone a weights file `PATH` or `PATH#TENSOR`.
    """
    role: Literal["teacher", "student"] = "teacher"
    """The teacher (default) or the student, where a checkpoint exports both."""
    probes: tuple[str, ...] = ("prototypes", "knn")
    """What is measured: any of `prototypes`, `knn`, `linear`, `logistic`, `few_shot`, `clustering`, `long_tail`,
    `fine_tune`, `attentive`, and of images with label maps `segmentation` and
    `segmentation_linear`.
    """
    controls: tuple[str, ...] = ()
    """Encoders that are measured beside it, by k-NN or, where that is asked for, by `segmentation`: `random-init`
    (the same architecture with fresh weights, `control_seeds` of them) and `raw-pixels`.
    """
    control_seeds: Annotated[int, "[1, 100]"] = 3
    """Fresh initialisations of the control."""
    control_max_gib: Annotated[float, "(0, 1e6]"] = 4.0
    """Largest size of `raw-pixels` as features of both splits; above it that control is left out."""
    output_dir: str | None = None
    """Where results go; null means `results/` of the run, else `outputs/evaluations/LABEL/results`."""
    seed: Annotated[int, "[0, 4294967295]"] = 0
    """Seed of held-out parts, draws, k-means and bootstrap."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` (CUDA where there is one), `cpu` or `cuda`."""
    data: EvaluationDataConfig = field(default_factory=EvaluationDataConfig)
    transform: TransformConfig = field(default_factory=TransformConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    prototypes: PrototypeAuditConfig = field(default_factory=PrototypeAuditConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)
    logistic: LogisticConfig = field(default_factory=LogisticConfig)
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    long_tail: LongTailConfig = field(default_factory=LongTailConfig)
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)
    attentive: AttentiveConfig = field(default_factory=AttentiveConfig)
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    segmentation_linear: SegmentationLinearConfig = field(default_factory=SegmentationLinearConfig)
    confidence: ConfidenceConfig = field(default_factory=ConfidenceConfig)

    def __post_init__(self) -> None:
        """Refuses probes and controls that do not exist."""
        parse_weights_spec(self.encoder, "encoder", ENCODER_KINDS)
        refuse_unless(bool(self.probes or self.controls), "probes", "[]", "at least one, or controls")
        for name in self.probes:
            refuse_unless(
                name in PROBES, "probes", f"[{', '.join(self.probes)}]", f"names among {', '.join(PROBES)}"
            )
        for name in self.controls:
            refuse_unless(
                name in CONTROLS,
                "controls",
                f"[{', '.join(self.controls)}]",
                f"names among {', '.join(CONTROLS)}",
            )
