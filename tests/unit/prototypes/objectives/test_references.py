"""Our losses equal those of DINO, iBOT, DINOv2 and CAPI on recorded inputs, gradients included."""

import pytest
import torch

from tests.helpers.references import CASES, FOLDER, Rank, Recording

INPUTS = {
    "student", "teacher", "student_prototypes", "teacher_prototypes", "first_teacher", "student_patches",
    "teacher_patches", "patch_prototypes", "teacher_patch_prototypes", "masks", "patch_centre_before", "embeddings",
    "patches", "teacher_weight", "teacher_bias", "predict_index", "predictions", "student_weight",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CASES))
def test_equals_the_original(name):
    saved, found = Recording(name), CASES[name](Rank())
    outputs = set(saved.tensors) - INPUTS - ({"centre_before"} if name != "dino" else set())
    assert set(found) == outputs
    for key, value in found.items():
        torch.testing.assert_close(
            value, saved[key], rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
        # The absolute bound is no bound for a gradient whose numbers are all that small.
        scale = float(saved[key].abs().max())
        assert float((value - saved[key]).abs().max()) <= 1e-4 * scale, key


def test_every_recording_names_its_source_and_is_compared():
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == set(CASES)
    for name in CASES:
        metadata = Recording(name).metadata
        assert len(metadata["commit"]) == 40 and metadata["repository"] and metadata["file"].endswith(".py")
        assert (FOLDER / f"{name}.safetensors").stat().st_size < 64 * 1024
