"""What has to hold before an audit takes an hour, and before its tables stand: one configuration, one protocol.

Finished runs are kept: what they were made and measured with must be what the audit asks for today. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from audit.cells import Cell, audit_directory, iterate_cells
from audit.config import AuditConfig
from evaluation.config import EvaluationConfig
from runtime.config import ConfigError, build_config, config_to_dict, load_config, read_yaml
from runtime.program import UserError
from training.config import PretrainConfig
from training.config_difference import differences_of_run

_ROOT = Path(__file__).resolve().parent.parent
# How and where something is measured, not what.
_MECHANICS_OF = {
    "data": ("images", "cache_dir", "shards", "test_shards", "batch_size", "num_workers"),
    "features": ("cache_dir", "reuse"),
}
_COMMON = ("seed", "role", "data", "transform", "features")


def check_cells(config: AuditConfig) -> None:
    """Refuses a mistake in any arm's configuration, and runs of a former one that would stand among today's.

    Raises:
        ConfigError: an arm, or what measures it, is no configuration.
        UserError: a run or a result in the audit's folder was made with another one.
    """
    images: dict[str, tuple[Cell, list[str]]] = {}
    for cell in iterate_cells(config, tuple(config.arms)):
        _check_run(cell)
        for path, options in cell.evaluations:
            asked = config_to_dict(load_config(EvaluationConfig, str(_ROOT / path), options))
            for probe in asked["probes"]:
                _check_result(cell, probe, asked, images)


def _check_run(cell: Cell) -> None:
    path, options = cell.pretraining
    try:
        asked = config_to_dict(load_config(PretrainConfig, str(_ROOT / path), options))
    except ConfigError as error:
        raise UserError(f"arm {cell.arm}: {error}") from error
    claimed = cell.directory / "config.yaml"
    if not claimed.is_file():
        return
    try:
        found = differences_of_run(read_yaml(str(claimed)), asked)
    except ConfigError as error:
        raise UserError(f"{cell.directory} is of a former version: {error}, or {_remedy(cell)}") from error
    for key, (before, now) in found.items():
        raise UserError(
            f"{key} is {now!r} for arm {cell.arm}, but {cell.directory} was made with {before!r}; expected one "
            f"configuration for the runs of an audit; {_remedy(cell)}"
        )


def _check_result(
    cell: Cell, probe: str, asked: dict[str, Any], images: dict[str, tuple[Cell, list[str]]]
) -> None:
    path = cell.directory / "results" / f"{probe}.json"
    provenance = _read_provenance(path)
    if "config" not in provenance:
        return
    remedy = f"move {path} away to measure again, or set name to a new name"
    try:
        recorded = config_to_dict(build_config(EvaluationConfig, provenance["config"]))
    except ConfigError as error:
        raise UserError(f"{path} is of a former version: {error}, or {remedy}") from error
    before, now = _protocol(probe, recorded), _protocol(probe, asked)
    for key in now:
        if before[key] != now[key]:
            raise UserError(
                f"{key} is {now[key]!r}, but {path} was measured with {before[key]!r}; expected one protocol for the "
                f"runs of an audit; {remedy}"
            )
    first, seen = images.setdefault(probe, (cell, list(provenance["manifest_hashes"].values())))
    if list(provenance["manifest_hashes"].values()) != seen:
        raise UserError(
            f"{path} was measured on other images than {probe} of {first.name}; expected the same for the runs of an "
            f"audit; {remedy}"
        )


def _read_provenance(path: Path) -> dict[str, Any]:
    """Returns how a result was made; empty where there is none that can be read, which the tables will say."""
    try:
        return dict(json.loads(path.read_text())["provenance"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _protocol(probe: str, config: dict[str, Any]) -> dict[str, Any]:
    """Returns dotted key to value of all that decides a probe's figures, but for the images themselves."""
    sections = [*_COMMON, probe]
    if probe == "long_tail":
        sections.append(config["long_tail"]["classifier"])
    found: dict[str, Any] = {}
    for section in sections:
        value = config[section]
        if isinstance(value, dict):
            left_out = _MECHANICS_OF.get(section, ())
            found |= {f"{section}.{key}": option for key, option in value.items() if key not in left_out}
        else:
            found[section] = value
    return found


def _remedy(cell: Cell) -> str:
    return f"set name to a new name, or move that directory out of {audit_directory(cell.config)}"
