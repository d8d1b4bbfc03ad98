"""Options that nothing would read, and runs that would train nothing, are refused before anything starts."""

from pathlib import Path

import pytest

from runtime.config import load_config
from training.config import PretrainConfig

DEMO = Path(__file__).parents[3] / "configs/pretrain_vit-mini_fashion-mnist_full.yaml"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.masks.kind=block data.masks.patch_size=7", "data.masks.kind is block"),
        ("model.patch_head.num_layers=3", "model.patch_head is a section"),
        ("patch_prototypes.mode=joint", "patch_prototypes is a section"),
        ("objective.instance.weight=0", "objective.instance.weight is 0"),
        ("objective.instance.name=none", "objective.patch.name is 'none'"),
        # A single view has no other to be compared with: DINO's loss was 0 and CARP's no number.
        ("data.num_global_crops=1 data.num_local_crops=0", "data.num_global_crops is 1"),
        (
            "objective.instance.name=dino data.num_global_crops=1 data.num_local_crops=0",
            "num_global_crops is 1",
        ),
    ],
)
def test_what_nothing_reads_is_refused(override, named):
    with pytest.raises(ValueError, match=r"expected .*; set ") as refused:
        load_config(PretrainConfig, str(DEMO), override.split())
    assert named.replace("'", "") in str(refused.value).replace("'", "")
