"""The runs whose steps compete differ in the mode of their prototypes alone."""

import dataclasses

import pytest

from benchmarks._step_contestants import MODELS, MODES, build_config
from benchmarks.step import FULL_OVER_JOINT, parse


@pytest.mark.parametrize("objective", FULL_OVER_JOINT)
@pytest.mark.parametrize("model", MODELS)
def test_contestants_differ_in_their_modes_alone(objective, model):
    options = parse(["--objective", objective, "--model", model, "--batch", "4", "--shards", "none"])
    full, *others = (build_config(options, mode, "zero1", 2) for mode in MODES)
    sections = ["prototypes"] if objective == "carp" else ["prototypes", "patch_prototypes"]
    assert list(full.levels.values()) == sections
    for other in others:
        modes = {section: full.prototypes_of(section).mode for section in sections}
        assert set(modes.values()) == {"full"}
        assert full == dataclasses.replace(
            other, **{s: dataclasses.replace(other.prototypes_of(s), mode="full") for s in sections}
        )
    if objective == "ibot":
        assert full.patch_prototypes.num_prototypes == 8192 and full.patch_rows_per_image > 0
