"""One run: every option of `pretrain.py`, with what it means and its unit. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from data.config import DataConfig
from models.config import ModelConfig, OutputsConfig
from prototypes.config import Level, ObjectiveConfig, PrototypesConfig
from prototypes.mixture.config import require


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and how it starts."""

    name: str = "run"
    """The run's directory is `output_dir/name`."""
    output_dir: str = "outputs"
    """Parent of run directories."""
    seed: Annotated[int, "[0, 4294967295]"] = 0
    """The one number from which every random stream is derived."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` (CUDA where there is one), `cpu` or `cuda`."""
    resume: bool = True
    """Continue from the newest complete checkpoint of the run directory where there is one."""
    extend: bool = False
    """Continue a run with more `optim.epochs` or `optim.steps` than it was made with. Schedules then follow
    the new length from the newest checkpoint on.
    """
    adopt: bool = False
    """Continue a run directory that was made under another `run.name`: renamed, or copied."""
    dry_run: bool = False
    """Print what the run would be (parameters, FLOPs, memory, steps) and exit."""
    dry_run_world_size: Annotated[int, "[1, 1e6]"] | None = None
    """Ranks that the dry run describes, on whatever machines they will be; null describes those that run it, here."""
    collective_timeout_s: Annotated[float, "[1, 1e6]"] = 600.0
    """Seconds after which a collective that a rank never joined fails."""

    def __post_init__(self) -> None:
        """Refuses a name that would leave the output directory, or that file systems or sbatch do not take."""
        parts = self.name.split("/")
        if self.name.startswith(".") or not all(parts) or ".." in parts or "\\" in self.name:
            raise ValueError(f"run.name is {self.name!r}; expected a plain directory name; set run.name")
        # File systems take 255 bytes; names of files are made from it by adding to it.
        if (length := len(self.name.encode())) > 200:
            raise ValueError(
                f"run.name is {self.name[:40]!r}... of {length} bytes; expected at most 200; set run.name"
            )


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The batch: `global_batch_size = micro_batch_size_per_gpu * gradient_accumulation_steps * world size`."""

    global_batch_size: Annotated[int, "[1, 1e8]"] = 1024
    """Images per optimizer step over all ranks."""
    gradient_accumulation_steps: Annotated[int, "[1, 1e6]"] = 1
    """Micro-batches per optimizer step on each rank."""
    accumulation: Literal["exact", "per_micro_batch"] = "exact"
    """What several micro-batches learn. `exact`: what one batch of all of them does, for a second forward
    pass of the student. `per_micro_batch`: the mean of a loss of each, whose entropy and partition are the
    micro-batch's own; another loss, and no extra pass.
    """

    @property
    def runs_student_twice(self) -> bool:
        """Whether the student's forward pass runs once without and once with its graph."""
        return self.accumulation == "exact" and self.gradient_accumulation_steps > 1

    def micro_batch_size_per_gpu(self, world_size: int) -> int:
        """Returns images per rank and micro-batch.

        Raises:
            ValueError: the global batch does not divide.
        """
        parts = world_size * self.gradient_accumulation_steps
        if self.global_batch_size % parts:
            raise ValueError(
                f"batch.global_batch_size is {self.global_batch_size}; expected a multiple of world size "
                f"{world_size} x gradient_accumulation_steps {self.gradient_accumulation_steps} = {parts}; "
                "set batch.global_batch_size"
            )
        return self.global_batch_size // parts


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedules. Learning rates are per 256 images of global batch (linear scaling)."""

    optimizer: Literal["adamw", "lars"] = "adamw"
    """`adamw`, or `lars` (CARP's ResNet recipe; plain replicas, ZeRO-0, only)."""
    lr: Annotated[float, "[0, 100]"] = 5e-4
    """Peak learning rate per 256 images."""
    min_lr: Annotated[float, "[0, 100]"] = 1e-6
    """The learning rate at the end, per 256 images."""
    warmup_epochs: Annotated[float, "[0, 1e6]"] = 10.0
    """Epochs of linear warm-up from 0."""
    epochs: Annotated[float, "(0, 1e6]"] = 100.0
    """Length of the run; `steps` overrides it."""
    steps: Annotated[int, "[1, 1e9]"] | None = None
    """Optimizer steps of the run, or null to derive them from `epochs`."""
    weight_decay: Annotated[float, "[0, 10]"] = 0.04
    """Weight decay at the start."""
    weight_decay_end: Annotated[float, "[0, 10]"] = 0.4
    """Weight decay at the end, along a cosine."""
    betas: tuple[Annotated[float, "[0, 1)"], Annotated[float, "[0, 1)"]] = (0.9, 0.999)
    """Adam's decay rates of the two moments."""
    momentum: Annotated[float, "[0, 1)"] = 0.9
    """LARS's momentum."""
    trust_coefficient: Annotated[float, "(0, 10]"] = 1e-3
    """LARS's trust coefficient."""
    clip_grad_norm: Annotated[float, "(0, 1e6]"] | None = 3.0
    """Largest 2-norm of the gradient, or null for no clipping."""
    layer_decay: Annotated[float, "(0, 1]"] = 1.0
    """Learning rate of block i times `layer_decay ** (depth - i)`; 1 leaves it out."""
    patch_embed_lr_scale: Annotated[float, "[0, 1e4]"] = 1.0
    """Learning rate of a ViT's patch embedding, relative to the rest and besides `layer_decay` (DINOv2: .2)."""
    prototype_lr_scale: Annotated[float, "[0, 1e4]"] = 1.0
    """Learning rate of prototypes that the encoder's loss trains, relative to the rest."""
    prototype_frozen_epochs: Annotated[float, "[0, 1e6]"] = 0.0
    """Epochs at the start in which they stay as they are (DINO: 1)."""
    ema_momentum: Annotated[float, "[0, 1]"] = 0.996
    """Decay rate of the teacher's moving average at the start."""
    ema_momentum_end: Annotated[float, "[0, 1]"] = 1.0
    """The same at the end, along a cosine."""
    max_skipped_steps: Annotated[int, "[1, 1e6]"] = 10
    """Non-finite steps in a row after which the run stops."""
    spike_factor: Annotated[float, "(1, 1e6]"] | None = None
    """Skip a step whose loss exceeds this multiple of the recent median; null leaves it out."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the step is executed; none of this changes the result beyond rounding."""

    name: Literal["deepspeed", "fsdp2"] = "deepspeed"
    """`deepspeed` or `fsdp2`."""
    deepspeed_config: str = "ds_configs/zero1_fp32.json"
    """JSON file of DeepSpeed mechanics: ZeRO stage, precision (see `ds_configs/`)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of FSDP2's compute; DeepSpeed's comes from its JSON file."""
    tf32: bool = False
    """Compute what is fp32 (matrix products and convolutions) with TF32's 10-bit mantissa on CUDA. Off, fp32
    is fp32; torch's own default is TF32 for convolutions.
    """
    checksum_every: Annotated[int, "[0, 1e9]"] = 50
    """Steps between comparisons of the replicas' checksums over ranks; 0 leaves them out."""
    hang_timeout_s: Annotated[float, "0 or [1, 1e6]"] = 600.0
    """Seconds without a finished step after which stacks are dumped and the silent rank named; 0 leaves the
    watchdog out.
    """


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When states are saved and which stay."""

    every_steps: Annotated[int, "[1, 1e9]"] = 1000
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_last: Annotated[int, "[1, 1e6]"] = 2
    """Newest complete checkpoints that stay."""
    keep_every: Annotated[int, "[0, 1e9]"] = 0
    """Additionally keep checkpoints at multiples of this step; 0 keeps none."""
    keep_best: bool = False
    """Additionally keep the checkpoint with the best k-NN (`eval/knn20_top1`) of the run; the earlier one of two equal
    ones. Evaluation must fall on steps that are saved: `evaluation.knn_every_steps` a multiple of `every_steps`.
    """
    asynchronous: bool = False
    """Write in a thread while training goes on. The step waits only for the copy into CPU memory (a rank's
    share of the state); the checkpoint is published at a later step boundary.
    """


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written while training."""

    every_steps: Annotated[int, "[1, 1e9]"] = 10
    """Steps between lines of `metrics.jsonl`."""
    tensorboard: bool = False
    """Write event files into the run's `tensorboard/`, another view of `metrics.jsonl`, with the package `tensorboard`;
    `tensorboard --logdir outputs` shows them.
    """
    wandb_mode: Literal["disabled", "offline", "online"] = "disabled"
    """`disabled`, `offline` or `online`; wandb is a view of `metrics.jsonl` and cannot stop a run."""
    wandb_project: str = "decoupled-prototypes"
    """Project of the wandb run."""
    unique_early_steps: tuple[Annotated[int, "[0, 1e9]"], ...] = (0, 100, 300, 1000, 3000, 10000)
    """Steps at which unique prototypes are counted besides once an epoch: collapse is early."""


@dataclass(frozen=True, kw_only=True)
class InTrainingEvaluationConfig:
    """The k-NN probe beside training."""

    knn_every_steps: Annotated[int, "[0, 1e9]"] = 0
    """Optimizer steps between probes; 0 leaves them out."""
    knn_train_images: Annotated[int, "[1, 1e9]"] = 10000
    """Images of the training split in the probe's bank."""
    knn_test_images: Annotated[int, "[1, 1e9]"] = 2000
    """Images of the test split that are classified."""
    test_split: str = "test"
    """Name of the split that is classified."""
    runs_as: Literal["process", "slurm_job"] = "process"
    """`process` classifies on the run's own devices between two steps, into `metrics.jsonl`; `slurm_job`
    hands the checkpoint of that step to `sbatch` and goes on: `results/in_training/` fills meanwhile.
    """
    sbatch_script: str = "slurm/evaluate.sbatch"
    """Batch script of the job."""
    sbatch_options: tuple[str, ...] = ()
    """Options of the job, such as `--partition=eval` or `--gpus-per-node=0`; they win over the script's."""

    def __post_init__(self) -> None:
        """Refuses options that sbatch would take for a script."""
        for option in self.sbatch_options:
            if not option.startswith("-"):
                raise ValueError(
                    f"evaluation.sbatch_options holds {option!r}; expected options such as --partition=eval; "
                    "set evaluation.sbatch_options"
                )


# What the networks do with hidden patches, by `objective.patch.name`.
_PATCHES: dict[str, Literal["none", "hidden", "left_out"]] = {
    "none": "none",
    "ibot": "hidden",
    "capi": "left_out",
}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that `pretrain.py` reads from a YAML file and its overrides."""

    run: RunConfig = field(default_factory=RunConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    prototypes: PrototypesConfig = field(default_factory=PrototypesConfig)
    patch_prototypes: PrototypesConfig | None = None
    """Prototypes of its own for the term on patches, with the options of `prototypes`; null: it takes `prototypes`."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: InTrainingEvaluationConfig = field(default_factory=InTrainingEvaluationConfig)

    def __post_init__(self) -> None:
        """Refuses sections that contradict each other."""
        self._check_levels()
        if self.objective.patch.name == "none":
            self._check_no_patches()
        else:
            self._check_patches()
        every = self.evaluation.knn_every_steps
        if self.evaluation.runs_as == "slurm_job" and every % self.checkpoint.every_steps:
            raise ValueError(
                f"evaluation.knn_every_steps is {every}; expected a multiple of checkpoint.every_steps "
                f"{self.checkpoint.every_steps}, because a job evaluates a checkpoint; set evaluation.knn_every_steps"
            )
        if self.checkpoint.keep_best and (not every or every % self.checkpoint.every_steps):
            raise ValueError(
                f"checkpoint.keep_best is true and evaluation.knn_every_steps {every}; expected a multiple of "
                f"checkpoint.every_steps {self.checkpoint.every_steps}, so that what is best is saved; set "
                "evaluation.knn_every_steps"
            )
        model, data = self.model, self.data
        rule = f"data.channels {data.channels}"
        require(model.channels == data.channels, "model.channels", model.channels, rule)
        rule = f"data.global_crop_size {data.global_crop_size}"
        require(model.height_and_width == data.global_size, "model.image_size", model.image_size, rule)

    @property
    def outputs(self) -> OutputsConfig:
        """What the objective asks of the networks."""
        return OutputsConfig(
            projections=self.objective.instance.name != "none",
            embeddings=self.objective.koleo_weight > 0,
            patches=_PATCHES[self.objective.patch.name],
        )

    @property
    def levels(self) -> dict[Level, str]:
        """The levels at which the objective has a term, and which section's prototypes each compares rows with."""
        sections: dict[Level, str] = {}
        if self.objective.instance.name != "none":
            sections["instance"] = "prototypes"
        if self.objective.patch.name != "none":
            sections["patch"] = "prototypes" if self.patch_prototypes is None else "patch_prototypes"
        return sections

    def prototypes_of(self, section: str) -> PrototypesConfig:
        """Returns the options of a section of prototypes."""
        return getattr(self, section)

    def rows_per_image(self, section: str) -> float:
        """Returns how many of the teacher's rows a section's prototypes are shown of an image, on average."""
        of_level = {"instance": self.data.num_global_crops, "patch": self.patch_rows_per_image}
        return sum(of_level[level] for level, own in self.levels.items() if own == section)

    @property
    def patch_rows_per_image(self) -> float:
        """Patches of an image that the teacher projects, on average: CAPI balances all of them."""
        masks = self.data.masks
        if masks.kind == "none":
            return 0.0
        share = sum(masks.resolved_ratio) / 2 * masks.resolved_predicted * masks.resolved_crops
        num_patches = math.prod(self.data.mask_grid)
        if self.objective.patch.name == "capi":
            share = 1.0
        return self.data.num_global_crops * num_patches * share

    def _check_levels(self) -> None:
        """Refuses heads and prototypes of different widths, and terms that ask for a mixture that is not there."""
        if self.patch_prototypes is not None and set(self.levels.values()) != {
            "prototypes",
            "patch_prototypes",
        }:
            raise ValueError(
                "patch_prototypes is a section; expected null unless objective has a term on views and one on patches; "
                "set patch_prototypes=null"
            )
        data, loss = self.data, self.objective.instance.name
        rule = f"2 and more, or local crops: objective.instance.name {loss} compares views"
        has_pairs = loss == "none" or data.num_global_crops + data.num_local_crops > 1
        require(has_pairs, "data.num_global_crops", data.num_global_crops, rule)
        for level, section in self.levels.items():
            term = self.objective.term(level)
            prototypes = self.prototypes_of(section)
            own_head = level == "patch" and self.model.patch_head is not None
            head = self.model.patch_head if own_head else self.model.head
            assert head is not None
            if head.projection_dim != prototypes.dim:
                name = "patch_head" if own_head else "head"
                raise ValueError(
                    f"{section}.dim is {prototypes.dim}; expected model.{name}.projection_dim {head.projection_dim}; "
                    f"set {section}.dim"
                )
            if term.needs_mixture and not (prototypes.has_mixture and prototypes.coupling.strength == 0):
                what = "logits" if term.logits == "posterior" else "targets"
                raise ValueError(
                    f"objective.{level}.{what} is posterior; expected {section}.mode full with a mixture and "
                    f"{section}.coupling.strength 0; set objective.{level}.{what}"
                )

    def _check_no_patches(self) -> None:
        """Refuses what only a term on patches would read."""
        if self.data.masks.kind != "none":
            raise ValueError(
                f"data.masks.kind is {self.data.masks.kind}; expected none without a term on patches; "
                "set objective.patch.name or data.masks.kind=none"
            )
        if self.model.patch_head is not None:
            raise ValueError(
                "model.patch_head is a section; expected null without a term on patches; set model.patch_head=null"
            )

    def _check_patches(self) -> None:
        """Refuses a term on patches without the masks that it needs."""
        masks, name = self.data.masks, self.objective.patch.name
        kind = "inverse_block" if name == "capi" else "block"
        if masks.kind != kind:
            raise ValueError(
                f"data.masks.kind is {masks.kind}; expected {kind} with objective.patch.name {name}; "
                "set data.masks.kind"
            )
        if name == "capi" and masks.resolved_crops < 1:
            raise ValueError(
                f"data.masks.crops is {masks.crops}; expected 1 with objective.patch.name capi, which leaves out as "
                "many patches of every crop; set data.masks.crops=1"
            )
        fits = self.model.patch_size in (None, masks.patch_size)
        rule = f"model.patch_size {self.model.patch_size}"
        require(fits, "data.masks.patch_size", masks.patch_size, rule)
        unseen = self.data.num_local_crops if self.objective.instance.name == "none" else 0
        rule = "0, as no term of the objective sees local crops"
        require(unseen == 0, "data.num_local_crops", unseen, rule)
        if self.objective.instance.name == "none" and self.model.patch_head is not None:
            raise ValueError(
                "model.patch_head is a section; expected null, as model.head projects nothing but patches; "
                "set model.patch_head=null"
            )

    def num_steps(self, num_samples: int) -> int:
        """Returns the optimizer steps of the run for an epoch of `num_samples` images."""
        if self.optim.steps is not None:
            return self.optim.steps
        return max(1, round(self.optim.epochs * num_samples / self.batch.global_batch_size))
