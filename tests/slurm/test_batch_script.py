"""slurm/pretrain.sbatch by hand on a real Slurm: every way to be stopped, with a stand-in for the trainer."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.conftest import KILL_WAIT_S
from tests.slurm.private_cluster import PrivateCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


class Job:
    """One job of the template, started by hand, with a directory for the stand-in's files and its log."""

    def __init__(
        self, cluster: PrivateCluster, home: Path, *options: str, arguments: str = "", **variables: str
    ):
        self.cluster = cluster
        self.home = home
        self.log_path = home / "log"
        exported = {"PYTHON": sys.executable, "MIN_UPTIME_S": "0", **variables}
        self.id = cluster.submit(
            *TWO_NODES,
            f"--output={self.log_path}",
            "--export=ALL," + ",".join(f"{key}={value}" for key, value in exported.items()),
            *options,
            str(ROOT / "slurm" / "pretrain.sbatch"),
            str(home),
            *arguments.split(),
            cwd=ROOT / "tests" / "slurm" / "stand_in",
        )

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def wait_for_log(self, text: str, timeout_s: float = 60) -> None:
        assert self.cluster.wait_until(lambda: text in self.log, timeout_s), (
            f"{text!r} not in log:\n{self.log}"
        )

    def wait_until_stepping(self) -> None:
        self.wait_for_log("rank 0 starts")
        self.wait_for_log("rank 1 starts")
        time.sleep(0.6)

    def pid(self, rank: int) -> int:
        return int((self.home / f"pid.{rank}").read_text())

    def saved_step(self, rank: int) -> int:
        return int((self.home / f"step.{rank}").read_text())

    def end(self) -> str:
        """Lets a requeued job start at once and returns its last state."""
        return self.cluster.wait_for_state(
            self.id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout_s=120, release=True
        )

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.id)["Restarts"])


def assert_saved_once_and_went_on(job: Job) -> None:
    """Both ranks saved the same step before the requeue, started there afterwards, and finished."""
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == 1, job.log
    assert job.saved_step(0) == job.saved_step(1) > 0
    for rank in (0, 1):
        assert f"rank {rank} starts at step {job.saved_step(rank)}\n" in job.log, job.log
        assert f"rank {rank} is done" in job.log, job.log
    assert len(re.findall("preempted.*, the state is saved", job.log)) == 1, job.log


@pytest.mark.parametrize(
    "stop",
    [
        ("scancel", "--signal=USR2"),
        ("scancel", "--signal=TERM"),
        ("scancel", "--batch", "--signal=USR2"),
        ("scancel", "--batch", "--signal=TERM"),
        ("scancel", "--full", "--signal=USR1"),
        ("scontrol", "requeue"),
    ],
    ids=" ".join,
)
def test_stopped_saves_requeues_once_and_goes_on(
    stop: tuple[str, ...], cluster: PrivateCluster, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path)
    job.wait_until_stepping()
    cluster.run(*stop, str(job.id))
    assert_saved_once_and_went_on(job)
    by_slurm = "Slurm has requeued" in job.log
    assert by_slurm == (stop == ("scontrol", "requeue")), job.log


def test_a_signal_to_one_rank_is_enough(cluster: PrivateCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path)
    job.wait_until_stepping()
    os.kill(job.pid(1), signal.SIGUSR2)
    assert_saved_once_and_went_on(job)


@pytest.mark.parametrize("partition", ["main", "graced"])
def test_preempted_by_a_higher_partition(partition: str, cluster: PrivateCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, f"--partition={partition}", "--exclusive")
    job.wait_until_stepping()
    urgent = ("--partition=urgent", "--exclusive", f"--nodes={cluster.num_nodes}", "--output=/dev/null")
    cluster.submit(*urgent, "--wrap=sleep 1")
    assert_saved_once_and_went_on(job)
    # With a grace time the job is still its own master when it has saved: then the script requeues it.
    assert ("Slurm has requeued" in job.log) == (partition == "main"), job.log


def test_warned_before_the_time_limit(cluster: PrivateCluster, tmp_path: Path) -> None:
    # Slurm looks every 30 s and warns up to 60 s early: with 15 s, between 15 s and 45 s after the start.
    job = Job(cluster, tmp_path, "--time=1", "--signal=USR2@15", STEPS="200")
    cluster.wait_for_state(job.id, "RUNNING")
    cluster.wait_for_state(job.id, "PENDING", timeout_s=100)
    assert "preempted, the state is saved" in job.log and "TIME LIMIT" not in job.log, job.log
    assert (saved := job.saved_step(0)) == job.saved_step(1)
    assert job.end() == "COMPLETED", job.log
    assert f"rank 1 starts at step {saved}\n" in job.log and "rank 1 is done" in job.log, job.log


def test_the_time_limit_itself_saves_and_requeues(cluster: PrivateCluster, tmp_path: Path) -> None:
    """Without a warning there is KillWait; Slurm has then already called the job timed out."""
    job = Job(cluster, tmp_path, "--time=1", "--signal=CONT@1", STEPS="400")
    job.wait_until_stepping()
    cluster.wait_for_state(job.id, "PENDING", timeout_s=130)
    assert "DUE TO TIME LIMIT" in job.log
    assert_saved_once_and_went_on(job)


def test_what_depends_on_a_job_waits_through_its_requeue(cluster: PrivateCluster, tmp_path: Path) -> None:
    """The script of a preempted start ends with 0: that must not pass for the run's success."""
    job = Job(cluster, tmp_path)
    job.wait_until_stepping()
    after = cluster.submit(f"--dependency=afterok:{job.id}", "--output=/dev/null", "--wrap=true")
    cluster.run("scancel", "--signal=USR2", str(job.id))
    cluster.wait_for_state(job.id, "PENDING", timeout_s=30)
    time.sleep(3)
    assert cluster.job(after)["JobState"] == "PENDING", "it started on half a run"
    assert_saved_once_and_went_on(job)
    assert cluster.wait_for_state(after, "COMPLETED", timeout_s=30)


def test_cancelled_saves_and_stays_down(cluster: PrivateCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, SAVE_S="2")
    job.wait_until_stepping()
    cluster.run("scancel", str(job.id))
    time.sleep(0.7)
    cluster.run("scancel", str(job.id), check=False)  # an impatient second one does no harm
    assert job.end() == "CANCELLED"
    job.wait_for_log("is cancelled; not requeued", 20)
    assert job.saved_step(0) == job.saved_step(1) > 0
    time.sleep(2)
    assert cluster.job(job.id)["JobState"] == "CANCELLED", "scontrol requeue would bring it back"


def test_killed_rank_ends_the_job_and_is_retried(cluster: PrivateCluster, tmp_path: Path) -> None:
    """The other rank waits for ever, which is the worst case: it lives for KillWait."""
    job = Job(cluster, tmp_path)
    job.wait_until_stepping()
    started = time.monotonic()
    os.kill(job.pid(1), signal.SIGKILL)
    cluster.wait_for_state(job.id, "PENDING", timeout_s=30)
    assert time.monotonic() - started <= KILL_WAIT_S + 10
    job.wait_for_log("task 1: Killed) before all had saved", 5)
    assert job.end() == "COMPLETED", job.log


def test_a_rank_killed_right_after_the_start_is_not_retried(cluster: PrivateCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, MIN_UPTIME_S="120")
    job.wait_until_stepping()
    os.kill(job.pid(1), signal.SIGKILL)
    assert job.end() == "FAILED"
    assert job.restarts == 0
    assert "it would repeat; not requeued" in job.log


@pytest.mark.parametrize(("code", "line"), [(1, "(exit 1): a fault"), (2, "refused to start (exit 2)")])
def test_faults_and_mistakes_are_not_retried(
    code: int, line: str, cluster: PrivateCluster, tmp_path: Path
) -> None:
    """The other rank waits in a collective and is killed by Slurm: srun's own exit code then says 137."""
    job = Job(cluster, tmp_path, arguments=f"exit={code}")
    assert job.end() == "FAILED"
    assert job.restarts == 0
    assert line in job.log, job.log


def test_a_save_that_does_not_fit_falls_back_and_says_so(cluster: PrivateCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, SAVE_S=str(KILL_WAIT_S + 30))
    job.wait_until_stepping()
    cluster.run("scontrol", "requeue", str(job.id))
    cluster.wait_for_state(job.id, "PENDING", timeout_s=60)
    # Slurm kills the script together with the ranks: it has said beforehand what that means.
    job.wait_for_log("SIGTERM: a rank's save has until Slurm's SIGKILL", 5)
    assert "the next start continues from the newest complete checkpoint" in job.log
    assert "preempted" not in job.log and not (tmp_path / "step.0").exists()
    assert job.end() == "COMPLETED", job.log
    assert "rank 0 starts at step 0" in job.log.split("start 2:")[1], job.log


def test_restarts_are_capped(cluster: PrivateCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, STEPS="80", MAX_RESTARTS="1")
    job.wait_until_stepping()
    cluster.run("scancel", "--signal=USR2", str(job.id))
    cluster.wait_for_state(job.id, "PENDING", timeout_s=30)
    cluster.wait_for_state(job.id, "RUNNING", timeout_s=60, release=True)
    job.wait_for_log("start 2:")
    time.sleep(2)
    cluster.run("scancel", "--signal=USR2", str(job.id))
    assert job.end() == "FAILED"
    assert "was restarted 1 times, which is MAX_RESTARTS" in job.log, job.log
    assert job.restarts == 1


def test_one_task_of_an_array_is_requeued_alone(cluster: PrivateCluster, tmp_path: Path) -> None:
    """The plain id of an array's last started task is also the array's: requeueing it would restart all."""
    home = tmp_path / "0"
    (tmp_path / "1").mkdir()
    home.mkdir()
    job = Job(cluster, home, "--array=0-1", f"--output={tmp_path}/%a/log", STEPS="40")
    job.log_path = tmp_path / "1" / "log"
    assert cluster.wait_until(lambda: "rank 1 starts" in job.log, 60), job.log
    time.sleep(0.6)
    cluster.run("scancel", "--signal=USR2", f"{job.id}_1")
    job.wait_for_log("is requeued (restart 1", 30)
    time.sleep(2)
    shown = cluster.run("scontrol", "show", "job", str(job.id))
    restarts = {
        block.split("ArrayTaskId=")[1].split()[0]: block.split("Restarts=")[1].split()[0]
        for block in shown.split("\n\n")
        if "ArrayTaskId=" in block
    }
    assert restarts == {"0": "0", "1": "1"}, shown
    cluster.run("scancel", str(job.id))


@pytest.mark.parametrize("peer_timeout_s", ["inf", "1"], ids=["peer hangs", "peer fails"])
def test_a_lost_node_is_replaced(peer_timeout_s: str, cluster: PrivateCluster, tmp_path: Path) -> None:
    """slurmd, its step daemon and its rank die at once; the peer then hangs, or ends with an ordinary error."""
    apart = "--exclude=" + ",".join(cluster.nodes[2:])
    job = Job(cluster, tmp_path, apart, STEPS="60", PEER_TIMEOUT_S=peer_timeout_s)
    job.wait_until_stepping()
    lost = cluster.nodes[1]
    step_daemon = int(parent_of(job.pid(1)))
    cluster.stop_daemon(f"slurmd-{lost}", signal.SIGKILL)
    os.kill(step_daemon, signal.SIGKILL)
    os.kill(job.pid(1), signal.SIGKILL)
    started = time.monotonic()
    try:
        # Slurm misses the node after SlurmdTimeout (10 s here, 300 s by default) and its ping interval.
        cluster.wait_for_state(job.id, "PENDING", timeout_s=90)
        print(f"requeued {time.monotonic() - started:.0f} s after the loss")
        assert job.restarts == 1
        cluster.run("scontrol", "update", f"JobId={job.id}", "ExcNodeList=" + lost)
        assert job.end() == "COMPLETED", job.log
        assert cluster.job(job.id)["NodeList"] != f"{cluster.nodes[0]},{lost}"
    finally:
        cluster.start_node(lost)
        idle = lambda: cluster.run("sinfo", "-h", "-n", lost, "-p", "main", "-o", "%T").strip() == "idle"  # noqa: E731
        assert cluster.wait_until(idle, 60)


def parent_of(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("PPid"))
