"""DeepSpeed's JSON files: what DeepSpeed itself reads late, or does not check."""

import json

import pytest

from training.engines.mechanics import read_mechanics

LONG = 10**400
WHOLE = {
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e7},
    "flops_profiler": {
        "enabled": True,
        "recompute_fwd_factor": 0.5,
        "profile_step": 1,
        "module_depth": -1,
        "top_modules": 3,
        "detailed": False,
        "output_file": None,
    },
    "comms_logger": {
        "enabled": True,
        "prof_all": False,
        "prof_ops": ["all_reduce"],
        "verbose": False,
        "debug": True,
    },
}


def test_what_deepspeed_documents_is_taken(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(WHOLE))
    assert read_mechanics(str(path)) == WHOLE


@pytest.mark.parametrize(
    ("section", "key", "value", "rule"),
    [
        ("zero_optimization", "reduce_bucket_size", LONG, "a whole number of at least 1"),
        ("zero_optimization", "stage3_max_live_parameters", LONG, "a whole number of at least 0"),
        ("zero_optimization", "reduce_bucket_size", float("nan"), "a whole number of at least 1"),
        ("flops_profiler", "profile_step", "x", "a whole number of at least 0"),
        ("flops_profiler", "profile_step", 1.5, "a whole number of at least 0"),
        ("flops_profiler", "profile_step", LONG, "a whole number of at least 0"),
        ("flops_profiler", "module_depth", -2, "a whole number of at least -1"),
        ("flops_profiler", "top_modules", True, "a whole number of at least 1"),
        ("flops_profiler", "detailed", "yes", "true or false"),
        ("flops_profiler", "recompute_fwd_factor", "0", "a number of at least 0"),
        ("flops_profiler", "output_file", 3, "a file's name or null"),
        ("flops_profiler", "profil_step", 1, "only enabled, recompute_fwd_factor"),
        ("comms_logger", "verbose", 1, "true or false"),
        ("comms_logger", "prof_ops", "all_reduce", "a list of names"),
        ("comms_logger", "prof_ops", [3], "a list of names"),
    ],
    ids=lambda value: f"{value!s:.30}",
)
def test_a_value_of_another_kind_is_one_line(section, key, value, rule, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({section: {key: value}}))
    with pytest.raises(
        ValueError, match=rf"^{path} sets {section}\.{key} to .*; expected {rule}.*; mend the file$"
    ):
        read_mechanics(str(path))


@pytest.mark.parametrize(
    "text",
    [
        '{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}',
        '{"zero_optimization": {"stage": 1, "stage": 2}}',
    ],
)
def test_a_key_that_stands_twice_is_one_line(text, tmp_path):
    path = tmp_path / "twice.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"twice\.json', which cannot be read as JSON \(key '.*' stands there twice\)"
    ):
        read_mechanics(str(path))
