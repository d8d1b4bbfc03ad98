"""What a SLURM cluster is like, described once per site in `slurm/clusters/*.yaml`. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

# What Slurm's own names are made of; commas separate several.
_NAMES = r"[^\s'\"\\#=,]+(,[^\s'\"\\#=,]+)*"
_OPTION = r"--?[A-Za-z][\w-]*(=.*)?"


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """One cluster; null leaves a choice to the cluster's own default."""

    partition: str | None = None
    """Default of `--partition`."""
    account: str | None = None
    """What the job is charged to."""
    qos: str | None = None
    """Quality of service."""
    nodes: Annotated[int, "[1, 1e6]"] = 1
    """Default of `--nodes`."""
    gpus_per_node: Annotated[int, "[0, 1024]"] = 4
    """Default of `--gpus-per-node`; 0 on a cluster without GPUs."""
    tasks_per_node: Annotated[int, "[1, 1024]"] = 1
    """Processes a node where `gpus_per_node` is 0; with GPUs there is one task per GPU."""
    cpus_per_task: Annotated[int, "[1, 1e4]"] = 12
    """CPU cores a process: the loader's workers (`data.num_workers`) and 2 more."""
    memory_per_cpu: str | None = None
    """Default of `--mem-per-cpu`, such as `4G`."""
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """How the site counts GPUs: `gpus-per-node` (`--gpus-per-node=N`) or `gres` (`--gres=gpu:N`)."""
    time: str = "24:00:00"
    """Default of `--time`, as D-HH:MM:SS, HH:MM:SS or minutes. Not 0, which Slurm takes for no limit at all.
    """
    signal: Literal["USR2", "USR1"] = "USR2"
    """What warns of the time limit."""
    warn_before_end_s: Annotated[int, "[1, 65535]"] = 300
    """Seconds from the warning to the time limit: at least what one save takes. Slurm's clock for this is
    coarse: the warning may come 60 s earlier.
    """
    max_restarts: Annotated[int, "[0, 1e6]"] = 100
    """Requeues after which a job stays down."""
    min_uptime_s: Annotated[int, "[0, 1e6]"] = 120
    """A rank that is killed earlier than this after the start is not retried."""
    sbatch_options: tuple[str, ...] = ()
    """Further options such as `--constraint=h100`."""
    srun_options: tuple[str, ...] = ()
    """Options of every `srun`, such as `--container-image=IMAGE`."""
    setup: tuple[str, ...] = ()
    """Shell lines before the program: modules, environment."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the job, such as NCCL_SOCKET_IFNAME."""
    python: str | None = None
    """The interpreter that `srun` starts; null is the one that runs submit."""

    def __post_init__(self) -> None:
        """Refuses what sbatch would refuse later, or take and misread."""
        for name in ("partition", "account", "qos"):
            value = getattr(self, name)
            _require(value is None or re.fullmatch(_NAMES, value), name, value, "a name as Slurm lists it")
        memory = self.memory_per_cpu
        _require(
            memory is None or re.fullmatch(r"[1-9]\d*[KMGT]?", memory), "memory_per_cpu", memory, "such as 4G"
        )
        limit_s = parse_time_limit(self.time)
        _require(
            limit_s is not None and self.warn_before_end_s < limit_s < math.inf,
            "time",
            self.time,
            "minutes, HH:MM:SS or D-HH:MM:SS, "
            f"longer than warn_before_end_s {self.warn_before_end_s} and not 0, which Slurm takes for unlimited",
        )
        for name in ("sbatch_options", "srun_options"):
            for option in getattr(self, name):
                _require(re.fullmatch(_OPTION, option), name, option, "one option an item, such as --x=y")
        for name in self.environment:
            _require(re.fullmatch(r"[A-Za-z_]\w*", name), "environment", name, "variable names")

    @property
    def processes_per_node(self) -> int:
        """Tasks on each node: one per GPU, or `tasks_per_node` without GPUs."""
        return self.gpus_per_node or self.tasks_per_node

    @property
    def world_size(self) -> int:
        """Processes of one job."""
        return self.nodes * self.processes_per_node


def parse_time_limit(text: str) -> float | None:
    """Returns the seconds of a time limit as Slurm writes and reads it, infinity for none; None for other text.

    Forms: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS, `infinite`, `UNLIMITED`.
    """
    if text.lower() in ("infinite", "unlimited"):
        return math.inf
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", text, re.ASCII)
    if match is None:
        return None
    days, *given = (None if part is None else int(part) for part in match.groups())
    numbers = [number for number in given if number is not None]
    if days is None and len(numbers) < 3:  # minutes, or minutes and seconds
        numbers.insert(0, 0)
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return ((days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds


def _require(holds: object, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"cluster {name} is {value!r}; expected {rule}; set {name}")
