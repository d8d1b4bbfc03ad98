"""Results files: one JSON for each probe, with everything that is needed to believe or repeat it."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.tensor_files import DamagedFileError, load_tensors, save_tensors
from runtime.files import write_atomically

logger = logging.getLogger(__name__)

RESULT_SCHEMA = 1
_PACKAGES = ("torch", "torchvision", "timm", "transformers", "accelerate", "webdataset", "numpy")
# What the report reads of every result, and of a probe's figures.
_READ_OF_ALL = {
    "encoder.role": str,
    "encoder.label": str,
    "provenance.manifest_hashes": dict,
    "provenance.config": dict,
}
_OF_PATCHES: dict[str, type] = {"classifiers": dict, "per_class": list}
_READ: dict[str, dict[str, type]] = {
    "prototypes": {"roles": dict},
    "knn": {"headline.k": int, "features": dict},
    "few_shot": {"shots": dict, "feature": str},
    "clustering": {"headline": dict},
    "long_tail": {
        "classifier": str,
        "groups": dict,
        "balanced_accuracy": dict,
        "tail_minus_head": dict,
        "per_class": list,
    },
    "segmentation": _OF_PATCHES,
    "segmentation_linear": _OF_PATCHES,
}


def collect_provenance(
    *, config: dict[str, Any], config_hash: str, manifests: dict[str, str]
) -> dict[str, Any]:
    """Returns what a results file says about its making: commit, configuration, data, versions, hardware.

    Args:
        config: the resolved configuration.
        config_hash: its hash.
        manifests: `directory:split` to the manifest's hash.
    """
    return {
        "commit": _commit(),
        "config": config,
        "config_hash": config_hash,
        "manifest_hashes": manifests,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "hardware": _hardware(),
        "finished_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_result(
    directory: Path,
    probe: str,
    *,
    encoder: dict[str, Any],
    figures: dict[str, Any],
    provenance: dict[str, Any],
    seconds: float,
    predictions: dict[str, Tensor] | None = None,
) -> Path:
    """Writes `{probe}.json`, and `{probe}.predictions.safetensors` where there are predictions; returns the first.

    Args:
        directory: the results directory; made where missing.
        probe: the probe's name.
        encoder: what was evaluated, as `Encoder.describe` says it.
        figures: the probe's figures.
        provenance: see `collect_provenance`.
        seconds: wall time of the probe, features not included.
        predictions: predicted classes by name, and `labels`: what paired intervals between runs are made from.
    """
    directory.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "schema": RESULT_SCHEMA,
        "probe": probe,
        "encoder": encoder,
        "figures": figures,
        "seconds": round(seconds, 3),
        "provenance": provenance,
    }
    if predictions:
        small = {name: tensor.to(torch.int32).contiguous() for name, tensor in predictions.items()}
        content["predictions_sha256"] = save_tensors(
            small, directory / f"{probe}.predictions.safetensors", {"probe": probe}
        )
    path = directory / f"{probe}.json"
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path


def read_encoder(path: Path, probe: str) -> dict[str, Any] | None:
    """Returns what a result says of its encoder; None where the file is no whole result of this probe."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if (
        not isinstance(content, dict)
        or content.get("schema") != RESULT_SCHEMA
        or content.get("probe") != probe
    ):
        return None
    encoder = content.get("encoder")
    return encoder if isinstance(encoder, dict) and {"spec", "weights_sha256"} <= encoder.keys() else None


def read_results(directory: Path) -> list[dict[str, Any]]:
    """Returns every result under a results directory, each with `path`; unreadable files are named in the log."""
    found = []
    for path in sorted(directory.rglob("*.json")):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s is left out of the report: %s", path, error)
            continue
        if isinstance(content, dict) and content.get("schema") == RESULT_SCHEMA and "probe" in content:
            missing = _missing_part(content)
            if missing:
                logger.warning("%s is left out of the report: it has no %s; evaluate again", path, missing)
                continue
            found.append({**content, "path": path})
    return found


def _missing_part(result: dict[str, Any]) -> str:
    """Returns what a result lacks of what `write_result` writes, or holds in another shape; empty if nothing."""
    missing = [
        name for name in ("encoder", "figures", "provenance") if not isinstance(result.get(name), dict)
    ]
    if not isinstance(result["probe"], str) or "/" in result["probe"]:
        missing.append("name of a probe")
    if not missing:
        figures: dict[str, type] = {"headline": dict} if "headline" in result["figures"] else {}
        figures |= _READ.get(result["probe"], {})
        read = _READ_OF_ALL | {f"figures.{name}": kind for name, kind in figures.items()}
        missing = [name for name, kind in read.items() if not _holds(result, name, kind)]
    return ", ".join(missing)


def _holds(values: Any, dotted: str, kind: type) -> bool:
    for name in dotted.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return isinstance(values, kind)


def read_predictions(result: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the predictions beside a result of `read_results`; empty where it has none.

    Predictions that are damaged, or that another evaluation wrote, are named in the log and left out.
    """
    path: Path = result["path"].with_name(f"{result['probe']}.predictions.safetensors")
    if not path.is_file():
        return {}
    try:
        tensors, found = load_tensors(path)
        if found != result.get("predictions_sha256"):
            raise DamagedFileError(f"{path} is not of the evaluation that wrote {result['path'].name}")
    except DamagedFileError as error:
        logger.warning("no intervals for %s: %s; evaluate again", result["path"], error)
        return {}
    return tensors


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _hardware() -> dict[str, Any]:
    found: dict[str, Any] = {"machine": platform.machine(), "cpu_threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["num_gpus"] = torch.cuda.device_count()
    return found
