"""Where an exported encoder of ours lies: in a run, in a checkpoint, or by itself."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runtime.committed import find_damage, is_committed

logger = logging.getLogger(__name__)

Role = Literal["teacher", "student"]
_STEP_DIRECTORY = re.compile(
    r"step-([0-9]{8}|[1-9][0-9]{8,})"
)  # as saves name them: nine digits only from 10^8 on


class EncoderError(ValueError):
    """An encoder that cannot be loaded as named; the message is one line."""


@dataclass(frozen=True)
class ExportedFolder:
    """Where an exported encoder of ours lies, and of which run and step it is."""

    path: Path
    run_dir: Path | None = None
    step: int | None = None


def find_exported_folder(spec: str, role: Role = "teacher") -> ExportedFolder:
    """Returns the exported folder of a run directory, of a checkpoint, or `spec` itself.

    Of a run, the newest checkpoint whose files of this role are as they were written; others are named in the log.

    Raises:
        EncoderError: no such directory, no whole checkpoint, or the checkpoint does not hold this role.
    """
    path = Path(spec)
    require_folder(path, spec)
    if (path / "checkpoints").is_dir():
        path = _find_newest_whole(path / "checkpoints", spec, role)
    elif (path / role).is_dir():
        require_whole(path / role)
    match = _STEP_DIRECTORY.fullmatch(path.name)
    if match is None:
        require_whole(path)
        return ExportedFolder(path)
    folder = path / role
    if not folder.is_dir():
        held = sorted(p.parent.name for p in path.glob("*/config.json"))
        raise EncoderError(
            f"role is {role!r}, which {path} does not hold; expected one of {', '.join(held) or 'none'}; set role"
        )
    run_dir = path.parent.parent if path.parent.name == "checkpoints" else None
    return ExportedFolder(folder, run_dir.resolve() if run_dir else None, int(match.group(1)))


def _find_newest_whole(checkpoints: Path, spec: str, role: Role) -> Path:
    found = [p for p in checkpoints.iterdir() if _STEP_DIRECTORY.fullmatch(p.name)]
    complete = [p for p in found if (p / "COMMIT").is_file() and not (p / "REJECTED").exists()]
    for path in sorted(complete, key=lambda p: int(p.name.removeprefix("step-")), reverse=True):
        if not is_committed(path):  # a copy of COMMIT and the encoder alone
            logger.warning("checkpoint %s has no MANIFEST.json: its files cannot be compared with it", path)
            return path
        damage = find_damage(path, role)
        if damage is None:
            return path
        logger.warning("passing over checkpoint %s: %s", path, damage)
    damaged = f", where {len(complete)} with COMMIT are damaged, for the reasons above" if complete else ""
    raise EncoderError(
        f"encoder is {spec!r}{damaged}; expected a complete checkpoint (with COMMIT) under checkpoints/; "
        "let the run reach its first checkpoint or set encoder to another run"
    )


def require_whole(folder: Path) -> None:
    """Raises EncoderError where a folder lies in a checkpoint and its files are not as they were written."""
    checkpoint = folder.absolute().parent
    damage = find_damage(checkpoint, folder.name) if is_committed(checkpoint) else None
    if damage is not None:
        raise EncoderError(
            f"{checkpoint} is damaged: {damage}; expected what the run saved; set encoder to the run or to another "
            "checkpoint"
        )


def name_folder(path: Path) -> str:
    """Returns an exported folder's short name; inside checkpoints, where all are called alike, `RUN-step-N-ROLE`."""
    if _STEP_DIRECTORY.fullmatch(path.parent.name) is None:
        return path.name
    checkpoint = path.parent.resolve()
    run = [checkpoint.parent.parent.name] if checkpoint.parent.name == "checkpoints" else []
    return "-".join([*run, checkpoint.name, path.name])


def require_folder(path: Path, spec: str) -> None:
    """Raises EncoderError unless `path` is a directory; `spec` is how the user named it."""
    if not path.is_dir():
        raise EncoderError(
            f"encoder is {spec!r}; expected an existing directory, timm:NAME, hf:NAME, local-dir:PATH, "
            "random-init:RUN, raw-pixels or a weights file; set encoder"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"{path} cannot be read as JSON ({one_line(error)}); export the encoder again"
        ) from error


def one_line(error: BaseException) -> str:
    """Returns an error's message as one short line."""
    return " ".join(str(error).split())[:300]
