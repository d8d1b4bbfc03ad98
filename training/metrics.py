"""The record of a run: `metrics.jsonl`, one JSON object a line; wandb is a view of it and can never stop a run.

`python -m training.metrics replay RUN_DIRECTORY` sends a finished or interrupted record to wandb as one run, for
nodes without a network.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import sys
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.files import write_atomically
from runtime.program import EXIT_DONE, UserError, run_program

logger = logging.getLogger(__name__)

RECORD_NAME = "metrics.jsonl"
WANDB_ID_NAME = "wandb_id"


class MetricsRecord:
    """Appends to `metrics.jsonl` of a run directory; only rank 0 makes one. Not collective.

    Args:
        run_dir: the run directory.
        resume_step: updates done at the start; lines of later steps, written by an interrupted run after its last
            checkpoint, are dropped so that every step stands in the record once.
    """

    def __init__(self, run_dir: Path, *, resume_step: int) -> None:
        self.path = run_dir / RECORD_NAME
        if self.path.exists():
            kept = [
                line for line in read_record(self.path) if line["step"] <= resume_step and resume_step > 0
            ]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a")

    def write(self, step: int, samples_seen: int, values: Mapping[str, float]) -> dict[str, Any]:
        """Appends one line and returns it. Non-finite values become null: JSON has no word for them."""
        line: dict[str, Any] = {"step": step, "samples_seen": samples_seen}
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        return line

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_record(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a record; a last line cut off by a kill is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            logger.warning("%s: left out a line that is no JSON: %.60s", path, text)
    return lines


def wandb_id(run_dir: Path) -> str:
    """Returns the run's wandb id, made at its first start and kept in the run directory across requeues."""
    path = run_dir / WANDB_ID_NAME
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()


class WandbView:
    """Sends lines to wandb from a thread of its own: a dead network costs the training thread nothing.

    Args:
        run_dir: the run directory; wandb's files go into its `wandb/`.
        mode: `online` or `offline`.
        project: wandb project.
        config: the resolved configuration, plain values.
    """

    def __init__(self, run_dir: Path, *, mode: str, project: str, config: dict[str, Any]) -> None:
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._settings = {
            "id": wandb_id(run_dir),
            "name": run_dir.name,
            "dir": str(run_dir),
            "mode": mode,
            "project": project,
            "config": config,
        }
        self._run_dir = run_dir
        self._thread = threading.Thread(target=self._send, name="wandb", daemon=True)
        self._thread.start()

    def write(self, line: dict[str, Any]) -> None:
        """Queues a line; returns at once."""
        self._lines.put(line)

    def close(self, timeout_s: float = 20.0) -> None:
        """Waits at most `timeout_s` for what is queued."""
        self._lines.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("wandb did not finish within %.0f s; %s", timeout_s, self._remedy())

    def _remedy(self) -> str:
        return f"nothing is lost: `python -m training.metrics replay {self._run_dir}` sends the record later"

    def _send(self) -> None:
        try:
            run = _start_wandb(self._settings)
            while (line := self._lines.get()) is not None:
                run.log(line)
            run.finish()
        except Exception as error:  # wandb's failures are of many types, and none may reach the run
            logger.warning("wandb stopped (%s: %.200s); %s", type(error).__name__, error, self._remedy())


def replay(run_dir: Path, mode: str, project: str) -> int:
    """Sends a run's whole record to wandb as the one run that its `wandb_id` names; returns the lines sent.

    Raises:
        UserError: the directory holds no record.
    """
    record = run_dir / RECORD_NAME
    if not record.is_file():
        raise UserError(f"{run_dir} has no {RECORD_NAME}; expected a run directory; pass outputs/RUN")
    settings = {
        "id": wandb_id(run_dir),
        "name": run_dir.name,
        "dir": str(run_dir),
        "mode": mode,
        "project": project,
    }
    run = _start_wandb(settings)
    lines = read_record(record)
    for line in lines:
        run.log(line)
    run.finish()
    return len(lines)


def _start_wandb(settings: dict[str, Any]) -> Any:
    import wandb

    run = wandb.init(
        **settings, resume="allow", settings=wandb.Settings(init_timeout=60, silent=True, disable_git=True)
    )
    # Our own axis: after a resume from an older checkpoint wandb's internal step is ahead and would drop lines.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def main(arguments: list[str]) -> int:
    """Runs `python -m training.metrics replay RUN_DIRECTORY [mode=offline] [project=NAME]`."""
    if len(arguments) < 2 or arguments[0] != "replay":
        raise UserError(
            "arguments are {}; expected replay RUN_DIRECTORY [mode=online|offline] [project=NAME]; pass them".format(
                " ".join(arguments) or "missing"
            )
        )
    options = {"mode": "online", "project": "decoupled-prototypes"}
    for argument in arguments[2:]:
        key, _, value = argument.partition("=")
        if key not in options or not value:
            raise UserError(
                f"argument is {argument!r}; expected mode=online|offline or project=NAME; mend it"
            )
        options[key] = value
    count = replay(Path(arguments[1]), options["mode"], options["project"])
    print(f"replayed {count} lines of {arguments[1]}/{RECORD_NAME}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
