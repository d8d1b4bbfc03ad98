"""Options of the prototypes: modes, the mixture, partitions and the objective. No torch is imported here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from .mixture.config import GmmConfig, require

Mode = Literal["full", "joint", "joint_kp", "partial", "frozen_random"]
EstimatorName = Literal[
    "gmm_diag",
    "gmm_spherical",
    "gmm_tied_diag",
    "gmm_tied_spherical",
    "vmf",
    "sph_kmeans",
    "vb_gmm",
    "sinkhorn",
]


@dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """Random partitions of the prototypes inside the loss (CARP, section 3)."""

    size: Annotated[int, "[2, 1e8]"] = 512
    """Prototypes in one block, N_B; must divide the number of prototypes."""
    blocks_per_chunk: Annotated[int, "[1, 1e6]"] | None = None
    """Blocks whose logits exist at once; lower needs less memory, the result is the same. null is 8 on a CPU, whose
    caches then hold them, and on a GPU as many as 2^25 logits allow: 128 MiB, a few times that with what follows."""


@dataclass(frozen=True, kw_only=True)
class ClusteringConfig:
    """Teacher prototypes trained by their own clustering loss: mode `partial` and estimator `sinkhorn`."""

    target_temperature: Annotated[float, "[1e-3, 100]"] = 0.06
    """Temperature of the Sinkhorn targets."""
    prediction_temperature: Annotated[float, "[1e-3, 100]"] = 0.12
    """Temperature of the softmax that learns them."""
    sinkhorn_iterations: Annotated[int, "[1, 1000]"] = 3
    """Row and column normalisations."""
    learning_rate: Annotated[float, "(0, 100]"] = 5e-4
    """Peak of AdamW's learning rate."""
    betas: tuple[Annotated[float, "[0, 1)"], Annotated[float, "[0, 1)"]] = (0.9, 0.95)
    """AdamW's averages."""
    weight_decay: Annotated[float, "[0, 10]"] = 0.0
    """AdamW's decoupled decay."""
    warmup_fraction: Annotated[float, "[0, 1]"] = 0.1
    """Share of the steps with a rising learning rate."""
    cosine_end: Annotated[float, "[0, 1]"] = 0.8
    """Share of the half cosine that the decay runs through."""


@dataclass(frozen=True, kw_only=True)
class CouplingConfig:
    """How far the prototypes are left to the encoder's loss."""

    strength: Annotated[float, "[0, 1]"] = 0.0
    """kappa from 0 (`full`: the mixture alone) to 1 (`joint`: the loss alone); mode `full`."""
    start: Literal["directions", "means"] = "directions"
    """Where the prototypes begin that the loss trains beside a mixture: "directions" (random ones) or "means" (random
    ones until `gmm.init` has placed the mixture's means; these are written over them then)."""
    tie: Annotated[float, "[0, 1e6]"] = 0.0
    """Weight of |C_student - sg(C_teacher)|^2 per prototype; mode `partial`."""


@dataclass(frozen=True, kw_only=True)
class PrototypesConfig:
    """The prototypes: who estimates them, how many there are and how the loss partitions them."""

    mode: Mode = "full"
    """"full" (estimated by an online mixture, detached from the encoder), "joint" (learned by the encoder's
    loss), "joint_kp" (the same with KoLeo on the prototypes), "partial" (the teacher's learned by their own
    clustering loss, the student's by the encoder's) or "frozen_random" (fixed random directions, the
    control).
    """
    estimator: EstimatorName = "gmm_diag"
    """The mixture of the mode `full`."""
    num_prototypes: Annotated[int, "[2, 1e8]"] = 65536
    """K, the number of prototypes."""
    dim: Annotated[int, "[2, 1e6]"] = 256
    """Width of the projections, P."""
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    gmm: GmmConfig = field(default_factory=GmmConfig)
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    coupling: CouplingConfig = field(default_factory=CouplingConfig)
    koleo_weight: Annotated[float, "[0, 1e6]"] = 0.1
    """Weight of KoLeo in the mode `joint_kp`."""
    max_rows_per_rank: Annotated[int, "[1, 1e9]"] | None = None
    """Rows that are observed on each rank and step, at most: of more (patches are many) as many are drawn, each with
    the weight of those that it stands for. Null: all.
    """

    def __post_init__(self) -> None:
        require(
            self.num_prototypes % self.partition.size == 0,
            "prototypes.partition.size",
            self.partition.size,
            f"a divisor of prototypes.num_prototypes ({self.num_prototypes})",
        )
        require(
            self.gmm.input == "l2" or self.estimator not in ("vmf", "sph_kmeans"),
            "prototypes.gmm.input",
            self.gmm.input,
            f"l2 with the estimator {self.estimator}",
        )
        require(
            self.dim >= 8 or self.estimator != "vmf",
            "prototypes.dim",
            self.dim,
            "at least 8 with the estimator vmf",
        )
        require(
            self.coupling.strength == 0 or self.has_mixture,
            "prototypes.coupling.strength",
            self.coupling.strength,
            "0 unless prototypes.mode is full with a mixture",
        )
        require(
            self.coupling.start == "directions"
            or (self.coupling.strength > 0 and self.gmm.init.method != "sphere"),
            "prototypes.coupling.start",
            self.coupling.start,
            "directions unless prototypes.coupling.strength is above 0 and prototypes.gmm.init.method places features",
        )
        require(
            self.coupling.tie == 0 or self.mode == "partial",
            "prototypes.coupling.tie",
            self.coupling.tie,
            "0 unless prototypes.mode is partial",
        )

    @property
    def has_mixture(self) -> bool:
        """Whether a mixture estimates them; codes by Sinkhorn are none."""
        return self.mode == "full" and self.estimator != "sinkhorn"


Logits = Literal["dot", "cosine", "posterior"]
Targets = Literal["entropy", "centre", "sinkhorn", "posterior"]
Level = Literal["instance", "patch"]
_Temperature = Annotated[float, "[1e-3, 100]"]


class TermSettings(NamedTuple):
    """What a term of the objective compares, and how its targets are kept apart."""

    logits: Logits
    targets: Targets
    student_temperature: float
    teacher_temperature: float
    teacher_temperature_start: float | None = None


# What a term's nulls stand for; the temperatures are those of cosine logits.
_USUAL: dict[str, TermSettings] = {
    "carp": TermSettings("dot", "entropy", 0.1, 0.1),
    "dino": TermSettings("cosine", "centre", 0.1, 0.04),
    "ibot": TermSettings("cosine", "centre", 0.1, 0.07),
    "capi": TermSettings("cosine", "sinkhorn", 0.12, 0.06),
}

_LOGIT_OPTIONS = frozenset(
    (
        "weight",
        "logits",
        "student_temperature",
        "teacher_temperature",
        "teacher_temperature_start",
        "teacher_temperature_warmup_epochs",
    )
)
_TARGET_OPTIONS = frozenset(("targets", "entropy_weight", "centre_momentum", "sinkhorn_iterations"))
# What each term reads of a `TermConfig`. Another option that is set is refused: it would change nothing.
_READS: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "carp": _LOGIT_OPTIONS | {"entropy_weight"},
    "dino": _LOGIT_OPTIONS | _TARGET_OPTIONS,
    "ibot": _LOGIT_OPTIONS | _TARGET_OPTIONS,
    "capi": _LOGIT_OPTIONS | _TARGET_OPTIONS,
}
# Of these what is read only beside another option: how a user writes that one, and whether a term has it.
_READ_BESIDE: dict[str, tuple[str, Callable[[TermSettings], bool]]] = {
    "entropy_weight": ("targets=entropy", lambda settings: settings.targets == "entropy"),
    "centre_momentum": ("targets=centre", lambda settings: settings.targets == "centre"),
    "sinkhorn_iterations": ("targets=sinkhorn", lambda settings: settings.targets == "sinkhorn"),
    "teacher_temperature_warmup_epochs": (
        "teacher_temperature_start=NUMBER",
        lambda settings: settings.teacher_temperature_start is not None,
    ),
}


@dataclass(frozen=True, kw_only=True)
class TermConfig(ABC):
    """What a term on views and one on patches have in common: logits, temperatures, and what keeps targets apart."""

    weight: Annotated[float, "[0, 1e6]"] = 1.0
    """Weight of the term in the loss."""
    logits: Logits | None = None
    """"dot" (projection . unit prototype), "cosine" (unit projection . unit prototype) or "posterior" (the mixture's
    beta times the log joint density; mode `full` only). Null: dot for `carp`, cosine for the others.
    """
    student_temperature: _Temperature | None = None
    """What the student's logits are divided by. Null: the method's for cosine logits, 1 for others."""
    teacher_temperature: _Temperature | None = None
    """What the teacher's logits are divided by. Null: the method's for cosine logits, 1 for others."""
    teacher_temperature_start: _Temperature | None = None
    """Where a linear warm-up of the teacher's temperature starts; null: no warm-up."""
    teacher_temperature_warmup_epochs: Annotated[float, "[0, 1e6]"] = 30.0
    """Length of that warm-up."""
    targets: Targets | None = None
    """What keeps the targets of all images from being one. "entropy" of the mean probabilities joins the loss;
    "centre", the moving average of the teacher's logits, is taken off them; "sinkhorn" balances them over the global
    batch; "posterior" takes the mixture's own responsibilities (mode `full` only). Null: the method's.
    """
    entropy_weight: Annotated[float, "[0, 1e6]"] = 1.0
    """Weight of the entropy inside the term, with targets "entropy": the only guard against feature collapse."""
    centre_momentum: Annotated[float, "[0, 1)"] = 0.9
    """Decay rate of the centre."""
    sinkhorn_iterations: Annotated[int, "[1, 1000]"] = 3
    """Row and column normalisations of the targets "sinkhorn"."""

    LEVEL: ClassVar[Level]

    @property
    @abstractmethod
    def name(self) -> str:
        """Which loss."""

    def __post_init__(self) -> None:
        """Refuses options that the term does not read, unless they say what holds anyway."""
        for option in fields(self):
            name, value = option.name, getattr(self, option.name)
            if name == "name" or value == option.default:
                continue
            is_read = name in _READS[self.name]
            if (
                not is_read
                and self.name in _USUAL
                and value == getattr(_USUAL[self.name], name, option.default)
            ):
                continue
            beside, holds = _READ_BESIDE.get(name, ("", lambda settings: True))
            if is_read and holds(self.resolved):
                continue
            section = f"objective.{self.LEVEL}"
            default = "null" if option.default is None else option.default
            rule = f"{default}, as {section}.name {self.name} reads it beside {beside} alone"
            remedy = f"{section}.{beside}"
            if not is_read:
                rule = f"{default}, as {section}.name {self.name} does not read it"
                remedy = f"{section}.name to a term that does"
            raise ValueError(f"{section}.{name} is {value}; expected {rule}; set {remedy}, or leave it out")

    @property
    def resolved(self) -> TermSettings:
        """What is compared: nulls filled in by the term's name."""
        usual = _USUAL[self.name]
        logits, targets = self.logits or usual.logits, self.targets or usual.targets
        student = usual.student_temperature if logits == "cosine" else 1.0
        teacher = usual.teacher_temperature if logits == "cosine" and targets != "posterior" else 1.0
        return TermSettings(
            logits,
            targets,
            student if self.student_temperature is None else self.student_temperature,
            teacher if self.teacher_temperature is None else self.teacher_temperature,
            self.teacher_temperature_start,
        )

    @property
    def needs_mixture(self) -> bool:
        """Whether responsibilities of a mixture are asked for."""
        return "posterior" in (self.logits, self.targets)


@dataclass(frozen=True, kw_only=True)
class InstanceConfig(TermConfig):
    """The term that compares views of an image."""

    LEVEL = "instance"

    name: Literal["carp", "dino", "none"] = "carp"
    """`carp`: -log<p, q> inside random partitions, plus the entropy of the mean probabilities. `dino`: cross-entropy
    with the teacher's targets over all prototypes. `none`: the term on patches alone.
    """


@dataclass(frozen=True, kw_only=True)
class PatchConfig(TermConfig):
    """The term that compares patches which the student did not see with what the teacher makes of them."""

    LEVEL = "patch"

    name: Literal["none", "ibot", "capi"] = "none"
    """`ibot`: hidden behind a mask token (`data.masks.kind` block). `capi`: left out and predicted by cross-attention
    (`data.masks.kind` inverse_block); Sinkhorn balances each position by itself.
    """


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the encoder minimises: docs/objectives.md."""

    # Options of former versions: the value that means what today's defaults mean, and what to set instead of another.
    FORMER: ClassVar[dict[str, tuple[Any, str]]] = {
        "logits": ("dot", "set objective.instance.logits"),
        "student_temperature": (0.1, "set objective.instance.student_temperature"),
        "teacher_temperature": (0.1, "set objective.instance.teacher_temperature"),
        "entropy_weight": (1.0, "set objective.instance.entropy_weight"),
    }

    instance: InstanceConfig = field(default_factory=InstanceConfig)
    patch: PatchConfig = field(default_factory=PatchConfig)
    koleo_weight: Annotated[float, "[0, 1e6]"] = 0.0
    """Weight of KoLeo, which pushes the embeddings of a rank's images apart, in each global view (DINOv2: .1)."""

    def term(self, level: Level) -> InstanceConfig | PatchConfig:
        """Returns the options of a level's term."""
        return self.instance if level == "instance" else self.patch

    def __post_init__(self) -> None:
        require(
            self.instance.name != "none" or self.patch.name != "none",
            "objective.patch.name",
            self.patch.name,
            "a term, as objective.instance.name is none",
        )
        for name, term, other in (
            ("instance", self.instance, self.patch),
            ("patch", self.patch, self.instance),
        ):
            require(
                term.name == "none" or term.weight > 0 or (other.name != "none" and other.weight > 0),
                f"objective.{name}.weight",
                term.weight,
                "more than 0 for one term",
            )
