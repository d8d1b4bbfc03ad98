"""What would stop a job minutes or days after it was submitted, found before: each refusal is one line."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

from runtime.config import config_to_dict, read_yaml
from runtime.program import UserError
from slurm.config import ClusterConfig, parse_time_limit
from slurm.jobs import CHECKOUT, JOB_RECORD, Arm
from training.config_difference import describe_difference

_REMOTE = "://"


def check_arm(arm: Arm, cluster: ClusterConfig) -> None:
    """Refuses a run whose data, engine file, batch or directory cannot work on this cluster. Writes nothing.

    Raises:
        ValueError: with the key to change.
    """
    config = arm.config
    if config.data.images is not None:
        raise UserError(
            f"data.images is {config.data.images!r}; expected shards, as a job's GPUs would wait while one process "
            "writes them; write them with python -m data.make_shards imagefolder, and set data.shards"
        )
    _check_paths(arm)
    _check_shards(config.data.written_shards, config.data.split, "data.split")
    if arm.evaluation is not None:
        data = arm.evaluation.data
        key, shards = (
            "evaluation.test_split, or data.test_split of --evaluate-config",
            data.test_shards or data.shards,
        )
        if shards is not None:
            _check_shards(shards, data.test_split, key)
    if not (CHECKOUT / config.engine.deepspeed_config).is_file() and config.engine.name == "deepspeed":
        raise UserError(
            f"engine.deepspeed_config is {config.engine.deepspeed_config!r}; expected an existing JSON file; "
            "set engine.deepspeed_config to one of ds_configs/"
        )
    config.batch.micro_batch_size_per_gpu(cluster.world_size)
    config.data.check_ranks(cluster.world_size)
    if config.run.device == "cuda" and cluster.gpus_per_node == 0:
        raise UserError("run.device is cuda and the job asks for no GPU; expected GPUs; set --gpus-per-node")
    if config.run.dry_run:
        raise UserError("run.dry_run is true; expected a run that trains; run pretrain.py for its dry run")
    if not config.run.resume:
        raise UserError(
            "run.resume is false; expected true: a requeued job would start over; set run.name to begin a new run"
        )
    _check_run_directory(arm)


def scheduler_answers() -> bool:
    """Whether this machine has a Slurm whose controller can be asked."""
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        return False
    return subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True).returncode == 0


def check_scheduler(cluster: ClusterConfig) -> None:
    """Refuses a machine without Slurm, a partition that it does not have, and more time than the partition gives."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on PATH; expected a login node of a SLURM cluster; or pass --dry-run")
    # %P marks the default partition with a star; %l is the partition's MaxTime.
    done = subprocess.run(["sinfo", "-h", "-a", "-o", "%P %l"], capture_output=True, text=True)
    if done.returncode != 0:
        message = " ".join(done.stderr.split())
        raise UserError(f"sinfo failed: {message}; expected a reachable SLURM controller; try again")
    rows = [line.split() for line in done.stdout.splitlines()]
    limits = {row[0].removesuffix("*"): row[1] for row in rows if len(row) == 2}
    defaults = [row[0].removesuffix("*") for row in rows if row and row[0].endswith("*")]
    asked = cluster.partition.split(",") if cluster.partition else defaults
    missing = [name for name in asked if name not in limits]
    if missing and cluster.partition:
        known = sorted(limits)
        near = difflib.get_close_matches(missing[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"partition is {missing[0]!r}; expected one of {', '.join(known)}; set --partition{hint}"
        )
    # Beyond MaxTime Slurm takes the job and lets it wait for ever. A job for several partitions starts in any of them.
    wanted_s = parse_time_limit(cluster.time) or 0
    given_s = [parse_time_limit(limits[name]) or math.inf for name in asked if name in limits]
    if given_s and wanted_s > max(given_s):
        names = ", ".join(f"{name} {limits[name]}" for name in asked)
        raise UserError(
            f"time is {cluster.time}; expected at most the partition's MaxTime ({names}), beyond which a job never "
            "starts; set --time: a run that is stopped saves, requeues and goes on"
        )


def check_after(job_id: str) -> None:
    """Refuses to wait for a job that is not there or that has already ended badly; sbatch's own words say neither."""
    done = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True)
    states = re.findall(r"JobState=(\w+)", done.stdout)
    alive = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "COMPLETED")
    bad = sorted(set(states) - set(alive))
    if done.returncode != 0 or not states or bad:
        state = ", ".join(bad) or "unknown to Slurm"
        raise UserError(
            f"--after is {job_id}, which is {state}; expected a job that waits, runs or has succeeded; "
            "leave --after out to start at once"
        )


def check_queue(arm: Arm, after: str | None) -> None:
    """Refuses a second job for a run directory: two jobs that write one run destroy it."""
    record = arm.run_dir / JOB_RECORD
    job_ids = record.read_text().split() if record.is_file() else []
    if not job_ids:
        return
    queued = subprocess.run(
        ["squeue", "-h", "--me", "-o", "%A %F"], capture_output=True, text=True, check=False
    ).stdout.split()
    alive = [job_id for job_id in job_ids if job_id in queued and job_id != after]
    if alive:
        raise UserError(
            f"{arm.run_dir} is trained by job {alive[-1]}; expected one job a run directory; "
            f"scancel {alive[-1]} first, or pass --after {alive[-1]}, or set run.name"
        )


def _check_paths(arm: Arm) -> None:
    config = arm.config
    for key, path in (("data.shards", config.data.written_shards), ("run.output_dir", config.run.output_dir)):
        # The job runs in a copy of the checkout, where a path that climbs out of it means another place.
        if path.startswith("..") or (
            _REMOTE not in path and not Path(path).is_absolute() and Path.cwd() != CHECKOUT
        ):
            raise UserError(
                f"{key} is {path!r}; expected an absolute path, or one below {CHECKOUT} from where submit is started; "
                f"set {key}"
            )
    if Path(config.run.output_dir).absolute() == CHECKOUT:
        raise UserError(
            f"run.output_dir is {config.run.output_dir!r}, the checkout itself; expected a folder of its own, "
            "which is not copied with the code; set run.output_dir=outputs"
        )


def _check_shards(shards: str, split: str, key: str) -> None:
    if _REMOTE in shards:
        return
    # data.shards may also be a brace list of some tars of a folder.
    folder = Path(shards).parent if shards.endswith(".tar") else Path(shards)
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise UserError(
            f"data.shards is {shards!r}; expected a folder with manifest.json; write one with "
            "python -m data.make_shards, or set data.shards"
        )
    try:
        splits = json.loads(manifest.read_bytes())["splits"]
        names = {name: [shard["name"] for shard in splits[name].get("shards", ())] for name in splits}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{manifest} cannot be read ({type(error).__name__}); expected JSON; write it again"
        ) from error
    if split not in names:
        raise UserError(f"split is {split!r}; expected one of {', '.join(sorted(names))}; set {key}")
    present = {path.name for path in folder.iterdir()}
    missing = [name for name in names[split] if name not in present and not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(names[split])} shards of split {split!r}, {missing[0]} first; "
            "expected every tar that manifest.json lists; copy them again, or set data.shards"
        )


def _check_run_directory(arm: Arm) -> None:
    """Refuses a directory that cannot be made or written, or that another configuration has made its own."""
    existing = next(path for path in (arm.run_dir, *arm.run_dir.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"run directory {arm.run_dir} cannot be written ({existing} is no directory of yours); expected a place "
            "to write; set run.output_dir"
        )
    claimed = arm.run_dir / "config.yaml"
    if claimed.is_file():
        problem = describe_difference(arm.run_dir, read_yaml(str(claimed)), config_to_dict(arm.config))
        if problem is not None:
            raise UserError(problem)
