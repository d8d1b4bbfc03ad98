"""Errors name the option where it stands."""

import pytest

from runtime.config import load_config
from runtime.wording import name_in_place
from training.config import PretrainConfig

IBOT = "configs/pretrain_vits16_imagenet_ibot_full.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "patch_prototypes.partition.size=7",
            "patch_prototypes.partition.size is 7; expected a divisor of patch_prototypes.num_prototypes (8192); "
            "set patch_prototypes.partition.size",
        ),
        (
            "prototypes.partition.size=7",
            "prototypes.partition.size is 7; expected a divisor of prototypes.num_prototypes (65536); set "
            "prototypes.partition.size",
        ),
    ],
)
def test_the_rules_of_prototypes_name_the_section_that_breaks_them(override, message):
    with pytest.raises(ValueError) as caught:
        load_config(PretrainConfig, IBOT, [override])
    assert str(caught.value) == message


def test_another_section_s_words_are_left_alone():
    text = "optim.lr is 3; expected less; set optim.lr"
    assert name_in_place(text, "optim.") == name_in_place(text, "patch_prototypes.") == text
