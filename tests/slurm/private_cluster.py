"""A real Slurm on this machine, of our own: private configuration, ports, state, munge socket; several slurmd.

Nothing of a system-wide Slurm is read or written: every command runs with `SLURM_CONF` of this cluster. Only
processes that were started here are ended, by their process id.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")

CONFIGURATION = """
ClusterName={name}
FirstJobId={first_job_id}
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
SlurmctldPort={controller_port}
StateSaveLocation={home}/state
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmdSpoolDir={home}/spool-%n
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait={kill_wait_s}
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
MinJobAge=3600
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=graced Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=60 State=UP
"""


def missing_programs() -> list[str]:
    """Returns which of Slurm's and munge's programs are not installed."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


@dataclass
class PrivateCluster:
    """One controller and some nodes; a context manager.

    Attributes:
        kill_wait_s: seconds between Slurm's SIGTERM and its SIGKILL.
        cpus_per_node: what each node claims to have, far more than there is; Slurm does not bind tasks here.
    """

    kill_wait_s: int = 30
    cpus_per_node: int = 64
    num_nodes: int = 4
    home: Path = field(init=False)
    nodes: tuple[str, ...] = field(init=False)
    daemons: dict[str, subprocess.Popen] = field(init=False, default_factory=dict)

    def __enter__(self) -> PrivateCluster:
        # munged wants every parent directory of its socket to be open to all, which pytest's tmp_path is not.
        self.home = Path(tempfile.mkdtemp(prefix="private-slurm-", dir="/tmp"))
        self.home.chmod(0o755)
        self.name = self.home.name
        # The rendezvous takes the first name of the node list, which must resolve.
        self.nodes = (name_of_this_machine(), *(f"zz{index}" for index in range(2, self.num_nodes + 1)))
        ports = free_ports(1 + self.num_nodes)
        for part in ("state", *(f"spool-{node}" for node in self.nodes)):
            (self.home / part).mkdir()
        nodes = "\n".join(
            f"NodeName={node} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus_per_node} "
            "Gres=gpu:4 RealMemory=1000 State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        )
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        (self.home / "slurm.conf").write_text(
            CONFIGURATION.format(
                name=self.name,
                # The rendezvous port follows from the job's number: two clusters on one machine mostly keep apart.
                first_job_id=1 + 100 * secrets.randbelow(190),
                user=user,
                home=self.home,
                controller_port=ports[0],
                kill_wait_s=self.kill_wait_s,
                nodes=nodes,
            )
        )
        # GPUs that are counted and do not exist: the templates' options are then tried as they are.
        for index in range(4):
            (self.home / f"gpu{index}").touch()
        (self.home / "gres.conf").write_text(f"Name=gpu File={self.home}/gpu[0-3]\n")
        try:
            self._start_daemons()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.run("scancel", "--full", "--user", str(os.getuid()), timeout=10)
            self.wait_until(lambda: not self.run("squeue", "-h", timeout=10).strip(), 15)
        for name in reversed(list(self.daemons)):
            self.stop_daemon(name)
        shutil.rmtree(self.home, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every command of this cluster; nothing of a surrounding job or launcher leaks in."""
        launchers = ("SLURM", "SBATCH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
        kept["PATH"] = kept.get("PATH", "") + ":/usr/sbin:/sbin"
        own = {
            "SLURM_CONF": str(self.home / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            # Not the home directory's: a lock that a killed process left there would be waited for.
            "TORCH_EXTENSIONS_DIR": str(self.home / "torch_extensions"),
        }
        return {**kept, **own}

    def run(self, *command: str, check: bool = True, timeout: float = 60, cwd: Path | None = None) -> str:
        """Returns a command's standard output; raises with its standard error."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, cwd=cwd
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} returned {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def submit(self, *arguments: str, cwd: Path | None = None) -> int:
        """Returns the id of a new job."""
        return int(self.run("sbatch", "--parsable", *arguments, cwd=cwd).split(";")[0])

    def job(self, job_id: int) -> dict[str, str]:
        """Returns `scontrol show job` as a mapping."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", str(job_id))))

    def wait_for_state(self, job_id: int, *states: str, timeout_s: float = 60, release: bool = False) -> str:
        """Returns the state once it is one of `states`; with `release`, ends a requeued job's hold at once."""

        def reached() -> str | None:
            job = self.job(job_id)
            held = job["JobState"] == "PENDING" and job["Reason"] in ("BeginTime", "None")
            if release and held:
                # Slurm holds a requeued job for two minutes, in which the nodes forget its former start; a
                # start within the same second as the former end fails without a log.
                self.wait_until(lambda: not self.run("squeue", "-h", "-t", "completing").strip(), 30)
                time.sleep(2)
                self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now", check=False)
            return job["JobState"] if job["JobState"] in states else None

        state = self.wait_until(reached, timeout_s)
        assert state, f"job {job_id} is {self.job(job_id)}; expected {states} within {timeout_s} s"
        return state

    @staticmethod
    def wait_until(condition, timeout_s: float, interval_s: float = 0.2):  # type: ignore[no-untyped-def]
        """Returns the condition's first true value, or its last one after the timeout."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()) and time.monotonic() < deadline:
            time.sleep(interval_s)
        return value

    def stop_daemon(self, name: str, number: int = signal.SIGTERM) -> None:
        """Ends one daemon that this object started."""
        daemon = self.daemons.pop(name)
        daemon.send_signal(number)
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait(timeout=10)

    def start_node(self, node: str) -> None:
        """Starts one slurmd."""
        self._start(f"slurmd-{node}", "slurmd", "-D", "-N", node, "-f", str(self.home / "slurm.conf"))

    def _start_daemons(self) -> None:
        key = self.home / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        paths = {name: f"{self.home}/munge.{name}" for name in ("socket", "pid", "log", "seed")}
        options = [f"--{name}-file={paths[name]}" for name in ("pid", "log", "seed")]
        self._start(
            "munged",
            "munged",
            "--foreground",
            "--force",
            f"--socket={paths['socket']}",
            f"--key-file={key}",
            *options,
        )
        assert self.wait_until(lambda: Path(paths["socket"]).exists(), 10), "munged did not open its socket"
        self._start("slurmctld", "slurmctld", "-D", "-i", "-f", str(self.home / "slurm.conf"))
        for node in self.nodes:
            self.start_node(node)

        def all_idle() -> bool:
            states = self.run("sinfo", "-h", "-p", "main", "-N", "-o", "%T", check=False).split()
            return states == ["idle"] * self.num_nodes

        assert self.wait_until(all_idle, 40), self.run("sinfo", "-N", "-l", check=False) + self._daemon_logs()
        assert f"ClusterName             = {self.name}\n" in self.run("scontrol", "show", "config")

    def _start(self, name: str, *command: str) -> None:
        log = (self.home / f"{name}.out").open("ab")
        self.daemons[name] = subprocess.Popen(
            command,
            env=self.environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _daemon_logs(self) -> str:
        logs = sorted(self.home.glob("*.out"))
        return "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in logs)


def name_of_this_machine() -> str:
    """Returns a name of this machine that resolves to it; Slurm refuses a node called localhost."""
    own = socket.gethostname()
    hosts = Path("/etc/hosts")
    lines = hosts.read_text().splitlines() if hosts.exists() else []
    local = [name for line in lines if line.startswith("127.") for name in line.split("#")[0].split()[1:]]
    for name in (own.split(".")[0], own, *local):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((socket.gethostbyname(name), 0))
            if not name.startswith("localhost"):
                return name
    raise RuntimeError(f"no name of this machine resolves to it; expected {own} in /etc/hosts; add it")


def free_ports(count: int) -> list[int]:
    """Returns TCP ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
