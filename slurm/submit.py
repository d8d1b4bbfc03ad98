"""Submits a pretraining run, or an array of them, to SLURM; with evaluation after it.

    python -m slurm.submit CONFIG.yaml [key.sub=value ...] [--nodes 4] [--gpus-per-node 8] [--partition gpu]
        [--time 24:00:00] [--array seeds=0,1,2] [--after JOB] [--evaluate knn,linear,long_tail] [--cluster NAME]
        [--dry-run]

Everything that can be refused is refused here, in one line and before a queue: configuration, data, batch and
world size, run directory, partition and its time limit. `--dry-run` prints the batch scripts and changes nothing; where
a Slurm answers, it is asked whether it would take them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from evaluation.config import EvaluationConfig
from runtime.config import build_config, config_to_yaml, load_config, read_yaml
from runtime.program import EXIT_DONE, UserError, run_program
from slurm.checks import check_after, check_arm, check_queue, check_scheduler, scheduler_answers
from slurm.config import ClusterConfig
from slurm.jobs import (
    CHECKOUT,
    JOB_RECORD,
    Arm,
    expand_array,
    render_evaluate,
    render_pretrain,
    snapshot_code,
)
from training.config import PretrainConfig

CLUSTER_VARIABLE = "SLURM_SUBMIT_CLUSTER"
_DRY_RUN_NAME = "dry-run"


class _Parser(argparse.ArgumentParser):
    """Mistakes on the command line are one line, like every other one."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; expected {' '.join(self.format_usage().split())}")


@dataclass(frozen=True)
class Submission:
    """What one call submits."""

    cluster: ClusterConfig
    arms: tuple[Arm, ...]
    directory: Path
    dependency: str | None

    @property
    def evaluates(self) -> bool:
        """Whether an evaluation follows."""
        return self.arms[0].evaluation is not None


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 once everything is in the queue."""
    options = _parse(arguments)
    submission = plan(options)
    for arm in submission.arms:
        check_arm(arm, submission.cluster)
    if options.dry_run:
        print("\n".join(show(submission)))
        return EXIT_DONE
    check_scheduler(submission.cluster)
    if options.after:
        check_after(options.after)
    for arm in submission.arms:
        check_queue(arm, options.after)
    write(submission)
    report(submission, options.config, *submit(submission))
    return EXIT_DONE


def show(submission: Submission) -> list[str]:
    """Returns the batch scripts, of which Slurm has said, where there is one, that it would take them."""
    cluster, arms, directory = submission.cluster, submission.arms, submission.directory
    scripts = [render_pretrain(cluster, arms, directory, submission.dependency)]
    if submission.evaluates:
        scripts.append(render_evaluate(cluster, arms, directory))
    if scheduler_answers():
        check_scheduler(cluster)
        for script in scripts:
            _sbatch("--test-only", script=script)
    return scripts


def plan(options: argparse.Namespace) -> Submission:
    """Returns what the command line asks for; reads files, writes none.

    Raises:
        ValueError: a mistake in a configuration, in one line.
    """
    cluster = load_cluster(options)
    base = load_config(PretrainConfig, options.config, options.overrides)
    arms = []
    for suffix, overrides in expand_array(options.array or []):
        config = load_config(PretrainConfig, options.config, [*options.overrides, *overrides])
        config = replace(config, run=replace(config.run, name=base.run.name + suffix))
        evaluation = load_evaluation(options, config) if options.evaluate else None
        arms.append(Arm(config, evaluation))
    parent = Path(base.run.output_dir).absolute() / base.run.name / "slurm"
    numbers = [int(path.name) for path in parent.glob("[0-9]*") if path.name.isdigit()]
    directory = parent / (_DRY_RUN_NAME if options.dry_run else f"{max(numbers, default=0) + 1:03d}")
    if options.after and not re.fullmatch(r"[1-9]\d*(_\d+)?", options.after, re.ASCII):
        raise UserError(
            f"--after is {options.after!r}; expected a job's number, such as 4711 or 4711_2; set --after"
        )
    dependency = f"afterok:{options.after}" if options.after else None
    return Submission(cluster, tuple(arms), directory, dependency)


def load_cluster(options: argparse.Namespace) -> ClusterConfig:
    """Returns the description of the cluster with the command line's choices in it."""
    name = options.cluster or os.environ.get(CLUSTER_VARIABLE, "example")
    folder = CHECKOUT / "slurm" / "clusters"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise UserError(
            f"cluster is {name!r}; expected one of {', '.join(known)}; set --cluster, or write NAME.yaml in {folder}"
        )
    values = read_yaml(str(folder / f"{name}.yaml"))
    if values.get("python") is None:
        values["python"] = sys.executable
    chosen = {key: getattr(options, key) for key in ("nodes", "gpus_per_node", "partition", "time")}
    return build_config(
        ClusterConfig, {**values, **{key: value for key, value in chosen.items() if value is not None}}
    )


def load_evaluation(options: argparse.Namespace, config: PretrainConfig) -> EvaluationConfig:
    """Returns the evaluation of a run: its YAML file, or the run's own data, with the probes asked for."""
    encoder = str(Path(config.run.output_dir) / config.run.name)
    probes = options.evaluate.split(",")
    if options.evaluate_config:
        settings = read_yaml(options.evaluate_config)
        return build_config(EvaluationConfig, {**settings, "encoder": encoder, "probes": probes})
    data = {
        "shards": config.data.shards,
        "train_split": config.data.split,
        "test_split": config.evaluation.test_split,
    }
    return build_config(EvaluationConfig, {"encoder": encoder, "probes": probes, "data": data})


def write(submission: Submission) -> None:
    """Makes the submission's directory: code, configurations, batch scripts, and the run directories.

    Raises:
        UserError: no place to write; nothing of the submission is left behind.
    """
    made = False
    try:
        submission.directory.mkdir(parents=True)
        made = True
        _write_files(submission)
    except OSError as error:
        if made:  # else it is another submission's, made in the same moment
            shutil.rmtree(submission.directory, ignore_errors=True)
        raise UserError(
            f"{error.filename or submission.directory} cannot be written ({error.strerror}); expected a place for the "
            "run and a copy of the code; set run.output_dir"
        ) from error


def _write_files(submission: Submission) -> None:
    directory = submission.directory
    for arm in submission.arms:
        arm.run_dir.mkdir(parents=True, exist_ok=True)
        (arm.run_dir / JOB_RECORD).touch()
        name = arm.config.run.name.replace("/", "_")
        (directory / f"{name}.yaml").write_text(config_to_yaml(arm.config))
        if arm.evaluation is not None:
            (directory / f"{name}.eval.yaml").write_text(config_to_yaml(arm.evaluation))
    snapshot_code(directory / "code", Path(submission.arms[0].config.run.output_dir).absolute())
    script = render_pretrain(submission.cluster, submission.arms, directory, submission.dependency)
    (directory / "pretrain.sbatch").write_text(script)
    if submission.evaluates:
        script = render_evaluate(submission.cluster, submission.arms, directory)
        (directory / "evaluate.sbatch").write_text(script)


def submit(submission: Submission) -> tuple[str, str | None]:
    """Queues the jobs and returns the ids of pretraining and of evaluation; both are queued or none."""
    script, evaluation = (str(submission.directory / name) for name in ("pretrain.sbatch", "evaluate.sbatch"))
    job_id, evaluation_id = None, None
    try:
        _sbatch("--test-only", script)
        if submission.evaluates:
            _sbatch("--test-only", evaluation)
        job_id = _sbatch("--parsable", script)
        if submission.evaluates:
            # aftercorr: task i of the evaluation waits for task i of the array only.
            kind = "aftercorr" if len(submission.arms) > 1 else "afterok"
            evaluation_id = _sbatch("--parsable", f"--dependency={kind}:{job_id}", evaluation)
    except UserError:
        if job_id is not None:
            subprocess.run(["scancel", job_id], check=False)
        shutil.rmtree(submission.directory)
        raise
    for arm in submission.arms:
        with (arm.run_dir / JOB_RECORD).open("a") as record:
            record.write(job_id + "\n")
    return job_id, evaluation_id


def report(submission: Submission, config_path: str, job_id: str, evaluation_id: str | None) -> None:
    """Prints what was queued and what to type next."""
    cluster, directory = submission.cluster, submission.directory
    unit = "GPU" if cluster.gpus_per_node else "process"
    print(
        f"submitted job {job_id}: {len(submission.arms)} run(s) of {config_path} on {cluster.nodes} node(s) x "
        f"{cluster.processes_per_node} {unit}(s)"
    )
    for index, arm in enumerate(submission.arms):
        log = f"{job_id}.log" if len(submission.arms) == 1 else f"{job_id}_{index}.log"
        print(f"  run     {arm.run_dir}\n  log     {directory / log}")
    if evaluation_id is not None:
        print(f"  then    job {evaluation_id} evaluates; results/*.json appear in the run directory")
    first = f"{job_id}.log" if len(submission.arms) == 1 else f"{job_id}_0.log"
    print(f"  watch   squeue -j {job_id}; tail -F {directory / first}")
    print(f"  cancel  scancel {job_id}      (saves and stays down; scancel twice does no harm)")
    print("  resume  the same command again: the run goes on from its newest complete checkpoint")


def _sbatch(*arguments: str, script: str | None = None) -> str:
    done = subprocess.run(["sbatch", *arguments], input=script, capture_output=True, text=True)
    if done.returncode != 0:
        message = " ".join(done.stderr.replace("sbatch: error:", "").split()) or "no message"
        raise UserError(f"sbatch refused the job: {message}; mend the options or the cluster's description")
    return done.stdout.strip().split(";")[0]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m slurm.submit",
        description=__doc__,
        epilog="What is left out is the description's, slurm/clusters/NAME.yaml.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
    parser.add_argument(
        "--cluster", help=f"description in slurm/clusters/NAME.yaml; else ${CLUSTER_VARIABLE}, else example"
    )
    parser.add_argument("--nodes", type=int, help="machines of one job")
    parser.add_argument("--gpus-per-node", type=int, help="GPUs of each, one process a GPU; 0 for none")
    parser.add_argument("--partition", help="as sinfo lists them; several with commas")
    parser.add_argument("--time", help="limit of one start: minutes, HH:MM:SS or D-HH:MM:SS")
    parser.add_argument("--array", action="append", metavar="KEY=V,V", help="one run per value: seeds=0,1,2")
    parser.add_argument("--after", metavar="JOB", help="start once this job is done")
    parser.add_argument("--evaluate", metavar="PROBES", help="evaluate afterwards: knn,linear,long_tail")
    parser.add_argument("--evaluate-config", metavar="YAML", help="configuration of that evaluation")
    parser.add_argument("--dry-run", action="store_true", help="print the batch scripts, change nothing")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
