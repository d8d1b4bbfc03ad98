"""Options of the single probes, with their sources and units. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

FEATURES = ("embedding", "cls", "mean", "both", "blocks", "blocks_mean")
FINE_TUNE_FEATURES = ("embedding", "cls", "mean", "both")


def refuse_unless(holds: bool, what: str, value: Any, rule: str) -> None:
    """Raises the one-line ValueError of an option `what` unless `holds`."""
    if not holds:
        raise ValueError(f"{what} is {value}; expected {rule}; set {what}")


def _refuse_unknown_features(names: tuple[str, ...], key: str) -> None:
    refuse_unless(len(names) > 0, key, list(names), f"at least one of {', '.join(FEATURES)}")
    for name in names:
        refuse_unless(name in FEATURES, key, f"[{', '.join(names)}]", f"names among {', '.join(FEATURES)}")


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Weighted k nearest neighbours on L2-normalised features (Wu et al. 2018; CARP's and DINO's evaluation)."""

    k: tuple[Annotated[int, "[1, 1e6]"], ...] = (10, 20, 100, 200)
    """Numbers of neighbours; the headline is 20 where it is among them."""
    temperature: Annotated[float, "[1e-4, 100]"] = 0.07
    """T of the vote's weight exp(similarity / T)."""
    features: tuple[str, ...] = ("embedding",)
    """Features to try; every one is reported."""

    def __post_init__(self) -> None:
        """Refuses no neighbour and unknown features."""
        refuse_unless(bool(self.k), "knn.k", list(self.k), "at least one number")
        _refuse_unknown_features(self.features, "knn.features")


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Linear probe: a grid of learning rates x features, trained by SGD at once (DINOv2's protocol).

    DINOv2 takes 12,500 steps of 1,024 images whatever the set; ten passes over ImageNet are as many. Training starts
    with `epochs` passes and doubles until `min_steps`; it stops before where doubling lowers the smallest
    cross-entropy on the held-out part by less than 1 %. Every length has its own cosine to 0; what was taken is said.
    """

    learning_rates: tuple[Annotated[float, "(0, 1e4]"], ...] = (
        1e-4,
        2e-4,
        5e-4,
        1e-3,
        2e-3,
        5e-3,
        0.01,
        0.02,
        0.05,
        0.1,
        0.2,
        0.5,
        1.0,
    )
    """Learning rates per 256 images of batch; each trains its own classifier beside the others."""
    features: tuple[str, ...] = ("embedding",)
    """Features to try."""
    epochs: Annotated[int, "[1, 1e6]"] = 10
    """Passes over the cached training features, at least."""
    min_steps: Annotated[int, "[0, 1e7]"] = 12_500
    """Optimizer steps, at least, unless the held-out part says that they change nothing."""
    batch_size: Annotated[int, "[1, 1e7]"] = 1024
    """Images per step."""
    momentum: Annotated[float, "[0, 1)"] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, "[0, 10]"] = 0.0
    """Weight decay of SGD."""
    held_out: Annotated[float, "(0, 1)"] = 0.1
    """Share of the training split on which learning rate and feature are chosen."""

    def __post_init__(self) -> None:
        """Refuses an empty grid and unknown features."""
        refuse_unless(bool(self.learning_rates), "linear.learning_rates", "[]", "at least one number")
        _refuse_unknown_features(self.features, "linear.features")


@dataclass(frozen=True, kw_only=True)
class LogisticConfig:
    """L2-regularised multinomial logistic regression by L-BFGS on L2-normalised features."""

    inverse_regularisation: tuple[Annotated[float, "[1e-9, 1e9]"], ...] = (0.1, 1.0, 10.0, 100.0, 1000.0)
    """scikit-learn's C: the loss is C * sum of cross-entropies + |W|^2 / 2 (no penalty on the bias). The best
    on the held-out part is refitted on the whole training split.
    """
    feature: str = "embedding"
    """The feature that it reads, one of those that `knn.features` may name."""
    max_iterations: Annotated[int, "[1, 1e6]"] = 1000
    """Largest number of iterations of L-BFGS."""
    held_out: Annotated[float, "(0, 1)"] = 0.1
    """Share of the training split on which C is chosen."""

    def __post_init__(self) -> None:
        """Refuses an empty grid and unknown features."""
        values = self.inverse_regularisation
        refuse_unless(bool(values), "logistic.inverse_regularisation", "[]", "at least one number")
        _refuse_unknown_features((self.feature,), "logistic.feature")


@dataclass(frozen=True, kw_only=True)
class FewShotConfig:
    """Logistic regression on a few labelled images per class, over several draws."""

    shots: tuple[Annotated[int, "[1, 1e6]"], ...] = (1, 5, 10)
    """Labelled images per class."""
    draws: Annotated[int, "[1, 1e4]"] = 5
    """Random draws per number of shots; mean and standard deviation are reported."""
    inverse_regularisation: Annotated[float, "[1e-9, 1e9]"] = 10.0
    """C of the logistic regression, fixed: there is nothing to choose it on."""
    feature: str = "embedding"
    """The feature that it reads, one of those that `knn.features` may name."""

    def __post_init__(self) -> None:
        """Refuses no shot and an unknown feature."""
        refuse_unless(bool(self.shots), "few_shot.shots", "[]", "at least one number")
        _refuse_unknown_features((self.feature,), "few_shot.feature")


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """Fine-tuning of the whole network by a short recipe: AdamW, layer-wise decay, crops and flips, cosine."""

    feature: str = "embedding"
    """What the classifier reads: `embedding`, `cls`, `mean` or `both`."""
    epochs: Annotated[int, "[1, 1e6]"] = 5
    """Passes over the training split."""
    batch_size: Annotated[int, "[1, 1e6]"] = 256
    """Images per step."""
    lr: Annotated[float, "(0, 100]"] = 1e-3
    """Learning rate of the classifier and the last block, per 256 images of batch."""
    layer_decay: Annotated[float, "(0, 1]"] = 0.75
    """Factor on the learning rate from one block to the one before it (BEiT, Bao et al. 2022)."""
    weight_decay: Annotated[float, "[0, 10]"] = 0.05
    """Weight decay of AdamW; not on biases, norms and embeddings."""
    warmup: Annotated[float, "[0, 1)"] = 0.1
    """Share of the steps over which the rate rises."""
    label_smoothing: Annotated[float, "[0, 1)"] = 0.1
    """Label smoothing of the cross-entropy."""
    crop_scale_min: Annotated[float, "(0, 1]"] = 0.5
    """Smallest share of an image's area that a training crop shows; 1 shows it whole."""
    flip: bool = True
    """Mirror half of the training images."""
    shuffle_buffer: Annotated[int, "[1, 1e7]"] = 2048
    """Images among which the next one is drawn (shards are mixed when written)."""

    def __post_init__(self) -> None:
        """Refuses a feature that has no gradient."""
        refuse_unless(
            self.feature in FINE_TUNE_FEATURES,
            "fine_tune.feature",
            repr(self.feature),
            f"one of {', '.join(FINE_TUNE_FEATURES)}",
        )


@dataclass(frozen=True, kw_only=True)
class ClusteringConfig:
    """k-means on features, and the assignment to the prototypes where projections can be computed."""

    num_clusters: Annotated[int, "[2, 1e7]"] | None = None
    """Clusters of k-means, or null for the number of classes."""
    restarts: Annotated[int, "[1, 1e4]"] = 5
    """k-means++ starts; the one of smallest inertia is reported."""
    max_iterations: Annotated[int, "[1, 1e6]"] = 100
    """Largest number of iterations of Lloyd's algorithm."""
    feature: str = "embedding"
    """The feature that it reads, one of those that `knn.features` may name."""

    def __post_init__(self) -> None:
        """Refuses an unknown feature."""
        _refuse_unknown_features((self.feature,), "clustering.feature")


@dataclass(frozen=True, kw_only=True)
class LongTailConfig:
    """Accuracy by how often a class was seen in training."""

    classifier: Literal["knn", "linear", "logistic"] = "knn"
    """Whose predictions are split: `knn` (headline k and feature), `linear` or `logistic`."""
    few_at_most: Annotated[int, "[0, 1e9]"] = 20
    """A class of at most so many training images is tail."""
    many_above: Annotated[int, "[0, 1e9]"] = 100
    """A class of more training images than this is head; between the two is medium. 20 and 100 are the
    iNaturalist rule (Liu et al. 2019).
    """
    imbalance_ratio: Annotated[float, "[1, 1e9]"] | None = None
    """Thins the training split to an exponential class profile whose largest class is this many times the
    smallest (Cui et al. 2019), or null for the split as it is.
    """

    def __post_init__(self) -> None:
        """Refuses thresholds in the wrong order."""
        refuse_unless(
            self.many_above >= self.few_at_most,
            "long_tail.many_above",
            self.many_above,
            "at least few_at_most",
        )


@dataclass(frozen=True, kw_only=True)
class PrototypeAuditConfig:
    """The audit of a checkpoint's prototypes."""

    weights: str | None = None
    """Weights file `PATH` or `PATH#TENSOR` whose prototypes are audited beside `encoder`'s features (another
    project's checkpoint beside its backbone in timm), or null for the encoder's own.
    """
    thresholds: tuple[Annotated[float, "(0, 2]"], ...] = (0.025, 0.05, 0.1, 0.25, 0.5)
    """eps of Definition 2.1 (two prototypes are one when 1 - cosine < eps)."""
    angle_pairs: Annotated[int, "[1, 1e9]"] = 200_000
    """Random pairs from which the histogram of cosines is drawn."""
    use_images: bool = True
    """Also count which prototypes the test images use, where the checkpoint carries its projection head and
    another probe needs features.
    """

    def __post_init__(self) -> None:
        """Refuses no threshold."""
        refuse_unless(bool(self.thresholds), "prototypes.thresholds", "[]", "at least one number")


@dataclass(frozen=True, kw_only=True)
class AttentiveConfig:
    """One learned query that attends to patch tokens, with a linear classifier (CAPI's protocol)."""

    learning_rates: tuple[Annotated[float, "(0, 10]"], ...] = (
        1e-5,
        2e-5,
        5e-5,
        1e-4,
        2e-4,
        5e-4,
        1e-3,
        2e-3,
        5e-3,
        1e-2,
    )
    """Learning rates of AdamW per 256 images of batch; each trains its own classifier beside the others."""
    weight_decays: tuple[Annotated[float, "[0, 10]"], ...] = (5e-4, 1e-3, 5e-2)
    """Weight decays; each is tried with every learning rate."""
    steps: Annotated[int, "[1, 1e7]"] = 12_500
    """Optimizer steps, at most."""
    epochs: Annotated[int, "[1, 1e6]"] = 100
    """Passes over the training images, at most: of 12,500 steps a small set would see thousands."""
    batch_size: Annotated[int, "[1, 1e6]"] = 1024
    """Images per step."""
    warmup: Annotated[float, "[0, 1)"] = 0.1
    """Share of the steps over which the rate rises."""
    held_out: Annotated[float, "(0, 1)"] = 0.1
    """Share of the training split on which rate and decay are chosen."""

    def __post_init__(self) -> None:
        """Refuses an empty grid."""
        for name in ("learning_rates", "weight_decays"):
            refuse_unless(bool(getattr(self, name)), f"attentive.{name}", "[]", "at least one number")


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
    """A class for every patch by k-NN and by logistic regression on standardised patch tokens (CAPI's protocol)."""

    classifiers: tuple[Literal["knn", "logistic"], ...] = ("knn", "logistic")
    """What is fitted."""
    k: tuple[Annotated[int, "[1, 1e6]"], ...] = (1, 3, 10, 30)
    """Numbers of neighbours to choose among."""
    distances: tuple[Literal["cosine", "L2"], ...] = ("cosine", "L2")
    """Distances of neighbours to choose among."""
    inverse_regularisation: tuple[Annotated[float, "[1e-9, 1e9]"], ...] = (
        1e-6,
        3.73e-5,
        1.39e-3,
        0.0518,
        1.93,
        72.0,
        2.68e3,
        1e5,
    )
    """scikit-learn's C of the logistic regression, to choose among."""
    max_iterations: Annotated[int, "[1, 1e6]"] = 1000
    """Largest number of iterations of L-BFGS."""
    held_out: Annotated[float, "(0, 1)"] = 0.1
    """Share of the training images on which all of these are chosen."""
    max_train_patches: Annotated[int, "[1, 1e9]"] | None = None
    """Random patches of the training split of which classifiers are made, or null for all."""

    def __post_init__(self) -> None:
        """Refuses an empty grid."""
        for name in ("classifiers", "k", "distances", "inverse_regularisation"):
            refuse_unless(bool(getattr(self, name)), f"segmentation.{name}", "[]", "at least one")


@dataclass(frozen=True, kw_only=True)
class SegmentationLinearConfig:
    """BatchNorm and a 1 x 1 convolution on frozen patch tokens, on random squares of the images (DINOv3's protocol)."""

    steps: Annotated[int, "[1, 1e7]"] = 40_000
    """Optimizer steps."""
    batch_size: Annotated[int, "[1, 1e5]"] = 16
    """Images of a step."""
    lr: Annotated[float, "(0, 10]"] = 1e-3
    """Largest learning rate of AdamW."""
    weight_decay: Annotated[float, "[0, 10]"] = 1e-3
    """Weight decay of AdamW."""
    warmup: Annotated[float, "[0, 1)"] = 0.0375
    """Share of the steps over which the rate rises; 1,500 of 40,000."""
    scale: tuple[Annotated[float, "[0.1, 10]"], Annotated[float, "[0.1, 10]"]] = (0.5, 2.0)
    """Range of the shorter side of a training image, in sides of the square that is cropped from it."""
    flip: bool = True
    """Mirror half of the training images."""
    stride: Annotated[float, "(0, 1]"] = 0.666
    """From one window on a test image to the next, in sides of the square; 341 of 512."""
    shuffle_buffer: Annotated[int, "[1, 1e6]"] = 256
    """Training squares among which the next one is drawn."""

    def __post_init__(self) -> None:
        """Refuses a range in the wrong order."""
        low, high = self.scale
        refuse_unless(low <= high, "segmentation_linear.scale", list(self.scale), "smallest, then largest")


@dataclass(frozen=True, kw_only=True)
class ConfidenceConfig:
    """Bootstrap intervals over test images."""

    resamples: Annotated[int, "[1, 1e6]"] = 1000
    """Bootstrap resamples."""
    level: Annotated[float, "(0, 1)"] = 0.95
    """Level of the interval."""
