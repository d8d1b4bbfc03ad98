"""What a SLURM cluster is like, described once per site in `slurm/clusters/*.yaml`. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """One cluster; null leaves a choice to the cluster's own default.

    Attributes:
        partition: default of `--partition`.
        account: what the job is charged to.
        qos: quality of service.
        nodes: default of `--nodes`.
        gpus_per_node: default of `--gpus-per-node`; 0 on a cluster without GPUs.
        tasks_per_node: processes a node where `gpus_per_node` is 0; with GPUs there is one task per GPU.
        cpus_per_task: CPU cores a process: the loader's workers (`data.num_workers`) and 2 more.
        memory_per_cpu: such as `4G`.
        gpu_option: how the site counts GPUs: `gpus-per-node` (`--gpus-per-node=N`) or `gres` (`--gres=gpu:N`).
        time: default of `--time`, as D-HH:MM:SS, HH:MM:SS or minutes.
        signal: what warns of the time limit.
        warn_before_end_s: seconds from the warning to the time limit: at least what one save takes. Slurm's
            clock for this is coarse: the warning may come 60 s earlier.
        max_restarts: requeues after which a job stays down.
        min_uptime_s: a rank that is killed earlier than this after the start is not retried.
        sbatch_options: further options such as `--constraint=h100`.
        srun_options: options of every `srun`, such as `--container-image=IMAGE`.
        setup: shell lines before the program: modules, environment.
        environment: variables of the job, such as NCCL_SOCKET_IFNAME.
        python: the interpreter that `srun` starts; null is the one that runs submit.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: int = 1
    gpus_per_node: int = 4
    tasks_per_node: int = 1
    cpus_per_task: int = 10
    memory_per_cpu: str | None = None
    gpu_option: str = "gpus-per-node"
    time: str = "24:00:00"
    signal: str = "USR2"
    warn_before_end_s: int = 300
    max_restarts: int = 100
    min_uptime_s: int = 120
    sbatch_options: tuple[str, ...] = ()
    srun_options: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    python: str | None = None

    def __post_init__(self) -> None:
        """Refuses what sbatch would refuse later, or take and misread."""
        for name in ("nodes", "tasks_per_node", "cpus_per_task", "warn_before_end_s"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("gpus_per_node", "max_restarts", "min_uptime_s"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(
            self.gpu_option in ("gpus-per-node", "gres"),
            "gpu_option",
            self.gpu_option,
            "gpus-per-node or gres",
        )
        _require(self.signal in ("USR1", "USR2"), "signal", self.signal, "USR2 or USR1")
        _require(
            re.fullmatch(r"\d+|(\d+-)?\d+(:\d+){1,2}", self.time) is not None,
            "time",
            self.time,
            "minutes, HH:MM:SS or D-HH:MM:SS",
        )
        for option in self.sbatch_options + self.srun_options:
            _require(
                option.startswith("-"), "sbatch_options and srun_options", option, "options such as --x=y"
            )
        for name in self.environment:
            _require(re.fullmatch(r"[A-Za-z_]\w*", name) is not None, "environment", name, "variable names")

    @property
    def processes_per_node(self) -> int:
        """Tasks on each node: one per GPU, or `tasks_per_node` without GPUs."""
        return self.gpus_per_node or self.tasks_per_node

    @property
    def world_size(self) -> int:
        """Processes of one job."""
        return self.nodes * self.processes_per_node


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"cluster {name} is {value}; expected {rule}; set {name}")
