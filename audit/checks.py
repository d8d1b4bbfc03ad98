"""What has to hold before an audit takes an hour, and before its tables stand: one configuration, one protocol.

Finished runs are kept: what they were made and measured with must be what the audit asks for today. Imports no torch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from audit.cells import ROOT, Cell, audit_directory, iterate_cells
from audit.config import AuditConfig
from data.shards import DataError, load_manifest
from evaluation.config import EvaluationConfig
from runtime.config import ConfigError, build_config, config_to_dict, load_config, read_yaml
from runtime.program import UserError
from runtime.record import read_record
from training.config import PretrainConfig
from training.config_difference import differences_of_run

# How and where something is measured, not what.
_MECHANICS_OF = {
    "data": ("images", "cache_dir", "shards", "test_shards", "batch_size", "num_workers"),
    "features": ("cache_dir", "reuse"),
}
_COMMON = ("seed", "role", "data", "transform", "features")
# What the tables read of a probe's figures.
_READ = {
    "prototypes": ("roles.teacher.unique_fraction", "roles.teacher.angle_density_max_over_min"),
    "knn": ("headline.top1",),
    "linear": ("headline.top1",),
    "logistic": ("headline.top1",),
    "long_tail": ("per_class",),
    "segmentation": ("headline.knn_miou", "headline.logistic_miou"),
}


def check_cells(config: AuditConfig) -> None:
    """Refuses a mistake in any arm's configuration, and runs or results that would stand among others wrongly.

    A finished run is of the arm's configuration of today; every result is of that run's last step and measured as
    asked, on one set of images; the seeds of an arm saw the same data and are of one length.

    Raises:
        UserError: one line names the first that is not.
    """
    shared = _Shared()
    for cell in iterate_cells(config, tuple(config.arms)):
        _check_run(cell, shared)
        last_step = max((line["step"] for line in read_record(cell.directory)), default=None)
        for path, options in cell.evaluations:
            asked = config_to_dict(_load(cell, EvaluationConfig, path, options))
            if asked["output_dir"] is not None:
                raise UserError(
                    f"output_dir of {path} is {asked['output_dir']!r}; expected null: an audit reads results in its "
                    "run directories; take it out of the evaluation"
                )
            for probe in asked["probes"]:
                _check_result(cell, probe, asked, last_step, shared)


class _Shared:
    """What several cells must have alike, by the first cell that had it, and the images that they name, read once."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], tuple[Cell, Any]] = {}
        self._hashes: dict[tuple[str, str], str | None] = {}

    def require(self, what: str, of: str, cell: Cell, value: Any, remedy: str) -> None:
        """Refuses another value than the first cell's."""
        first, expected = self._first.setdefault((what, of), (cell, value))
        if value != expected:
            raise UserError(
                f"{what} of {cell.name} is {value!r}; expected {expected!r} as of {first.name}: {of} has one; {remedy}"
            )

    def hash_of_images(self, shards: str | None, split: str) -> str | None:
        """Returns the hash of the images that a configuration names; None where they are not here as shards."""
        if shards is None:
            return None
        if (shards, split) not in self._hashes:
            try:
                self._hashes[shards, split] = load_manifest(str(ROOT / shards), split).hash
            except DataError:
                self._hashes[shards, split] = None
        return self._hashes[shards, split]


def _load(cell: Cell, config_class: type, path: str, options: tuple[str, ...]) -> Any:
    try:
        return load_config(config_class, str(ROOT / path), options)
    except ConfigError as error:
        raise UserError(f"arm {cell.arm}: {error}") from error


def _check_run(cell: Cell, shared: _Shared) -> None:
    asked = config_to_dict(_load(cell, PretrainConfig, *cell.pretraining))
    claimed = cell.directory / "config.yaml"
    remedy = f"set name to a new name, or move that directory out of {audit_directory(cell.config)}"
    if not claimed.is_file():
        if cell.is_done:
            raise UserError(
                f"{cell.directory} has results and no config.yaml; expected what made it; {remedy}"
            )
        return
    try:
        found = differences_of_run(read_yaml(str(claimed)), asked)
    except ConfigError as error:
        raise UserError(
            f"{cell.directory} is of a former version, or not of this program: {error}, or {remedy}"
        ) from error
    for key, (before, now) in found.items():
        raise UserError(
            f"{key} is {now!r} for arm {cell.arm}, but {cell.directory} was made with {before!r}; expected one "
            f"configuration for the runs of an audit; {remedy}"
        )
    for path in sorted(cell.directory.glob("checkpoints/*/MANIFEST.json"))[-1:]:
        origin = _read_json(path).get("facts", {})
        if "data_hash" in origin:
            data = asked["data"]
            now = shared.hash_of_images(data["shards"], data["split"])
            if now not in (None, origin["data_hash"]):
                raise UserError(
                    f"data.shards is {data['shards']!r} for arm {cell.arm}, which holds images {now}, but "
                    f"{cell.directory} has seen {origin['data_hash']}; expected one set for an audit's runs; {remedy}"
                )
            shared.require("training data", f"arm {cell.arm}", cell, origin["data_hash"], remedy)


def _check_result(
    cell: Cell, probe: str, asked: dict[str, Any], last_step: int | None, shared: _Shared
) -> None:
    path = cell.result(probe)
    if not path.is_file():
        return
    remedy = f"move {path} away to measure again, or set name to a new name"
    result = _read_json(path)
    encoder, provenance = result.get("encoder"), result.get("provenance")
    figures_are_there = all(_holds(result.get("figures"), key) for key in _READ.get(probe, ()))
    is_of_probe = result.get("probe") == probe and figures_are_there
    if not is_of_probe or not isinstance(encoder, dict) or not isinstance(provenance, dict):
        raise UserError(f"{path} is no whole result of {probe}; expected what evaluate.py wrote; {remedy}")
    if encoder.get("label") != cell.name:
        raise UserError(f"{path} is of {encoder.get('label')!r}; expected a result of {cell.name}; {remedy}")
    if encoder.get("step") != last_step:
        raise UserError(
            f"{path} is of step {encoder.get('step')}; expected the last one of the run's record, {last_step}; {remedy}"
        )
    shared.require("last step", f"arm {cell.arm}", cell, last_step, remedy)
    recorded = provenance.get("config", {}) | {"encoder": asked["encoder"]}
    try:
        before = _protocol(probe, config_to_dict(build_config(EvaluationConfig, recorded)))
    except ConfigError as error:
        raise UserError(
            f"{path} is of a former version, or not of this program: {error}, or {remedy}"
        ) from error
    for key, now in _protocol(probe, asked).items():
        if before[key] != now:
            raise UserError(
                f"{key} is {now!r}, but {path} was measured with {before[key]!r}; expected one protocol for the runs "
                f"of an audit; {remedy}"
            )
    images = list((provenance.get("manifest_hashes") or {}).values())
    if images:  # prototypes alone are counted without any
        data = asked["data"]
        asked_for = [
            shared.hash_of_images(data["shards"], data["train_split"]),
            shared.hash_of_images(data["test_shards"] or data["shards"], data["test_split"]),
        ]
        if None not in asked_for and images != asked_for:
            raise UserError(
                f"data.shards is {data['shards']!r}, which holds images {asked_for}, but {path} was measured on "
                f"{images}; expected one set for the runs of an audit; {remedy}"
            )
        shared.require("test and training images", f"probe {probe}", cell, images, remedy)


def _holds(figures: Any, dotted: str) -> bool:
    """Returns whether there is something under a dotted key, and no NaN."""
    for name in dotted.split("."):
        figures = figures.get(name) if isinstance(figures, dict) else None
    return figures is not None and not (isinstance(figures, float) and math.isnan(figures))


def _read_json(path: Path) -> dict[str, Any]:
    """Returns what a file holds; empty where that is no JSON object."""
    try:
        content = json.loads(path.read_text(errors="replace"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


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
