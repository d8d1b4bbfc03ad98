"""What a report knows of its runs: their record, results, configuration and how they ended."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.members import readable
from evaluation.results import read_results
from report.charts import series
from report.tables import Row
from runtime.config import read_yaml
from runtime.program import UserError
from runtime.record import is_step, read_record

_STEP_LINE = re.compile(r" step (\d+)/(\d+)\b")
_PREEMPTED_LINE = "stopping at step"
# A run whose ranks gave a sign of life this recently is taken to be running still.
_ALIVE_S = 120.0
# A step's mean time beyond this is none, as NaN is.
_LONGEST_STEP_S = 1e9
# Where a run is kept says nothing about what it does.
_PLACES = ("run.name", "run.output_dir")


@dataclass(frozen=True)
class Run:
    """What a report knows of a run.

    Attributes:
        name: unique among the runs of the report.
        path: its directory.
        metrics: lines of `metrics.jsonl`.
        results: of the encoder itself.
        controls: of the encoders beside it.
        in_training: of checkpoints that were evaluated as jobs while the run went on.
        training: its resolved pretraining configuration, as plain values; empty where it is missing.
    """

    name: str
    path: Path
    metrics: list[dict[str, Any]]
    results: list[dict[str, Any]]
    controls: list[dict[str, Any]]
    in_training: list[dict[str, Any]]
    training: dict[str, Any]

    def result(self, probe: str) -> dict[str, Any] | None:
        """Returns the result of one probe, or None."""
        return next((r for r in self.results if r["probe"] == probe), None)


def load_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """Returns what is known of every run; names are made unique.

    Raises:
        UserError: a directory is missing, holds neither metrics nor results, or its record cannot be read.
    """
    runs: list[Run] = []
    for path in run_dirs:
        resolved = path.resolve()
        try:
            metrics = read_record(path)
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror}); expected a run's record; mend or move it"
            ) from error
        results = read_results(path / "results") if (path / "results").is_dir() else []
        if not metrics and not results:
            raise UserError(
                f"run is {str(path)!r}; expected a run directory with metrics.jsonl or results/; pass its path"
            )
        name = readable(resolved.name)
        while name in {run.name for run in runs}:
            name = f"{readable(resolved.parent.name)}/{name}" if "/" not in name else f"{name}'"
        place = {id(r): r["path"].relative_to(path / "results").parts[0] for r in results}
        in_training = [r for r in results if place[id(r)] == "in_training"]
        runs.append(
            Run(
                name=name,
                path=path,
                metrics=with_jobs(metrics, in_training),
                results=[r for r in results if place[id(r)] not in ("controls", "in_training")],
                controls=[r for r in results if place[id(r)] == "controls"],
                in_training=in_training,
                training=read_yaml(str(path / "config.yaml")) if (path / "config.yaml").is_file() else {},
            )
        )
    return runs


def with_jobs(metrics: list[dict[str, Any]], in_training: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the record with the k-NN of checkpoints that jobs evaluated, under the key of the probe in process."""
    lines = [
        {"step": result["encoder"]["step"], "eval/knn20_top1": result["figures"]["headline"].get("top1")}
        for result in in_training
        if result["probe"] == "knn" and is_step(result["encoder"].get("step"))
    ]
    return [*metrics, *lines]


def run_rows(runs: Sequence[Run]) -> list[Row]:
    """Returns one row for each run: how it ended, what it trained, how long and how fast."""
    return [_run_row(run) for run in runs if run.metrics]


def difference_of_configurations(runs: Sequence[Run]) -> list[Row]:
    """Returns one row for every option that is not the same in all runs; names and places of runs are left out."""
    return [
        row
        for row in configuration_rows(runs)
        if row["option"] not in _PLACES and len({row[run.name] for run in runs if run.training}) > 1
    ]


def configuration_rows(runs: Sequence[Run]) -> list[Row]:
    """Returns one row for every option with its value in each run; empty where a run has no such option."""
    flat = {run.name: flatten(run.training) for run in runs if run.training}
    options = dict.fromkeys(option for values in flat.values() for option in values)
    return [
        {"option": option, **{name: values.get(option, "") for name, values in flat.items()}}
        for option in options
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns nested options as dotted names with their values as text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = "null" if value is None else str(value)
    return flat


def _run_row(run: Run) -> Row:
    prototypes = section(run, "prototypes")
    console = _read_console(run.path)
    speeds = [speed for speed in series(run.metrics, "throughput/images_per_s")[1] if speed]
    mode = str(prototypes.get("mode", ""))
    return {
        "run": run.name,
        "status": _status(run, console),
        "mode": f"{mode}, {prototypes.get('estimator', '?')}" if mode == "full" else mode,
        "K": str(prototypes.get("num_prototypes", "")),
        "seed": str(section(run, "run").get("seed", "")),
        "time in steps": _duration(_seconds_in_steps(run.metrics)),
        "images/s": f"{statistics.median(speeds):.0f}" if speeds else "",
        "started": console[:16] if console[:4].isdigit() else "",
    }


def section(run: Run, name: str) -> Mapping[str, Any]:
    """Returns a section of a run's configuration; empty where it is missing or no section."""
    found = run.training.get(name)
    return found if isinstance(found, Mapping) else {}


def _status(run: Run, console: str) -> str:
    last = max((record["step"] for record in run.metrics), default=0)
    lines = list(_STEP_LINE.finditer(console))
    if not lines:
        return f"record ends at step {last}"
    total = int(lines[-1][2])
    if last >= total:
        return f"finished, {total} steps"
    if any(time.time() - beat.stat().st_mtime < _ALIVE_S for beat in run.path.glob("heartbeats/*")):
        return f"running, step {last} of {total}"
    how = "preempted" if _PREEMPTED_LINE in console[lines[-1].end() :] else "ended early"
    return f"{how} at step {last} of {total}"


def _read_console(path: Path) -> str:
    console = path / "console.log"
    return console.read_text(errors="replace") if console.is_file() else ""


def _seconds_in_steps(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Returns the seconds spent in steps: each line's mean step time stands for the steps since the line before."""
    seconds, before = 0.0, 0
    for step, mean in zip(*series(metrics, "throughput/step_s"), strict=True):
        if 0 < mean < _LONGEST_STEP_S:
            seconds += mean * max(0, step - before)
            before = step
    return seconds


def _duration(seconds: float) -> str:
    if not seconds:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
