"""What is set and not read is named, and what is read is not."""

from pathlib import Path

import pytest

from runtime.config import iterate_keys, load_config
from training import unread
from training.config import PretrainConfig
from training.unread import describe_unread, find_unread

CONFIGS = Path(__file__).parents[3] / "configs"
DEMO = CONFIGS / "pretrain_vit-mini_fashion-mnist_full.yaml"


def load(*overrides):
    return load_config(PretrainConfig, str(DEMO), overrides)


@pytest.mark.parametrize(
    ("option", "leaves_out", "reads"),
    [
        ("data.masks.ratio=[.2,.2]", "objective.koleo_weight=0", None),
        ("model.predictor.depth=2", "objective.koleo_weight=0", None),
        (
            "batch.accumulation=per_micro_batch",
            "batch.gradient_accumulation_steps=1",
            "batch.gradient_accumulation_steps=2",
        ),
        ("data.local_crop_size=14", "data.num_local_crops=0", "data.num_local_crops=2"),
        ("optim.momentum=.5", "optim.optimizer=adamw", "optim.optimizer=lars"),
        ("optim.prototype_lr_scale=3", "prototypes.mode=full", "prototypes.coupling.strength=.5"),
        (
            "prototypes.gmm.uniform_rate=.2",
            "prototypes.gmm.forgetting=responsibility",
            "prototypes.gmm.forgetting=uniform",
        ),
        ("prototypes.gmm.balance=1", "prototypes.mode=joint", "prototypes.mode=full"),
        ("prototypes.koleo_weight=1", "prototypes.mode=joint", "prototypes.mode=joint_kp"),
        ("prototypes.clustering.learning_rate=1", "prototypes.mode=full", "prototypes.mode=partial"),
        (
            "prototypes.gmm.variational.mean_strength=1",
            "prototypes.estimator=gmm_diag",
            "prototypes.estimator=vb_gmm",
        ),
        ("evaluation.knn_test_images=7", "evaluation.knn_every_steps=0", "evaluation.knn_every_steps=10"),
    ],
)
def test_named_until_it_is_read(option, leaves_out, reads):
    key = option.partition("=")[0]
    assert key in find_unread(load(option, leaves_out))
    if reads is not None:
        assert key not in find_unread(load(option, reads))


def test_a_start_of_prototypes_is_not_read_where_a_run_s_go_on():
    options = ("prototypes.coupling.start=means", "prototypes.coupling.strength=1", "model.init=/runs/mine")
    found = find_unread(load(*options, "model.init_head=true"))
    assert found["prototypes.coupling.start"] == "model.init_head=false"
    assert "prototypes.coupling.start" not in find_unread(load(*options))


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("pretrain_*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_set_nothing_that_they_do_not_read(recipe):
    assert find_unread(load_config(PretrainConfig, str(recipe), [])) == {}


def test_nothing_of_the_defaults_is_named():
    config = load_config(PretrainConfig, str(DEMO), ["prototypes.mode=full"])
    assert not any(key.startswith(("run.", "checkpoint.", "objective.")) for key in find_unread(config))


def test_section_of_patches_is_looked_at_by_itself():
    path = CONFIGS / "pretrain_vits16_imagenet_ibot_full.yaml"
    shared = [
        "patch_prototypes.num_prototypes=512",
        "patch_prototypes.mode=joint",
        "patch_prototypes.gmm.balance=2",
    ]
    found = find_unread(load_config(PretrainConfig, str(path), shared))
    assert "patch_prototypes.gmm.balance" in found
    assert found["patch_prototypes.gmm.balance"].startswith("patch_prototypes.mode=full")


def test_every_rule_names_options_that_exist():
    keys = list(iterate_keys(PretrainConfig))
    rules = [(rule, "") for rule in unread._OF_RUN] + [
        (rule, "prototypes.") for rule in unread._OF_PROTOTYPES
    ]
    for rule, prefix in rules:
        for option in rule.options:
            assert any(key.startswith(prefix + option) for key in keys), option


def test_line_says_what_would_read_it():
    line = describe_unread(load("prototypes.mode=joint", "prototypes.gmm.balance=1"))
    assert "prototypes.gmm.balance" in line and "(only with prototypes.mode=full and a mixture)" in line
    assert "\n" not in line
