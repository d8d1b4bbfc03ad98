"""The cells of an audit: one arm with one seed, where it lives and the commands that fill it. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from audit.config import AuditConfig

# Where the programs start, and what configurations name their paths from.
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Cell:
    """One arm with one seed: a run directory and the commands that fill it."""

    config: AuditConfig
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the run, as an array of `slurm.submit` would have it."""
        return f"{self.arm}-seed{self.seed}"

    @property
    def directory(self) -> Path:
        """The run directory."""
        return audit_directory(self.config) / self.name

    @property
    def log(self) -> Path:
        """What the programs printed."""
        return audit_directory(self.config) / "logs" / f"{self.name}.log"

    @property
    def is_done(self) -> bool:
        """Whether every probe has its result."""
        return all(self.result(probe).is_file() for probe in self.config.measured)

    def result(self, probe: str) -> Path:
        """Returns where the result of a probe is."""
        return self.directory / "results" / f"{probe}.json"

    @property
    def pretraining(self) -> tuple[str, tuple[str, ...]]:
        """The configuration that it starts from, and every override."""
        start, overrides = self.config.start_of(self.arm)
        place = (
            f"run.name={self.name}",
            f"run.output_dir={audit_directory(self.config)}",
            f"run.seed={self.seed}",
        )
        return start, (*overrides, *place)

    @property
    def evaluations(self) -> list[tuple[str, tuple[str, ...]]]:
        """Every configuration that it is measured with, and its overrides."""
        config = self.config
        measured = (f"encoder={self.directory}", "controls=[]")
        probes = f"probes=[{','.join(config.probes)}]"
        found = [(config.evaluate, (*config.evaluate_overrides, *measured, probes))]
        if config.segment:
            found.append((config.segment, (*measured, "probes=[segmentation]")))
        return found

    def commands(self) -> list[list[str]]:
        """Returns the command lines of pretraining and of its evaluations."""
        start, overrides = self.pretraining
        commands = [["pretrain.py", start, *overrides]]
        commands += [["evaluate.py", path, *options] for path, options in self.evaluations]
        return [[sys.executable, *command] for command in commands]


def audit_directory(config: AuditConfig) -> Path:
    """Returns the folder of the audit's runs and tables: absolute, as its programs start in the repository."""
    return (Path(config.output_dir) / config.name).absolute()


def iterate_cells(config: AuditConfig, arms: Sequence[str]) -> Iterator[Cell]:
    """Yields the cells seed by seed: an audit that is stopped early has whole comparisons of fewer seeds."""
    for seed in config.seeds:
        for arm in arms:
            yield Cell(config, arm, seed)
