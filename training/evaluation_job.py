"""In-training evaluation as a separate SLURM job: every checkpoint that is due is handed to `sbatch`.

    RUN/in_training/step-00001000/
        teacher/      the exported teacher: hard links, which outlive the checkpoint's rotation
        eval.yaml     what the job evaluates
        job.txt       what sbatch said
        job.log       the job's output
    RUN/results/in_training/step-00001000/knn.json       what it found

The run goes on meanwhile: sbatch is called in a thread, and nothing that goes wrong with it stops training.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

from runtime.record import read_record
from training.config import PretrainConfig

logger = logging.getLogger(__name__)

_SBATCH_TIMEOUT_S = 120.0
# This job's own layout, which the new job must not take for its own.
_NOT_INHERITED = ("SLURM_", "SBATCH_", "PMI_", "PMIX_", "OMPI_")
_KEPT = ("SLURM_CONF",)
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def build_evaluation_job(config: PretrainConfig, run_dir: Path) -> Callable[[int, Path], None] | None:
    """Returns what a checkpoint store calls on rank 0 with every published checkpoint; None where no job is asked for.

    Raises:
        ValueError: jobs are asked for, and there is no sbatch or no batch script.
    """
    settings = config.evaluation
    if settings.runs_as != "slurm_job" or not settings.knn_every_steps:
        return None
    if shutil.which("sbatch") is None:
        raise ValueError(
            "evaluation.runs_as is slurm_job; expected sbatch on PATH, there is none; set evaluation.runs_as=process"
        )
    if not Path(settings.sbatch_script).is_file():
        raise ValueError(
            f"evaluation.sbatch_script is {settings.sbatch_script!r}; expected an existing batch script; "
            "set evaluation.sbatch_script=slurm/evaluate.sbatch"
        )

    def hand_over(step: int, checkpoint: Path) -> None:
        if step % settings.knn_every_steps == 0:
            Thread(target=_submit, args=(config, run_dir.absolute(), step, checkpoint.absolute())).start()

    return hand_over


def describe_evaluation(config: PretrainConfig, run_dir: Path, step: int) -> dict[str, Any]:
    """Returns the configuration of the job's `evaluate.py`: the k-NN of the in-process probe, on the same images."""
    settings, folder = config.evaluation, _folder(run_dir, step)
    return {
        "encoder": str(folder),
        "probes": ["knn"],
        "output_dir": str(run_dir / "results" / "in_training" / folder.name),
        "data": {
            "shards": config.data.shards,
            "train_split": config.data.split,
            "test_split": settings.test_split,
            "max_train_images": settings.knn_train_images,
            "max_test_images": settings.knn_test_images,
        },
        "features": {"cache_dir": str(folder / "features")},
    }


def _submit(config: PretrainConfig, run_dir: Path, step: int, checkpoint: Path) -> None:
    folder = _folder(run_dir, step)
    try:
        if (folder / "job.txt").exists():
            return  # a resumed run saves a step again that is in the queue already
        if not (folder / "teacher").exists():
            shutil.copytree(checkpoint / "teacher", folder / "teacher", copy_function=_link_or_copy)
        # JSON is YAML.
        (folder / "eval.yaml").write_text(
            json.dumps(describe_evaluation(config, run_dir, step), indent=1) + "\n"
        )
        command = [
            "sbatch",
            f"--job-name=eval-{run_dir.name}-{step}",
            f"--output={str(folder).replace('%', '%%')}/job.log",  # sbatch reads %j and its like in it
            *config.evaluation.sbatch_options,
            str(Path(config.evaluation.sbatch_script).absolute()),
            str(folder / "eval.yaml"),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SBATCH_TIMEOUT_S, env=_clean_environment()
        )
        if done.returncode != 0:
            raise OSError(" ".join(done.stderr.split()) or f"sbatch returned {done.returncode}")
        (folder / "job.txt").write_text(done.stdout)
        logger.info("evaluation of step %d: %s", step, done.stdout.strip())
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("step %d is not evaluated: %s; the run goes on", step, error)


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "in_training" / f"step-{step:08d}"


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _clean_environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or not (name.startswith(_NOT_INHERITED) or name in _RENDEZVOUS)
    }
    # What the batch script starts; a site's own choice wins.
    return {"PYTHON": sys.executable, **kept}


def read_scores(run_dir: Path) -> dict[int, float]:
    """Returns the top-1 of k-NN by step, as the run's record and the results of its jobs have it.

    Read anew for every save, so that a run that goes on elsewhere knows what came before. What cannot be read is left
    out and said: it must not end a run.
    """
    scores: dict[int, float] = {}
    try:
        for line in read_record(run_dir):
            value = line.get("eval/knn20_top1")
            if isinstance(value, int | float):
                scores[line["step"]] = float(value)
        for path in (run_dir / "results" / "in_training").glob("step-*/knn.json"):
            step = int(path.parent.name.removeprefix("step-"))
            scores[step] = float(json.loads(path.read_bytes())["figures"]["headline"]["top1"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning(
            "what is best is known in part only: %s: %.200s",
            type(error).__name__,
            " ".join(str(error).split()),
        )
    return scores
