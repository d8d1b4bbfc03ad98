"""Reading of `metrics.jsonl`, the record of a run: one JSON object a line, each with its step."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

RECORD_NAME = "metrics.jsonl"
_MOST_STEPS = 2**63  # beyond it nothing can be drawn


def is_step(value: Any) -> bool:
    """Returns whether a value read from a file is a number of updates."""
    return type(value) is int and abs(value) < _MOST_STEPS


def read_record(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's record; empty where there is none.

    What is no line of a record, such as a last one cut off by a kill, is left out and said.

    Raises:
        OSError: it cannot be read.
    """
    path = run_dir / RECORD_NAME
    lines: list[dict[str, Any]] = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and is_step(line.get("step")):
            lines.append(line)
        else:
            logger.warning("%s: left out what is no line of a record: %.60r", path, text)
    return lines
