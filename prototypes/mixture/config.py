"""Options of the online mixture, read through `prototypes/config.py`. No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal


def require(holds: bool, key: str, value: object, rule: str) -> None:
    """Raises a one-line ValueError unless `holds`."""
    if not holds:
        raise ValueError(f"{key} is {value}; expected {rule}; set {key}")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Effective memory M = 1 / (1 - lambda) of a component, in assigned samples."""

    samples: Annotated[float, "(1, 1e9]"] | None = None
    """M itself; null derives it as `epochs` of the samples that one component sees in an epoch."""
    epochs: Annotated[float, "(0, 1e6]"] = 0.5
    """Share of an epoch's assigned samples per component."""
    minimum: Annotated[float, "(1, 1e9]"] = 4.0
    """Lower bound of the derived M."""
    maximum: Annotated[float, "(1, 1e9]"] = 200.0
    """Upper bound of the derived M."""

    def __post_init__(self) -> None:
        require(
            self.minimum <= self.maximum,
            "prototypes.gmm.memory.minimum",
            self.minimum,
            f"at most maximum ({self.maximum})",
        )


@dataclass(frozen=True, kw_only=True)
class AnnealingConfig:
    """Inverse temperature beta of the responsibilities over the steps."""

    # Of the schedule "perplexity", which changed nothing that could be measured (docs/evidence.md).
    FORMER: ClassVar[dict[str, tuple[Any, str]]] = {
        "perplexity_start": (8.0, "take it out"),
        "perplexity_end": (2.0, "take it out"),
    }

    schedule: Literal["constant", "geometric"] = "geometric"
    """"constant" (beta = end) or "geometric" (start -> end over `fraction` of the steps)."""
    start: Annotated[float, "[1e-4, 100]"] | None = None
    """beta at step 0; null takes min(1, max(.3, 3 beta_critical))."""
    end: Annotated[float, "[1e-4, 100]"] = 1.0
    """Last beta."""
    fraction: Annotated[float, "[0, 1]"] = 0.1
    """Share of the training over which beta moves."""
    guard: Literal["critical"] | None = "critical"
    """"critical" keeps beta >= min(1, 2 beta_critical), below which all means merge; null switches the guard
    off.
    """


@dataclass(frozen=True, kw_only=True)
class MixingWeightsConfig:
    """Mixing weights pi of the mixture."""

    mode: Literal["tracked", "uniform"] = "tracked"
    """"tracked" (running share of responsibility) or "uniform" (1 / K)."""
    floor: Annotated[float, "[1e-9, 1)"] = 0.1
    """Every weight stays at least floor / K."""


@dataclass(frozen=True, kw_only=True)
class VarianceConfig:
    """What keeps the variances of the components away from zero and from noise."""

    floor: Annotated[float, "[1e-6, 1]"] = 0.05
    """A component's variance stays at least floor x the features' own variance, per dimension; for `vmf` the
    same of 1 / kappa.
    """
    shrinkage: Annotated[float, "[0, 1e6]"] = 0.25
    """Strength of the MAP shrinkage towards the features' variance, in units of the memory M. Not for
    variances that all components share.
    """


@dataclass(frozen=True, kw_only=True)
class InitialisationConfig:
    """How the means start."""

    method: Literal["sphere", "data", "data_spread"] = "sphere"
    """"sphere" (random unit vectors), "data" (the first K features) or "data_spread" (of K features those at
    least `spread_distance` apart in cosine distance, the rest random unit vectors). The mixture stands still
    until K features were seen.
    """
    spread_distance: Annotated[float, "(0, 2)"] = 0.1
    """Least cosine distance between features accepted by "data_spread"."""
    warmup_fraction: Annotated[float, "[0, 1)"] = 0.01
    """Share of the training after which "data_spread" starts to collect."""

    def first_step(self, total_steps: int) -> int:
        """Returns the step whose features are the first that may become means."""
        return 0 if self.method == "data" else int(self.warmup_fraction * total_steps)


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """What a step leaves out: responsibilities that are too small to move anything."""

    threshold: Annotated[float, "[0, 1e-3]"] = 1e-7
    """Responsibilities at or below it are left out, and the others of the row renormalised; 0 leaves nothing out. A
    step that would leave out more than a thousandth of its rows' mass is taken with all of them, and so is every
    step of uniform forgetting.
    """


@dataclass(frozen=True, kw_only=True)
class SynchronizationConfig:
    """How ranks share one step's observations."""

    method: Literal["all_reduce", "all_gather", "sharded", "sparse", "auto"] = "all_reduce"
    """"all_reduce" (sum the statistics; the default at every K), "all_gather" (gather the rows, every rank
    computes everything), "sharded" (gather the rows, each rank computes the statistics of its range of
    prototypes), "sparse" (gather the rows and their responsibilities above `sparse.threshold`) or "auto" (the
    cost rule decides once; the checkpoint keeps the choice).
    """
    reduction: Literal["fp32", "fp64", "fixed_order"] = "fp32"
    """"fp32", "fp64" (sums in double precision) or "fixed_order" (bitwise independent of the number of ranks, of
    equal numbers of threads: rows gathered and sorted; needs "all_gather").
    """
    bandwidth_gb_per_s: Annotated[float, "(0, 1e6]"] = 46.0
    """Effective bandwidth between ranks that the cost rule assumes."""
    overlap_ms: Annotated[float, "[0, 1e6]"] = 50.0
    """Time of the student's forward pass, behind which the rule assumes an exchange to hide."""

    def __post_init__(self) -> None:
        key = "prototypes.gmm.synchronization"
        require(
            self.reduction != "fixed_order" or self.method == "all_gather",
            f"{key}.method",
            self.method,
            "all_gather with reduction=fixed_order",
        )
        require(
            self.reduction != "fp64" or self.method == "all_reduce",
            f"{key}.method",
            self.method,
            "all_reduce with reduction=fp64",
        )


@dataclass(frozen=True, kw_only=True)
class RevivalConfig:
    """What happens to starved and duplicate components."""

    method: Literal["off", "split", "reseed"] = "off"
    """"off" (the paper), "split" (next to the heaviest, widest component) or "reseed" (to the rows farthest
    from every prototype).
    """
    interval_steps: Annotated[int, "[1, 1e9]"] = 500
    """Steps between two events."""
    max_share: Annotated[float, "(0, 1]"] = 0.01
    """Largest share of K that gets new means from rows or splits in one event; `surplus: spare` sets all other
    duplicates aside besides.
    """
    duplicate_distance: Annotated[float, "[0, 2)"] = 0.025
    """Cosine distance below which a mean counts as a duplicate; 0 looks for none."""
    row_distance: Annotated[float, "(0, 2)"] = 0.1
    """Least cosine distance from every prototype of a row that "reseed" moves a component to."""
    surplus: Literal["stay", "spare"] = "stay"
    """Duplicates that no row has room for "stay", or wait as a "spare" in a random direction; "spare" needs
    "reseed".
    """

    def __post_init__(self) -> None:
        key = "prototypes.gmm.revival"
        require(
            self.surplus == "stay" or (self.method == "reseed" and self.duplicate_distance > 0),
            f"{key}.surplus",
            self.surplus,
            "stay unless method is reseed with a duplicate_distance",
        )


@dataclass(frozen=True, kw_only=True)
class VariationalConfig:
    """Priors of the estimator `vb_gmm`."""

    weight_concentration: Annotated[float, "[1e-6, 1e6]"] = 0.1
    """Dirichlet alpha0 of the mixing weights."""
    mean_strength: Annotated[float, "[1e-6, 1e6]"] = 0.01
    """Kappa0, samples that the prior on a mean counts for."""


@dataclass(frozen=True, kw_only=True)
class GmmConfig:
    """The online mixture of the mode `full`."""

    # Responsibilities kept per row: all were computed before, so that it saved nothing.
    FORMER: ClassVar[dict[str, tuple[Any, str]]] = {"largest": (0, "take it out")}

    input: Literal["l2", "raw"] = "l2"
    """"l2" (unit rows) or "raw" (the projections as they are)."""
    center: bool = False
    """Subtract the running mean of the projections first."""
    standardise: bool = False
    """Divide by the running standard deviation too."""
    forgetting: Literal["responsibility", "uniform", "none"] = "responsibility"
    """"responsibility" (old statistics are forgotten as new mass arrives), "uniform" (by the same factor every step;
    the ablation) or "none" (nothing new is learned: means stay where they were started or revived; the control).
    """
    uniform_rate: Annotated[float, "(0, 1)"] = 0.05
    """The factor of uniform forgetting."""
    responsibility_scale: Literal["sum", "mean"] = "sum"
    """Exponent of the forgetting: "sum" or "mean" of a component's responsibilities."""
    gain: Literal["omega", "simple"] = "omega"
    """"omega" (exact for split samples) or "simple" (the mass itself)."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    beta: AnnealingConfig = field(default_factory=AnnealingConfig)
    mixing_weights: MixingWeightsConfig = field(default_factory=MixingWeightsConfig)
    variance: VarianceConfig = field(default_factory=VarianceConfig)
    init: InitialisationConfig = field(default_factory=InitialisationConfig)
    balance: Annotated[float, "[0, 1000]"] = 0.0
    """Strength with which the log of the running usage is subtracted from the E-step's logits; 0 is off. An
    objective's `posterior` logits and targets are without it.
    """
    tied_concentration: bool = False
    """One concentration for all components of the estimator `vmf`."""
    kmeans_temperature: Annotated[float, "[1e-3, 100]"] = 0.1
    """Temperature of the cosine of the estimator `sph_kmeans`."""
    kmeans_hard: bool = False
    """Whether `sph_kmeans` assigns to the nearest centroid alone."""
    variational: VariationalConfig = field(default_factory=VariationalConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    kernel: Literal["auto", "torch", "triton"] = "auto"
    """What finds the responsibilities of a sparse step: "torch", "triton" (logits are never written; a GPU only) or
    "auto" (on a GPU with triton the faster of the two by a timing at the first sparse step, if their responsibilities
    agree within 5e-3 in L1; torch elsewhere; the log says by how much, the checkpoint keeps the choice).
    """
    kernel_product: Literal["fp32", "bf16x3"] = "bf16x3"
    """Products of "triton": "fp32" as written, or "bf16x3" of numbers in two bfloat16 parts, for tensor cores."""
    synchronization: SynchronizationConfig = field(default_factory=SynchronizationConfig)
    revival: RevivalConfig = field(default_factory=RevivalConfig)

    def __post_init__(self) -> None:
        require(
            self.sparse.threshold > 0 or self.synchronization.method != "sparse",
            "prototypes.gmm.sparse.threshold",
            self.sparse.threshold,
            "more than 0 with synchronization.method=sparse",
        )
        require(
            self.sparse.threshold > 0 or self.kernel != "triton",
            "prototypes.gmm.sparse.threshold",
            self.sparse.threshold,
            "more than 0 with kernel=triton",
        )
