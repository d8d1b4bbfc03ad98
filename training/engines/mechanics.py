"""DeepSpeed's mechanics: the one reader of the JSON files that `engine.deepspeed_config` names. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What such a file may set: mechanics. Everything that changes the result is in our YAML.
ALLOWED_KEYS = frozenset(
    {"zero_optimization", "torch_autocast", "comms_logger", "flops_profiler", "wall_clock_breakdown"}
)
# Sections of `zero_optimization` that no run can have: the optimizer is torch's, and its gradient's norm taken once.
_REFUSED_OF_ZERO = ("offload_optimizer", "cpu_offload", "zenflow", "compute_grad_norm")
_STAGES = (0, 1, 2, 3)
_DTYPES = ("bfloat16", "torch.bfloat16")


def read_mechanics(path: str) -> dict[str, Any]:
    """Returns the DeepSpeed mechanics in a JSON file; what is inside the sections beyond ours, DeepSpeed checks.

    Raises:
        ValueError: no such file, no JSON object, a key that belongs into the YAML or that no run can have, a stage or
            a precision that does not exist.
    """
    option = f"engine.deepspeed_config is {path!r}"
    if not Path(path).is_file():
        raise ValueError(f"{option}; expected a JSON file; set engine.deepspeed_config")
    try:
        mechanics = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{option}, which is no JSON ({error}); mend the file") from error
    if not isinstance(mechanics, dict):
        raise ValueError(f"{option}, which holds no JSON object; expected one such as those of ds_configs/")
    for key in sorted(mechanics.keys() - ALLOWED_KEYS):
        raise ValueError(
            f"{path} sets {key}; expected only {', '.join(sorted(ALLOWED_KEYS))}: batch sizes, clipping, optimizer "
            "and schedule come from the YAML; remove the key"
        )
    for name in ("zero_optimization", "torch_autocast"):
        if not isinstance(mechanics.get(name, {}), dict):
            raise ValueError(
                f"{path} sets {name} to {mechanics[name]!r:.60}; expected an object; mend the file"
            )
    zero = mechanics.get("zero_optimization", {})
    for key in (key for key in _REFUSED_OF_ZERO if key in zero):
        raise ValueError(
            f"{path} sets zero_optimization.{key}; expected none: the optimizer is torch's, where its parameters are, "
            "and the program takes the gradient's norm; remove the key"
        )
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in _STAGES:
        raise ValueError(f"{path} sets stage to {stage!r:.60}; expected 0, 1, 2 or 3; mend the file")
    autocast = mechanics.get("torch_autocast", {})
    is_plain = autocast.keys() <= {"enabled", "dtype"} and type(autocast.get("enabled", False)) is bool
    if not is_plain or autocast.get("dtype", "bfloat16") not in _DTYPES:
        raise ValueError(
            f"{path} sets torch_autocast to {autocast!r:.90}; expected enabled true or false, dtype bfloat16 and "
            "nothing else; mend the file"
        )
    return mechanics
