"""What an audit compares: arms, seeds and probes, in one YAML file. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated

from evaluation.config import PROBES
from evaluation.probes.config import refuse_unless

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """One comparison: every arm x every seed is pretrained and evaluated alike."""

    name: str = "audit"
    """Runs live in `output_dir/name/ARM-seedS`, the page in `output_dir/name/report`."""
    output_dir: str = "outputs"
    """Parent of the audit's folder."""
    pretrain: str = ""
    """Configuration of `pretrain.py` that every arm starts from; empty where each arm names its own."""
    evaluate: str
    """Configuration of `evaluate.py` that every run is measured with."""
    overrides: tuple[str, ...] = ()
    """Overrides of `pretrain` for every arm."""
    evaluate_overrides: tuple[str, ...] = ()
    """Overrides of `evaluate`."""
    probes: tuple[str, ...] = ("prototypes", "knn", "linear")
    """Probes of every run."""
    segment: str = ""
    """Configuration of `evaluate.py` whose probe `segmentation` measures the patches of every run; empty for none."""
    seeds: tuple[Annotated[int, "[0, 4294967295]"], ...] = (0, 1, 2)
    """Seeds of every arm. The order of the samples and their crops depend on the seed alone, so that arms of
    one seed see the same batches.
    """
    arms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Arm to its overrides of `pretrain`, on top of `overrides`. A first entry that ends with .yaml is the
    configuration that this arm starts from instead.
    """
    only: tuple[str, ...] = ()
    """The arms to run; empty for all. Finished runs of the others still stand in the tables."""
    references: tuple[str, ...] = ()
    """Arms that every other arm is compared with, paired by seed."""
    processes: Annotated[int, "[1, 1024]"] = 2
    """Runs at once, each on its own share of the CPU; 1 where they share a GPU."""

    def __post_init__(self) -> None:
        """Refuses an audit of nothing, names that are no directories and arms that are not there."""
        refuse_unless(bool(self.arms), "arms", "empty", "at least one arm: name: [key=value, ...]")
        refuse_unless(
            bool(self.seeds) and len(set(self.seeds)) == len(self.seeds),
            "seeds",
            list(self.seeds),
            "at least one, each once",
        )
        for name in (self.name, *self.arms):
            refuse_unless(_NAME.fullmatch(name) is not None, "name", repr(name), "a plain directory name")
        for key in ("only", "references"):
            for arm in getattr(self, key):
                refuse_unless(arm in self.arms, key, repr(arm), f"one of the arms {', '.join(self.arms)}")
        for probe in self.probes:
            refuse_unless(probe in PROBES, "probes", repr(probe), f"one of {', '.join(PROBES)}")
        refuse_unless(bool(self.measured), "probes", "[]", "at least one, or a configuration in segment")
        for override in self.evaluate_overrides:
            refuse_unless(
                override.partition("=")[0] not in ("encoder", "controls", "probes"),
                "evaluate_overrides",
                repr(override),
                "none of encoder, controls and probes, which the audit sets from its runs and its own probes",
            )
        refuse_unless(
            not (self.segment and "segmentation" in self.probes),
            "segment",
            self.segment,
            "empty beside the probe segmentation: a run has one result of a probe",
        )
        for arm in self.arms:
            pretrain, overrides = self.start_of(arm)
            refuse_unless(
                bool(pretrain), f"arms.{arm}", "without a configuration", "pretrain, or FILE.yaml first"
            )
            for override in overrides:
                key = override.partition("=")[0]
                taken = ("run.name", "run.output_dir", "run.seed")
                refuse_unless(
                    "=" in override and key not in taken,
                    f"arms.{arm}",
                    repr(override),
                    f"key=value, and none of {', '.join(taken)}, which the audit sets",
                )

    def start_of(self, arm: str) -> tuple[str, tuple[str, ...]]:
        """Returns the configuration that an arm starts from and all its overrides."""
        own = self.arms[arm]
        if own and own[0].endswith(".yaml") and "=" not in own[0]:
            return own[0], (*self.overrides, *own[1:])
        return self.pretrain, (*self.overrides, *own)

    @property
    def measured(self) -> tuple[str, ...]:
        """Every probe that a finished run has a result of."""
        return (*self.probes, "segmentation") if self.segment else self.probes

    @property
    def chosen_arms(self) -> tuple[str, ...]:
        """The arms to run."""
        return self.only or tuple(self.arms)
