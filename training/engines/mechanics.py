"""DeepSpeed's mechanics: the one reader of the JSON files that `engine.deepspeed_config` names. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What such a file may set: mechanics. Everything that changes the result is in our YAML.
ALLOWED_KEYS = frozenset(
    {"zero_optimization", "torch_autocast", "comms_logger", "flops_profiler", "wall_clock_breakdown"}
)
# What of DeepSpeed's stages a run may set: how bytes are moved, and nothing that rounds (quantised gradients) or goes
# where our optimizer and our checkpoints do not look (offloading, secondary copies).
_SWITCHES = frozenset(
    {
        "overlap_comm",
        "contiguous_gradients",
        "reduce_scatter",
        "allgather_partitions",
        "use_multi_rank_bucket_allreduce",
        "round_robin_gradients",
        "memory_efficient_linear",
        "enable_sanity_checks",
        "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
    }
)
_BUCKETS = frozenset({"reduce_bucket_size", "allgather_bucket_size", "sub_group_size"})
# 0 has a meaning here: nothing is fetched ahead, nothing stays whole.
_THRESHOLDS = frozenset(
    {
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
    }
)
_STAGES = (0, 1, 2, 3)
_LARGEST = 2**63  # what a tensor's size can be
_DTYPES = ("bfloat16", "torch.bfloat16")


def _whole(least: int) -> tuple[str, Callable[[Any], bool]]:
    return f"a whole number of at least {least}", lambda v: type(v) is int and least <= v < _LARGEST


_SWITCH = ("true or false", lambda v: type(v) is bool)
# What DeepSpeed documents of the two; it reads them when a step is profiled, and checks little.
_SECTIONS: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "flops_profiler": {
        "enabled": _SWITCH,
        "recompute_fwd_factor": (
            "a number of at least 0",
            lambda v: type(v) in (int, float) and 0 <= v < math.inf,
        ),
        "profile_step": _whole(0),
        "module_depth": _whole(-1),
        "top_modules": _whole(1),
        "detailed": _SWITCH,
        "output_file": ("a file's name or null", lambda v: v is None or type(v) is str),
    },
    "comms_logger": {
        **dict.fromkeys(("enabled", "prof_all", "verbose", "debug"), _SWITCH),
        "prof_ops": ("a list of names", lambda v: type(v) is list and all(type(name) is str for name in v)),
    },
}


def read_mechanics(path: str) -> dict[str, Any]:
    """Returns the DeepSpeed mechanics in a JSON file.

    Raises:
        ValueError: no such file, no JSON object, a key that stands there twice, belongs into the YAML or that no run
            can have, a value of another kind, a stage or a precision that does not exist.
    """
    option = f"engine.deepspeed_config is {path!r}"
    if not Path(path).is_file():
        raise ValueError(f"{option}; expected a JSON file; set engine.deepspeed_config")
    try:
        mechanics = json.loads(Path(path).read_bytes(), object_pairs_hook=_once)
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{option}, which cannot be read as JSON ({error}); mend the file") from error
    if not isinstance(mechanics, dict):
        raise ValueError(f"{option}, which holds no JSON object; expected one such as those of ds_configs/")
    for key in sorted(mechanics.keys() - ALLOWED_KEYS):
        raise ValueError(
            f"{path} sets {key}; expected only {', '.join(sorted(ALLOWED_KEYS))}: batch sizes, clipping, optimizer "
            "and schedule come from the YAML; remove the key"
        )
    for name, value in mechanics.items():
        kind, said = (bool, "true or false") if name == "wall_clock_breakdown" else (dict, "an object")
        if type(value) is not kind:
            raise ValueError(f"{path} sets {name} to {value!r:.60}; expected {said}; mend the file")
    zero = mechanics.get("zero_optimization", {})
    for key, value in zero.items():
        _check_zero(path, key, value)
    for section, kinds in _SECTIONS.items():
        for key, value in mechanics.get(section, {}).items():
            rule, holds = kinds.get(key, (f"only {', '.join(kinds)}", lambda _: False))
            if not holds(value):
                raise ValueError(
                    f"{path} sets {section}.{key} to {value!r:.60}; expected {rule}; mend the file"
                )
    autocast = mechanics.get("torch_autocast", {})
    is_plain = autocast.keys() <= {"enabled", "dtype"} and type(autocast.get("enabled", False)) is bool
    if not is_plain or autocast.get("dtype", "bfloat16") not in _DTYPES:
        raise ValueError(
            f"{path} sets torch_autocast to {autocast!r:.90}; expected enabled true or false, dtype bfloat16 and "
            "nothing else; mend the file"
        )
    return mechanics


def _check_zero(path: str, key: str, value: Any) -> None:
    rules = {
        **dict.fromkeys(_SWITCHES, ("true or false", type(value) is bool)),
        **dict.fromkeys(_BUCKETS, ("a whole number of at least 1", _is_count(value, 1))),
        **dict.fromkeys(_THRESHOLDS, ("a whole number of at least 0", _is_count(value, 0))),
        "stage": ("0, 1, 2 or 3", type(value) is int and value in _STAGES),
    }
    if key not in rules:
        raise ValueError(
            f"{path} sets zero_optimization.{key}; expected only {', '.join(sorted(rules))}: the optimizer is torch's, "
            "where its parameters are, the program takes the gradient's norm, and nothing may round; remove the key"
        )
    rule, holds = rules[key]
    if not holds:
        raise ValueError(
            f"{path} sets zero_optimization.{key} to {value!r:.60}; expected {rule}; mend the file"
        )


def _is_count(value: Any, least: int) -> bool:
    # JSON's 5e7 is a float, and its 1e999 infinite.
    return type(value) in (int, float) and least <= value < _LARGEST and value == int(value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; of a key that stands there twice, json takes the last without a word."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"key {name!r:.60} stands there twice")
    return dict(pairs)
