"""A run's config.yaml names every option there was: what former versions had is ignored where it changed nothing."""

from pathlib import Path

import pytest

from runtime.config import ConfigError, build_config, config_to_dict, iterate_keys, load_config
from training.config import PretrainConfig
from training.config_difference import describe_difference

ROOT = Path(__file__).resolve().parents[3]
MINIMAL = {"data": {"shards": "x"}}


def test_a_former_option_without_effect_is_one_line_in_the_log(caplog):
    values = {"data": {"shards": "x", "global_crop_scale": None, "local_crop_scale": None}}
    assert build_config(PretrainConfig, values) == build_config(PretrainConfig, MINIMAL)
    assert [record.getMessage().split()[0] for record in caplog.records] == [
        "data.global_crop_scale",
        "data.local_crop_scale",
    ]


def test_a_former_option_with_an_effect_is_refused_in_one_line():
    with pytest.raises(
        ConfigError, match=r"data.global_crop_scale is \[0.3, 1.0\]; .*set data.augmentation.gl"
    ):
        build_config(PretrainConfig, {"data": {"shards": "x", "global_crop_scale": [0.3, 1.0]}})


def test_a_run_of_a_former_version_is_the_same_run():
    """Made before `data.augmentation`: what is learned has not changed, and the run goes on."""
    now = config_to_dict(
        load_config(PretrainConfig, str(ROOT / "configs" / "pretrain_vitl16_imagenet_full.yaml"))
    )
    saved = config_to_dict(build_config(PretrainConfig, now))
    del saved["data"]["augmentation"]
    saved["data"] |= {"global_crop_scale": None, "local_crop_scale": None}
    saved["prototypes"]["gmm"]["largest"] = 0
    saved["prototypes"]["gmm"]["beta"] |= {"perplexity_start": 8.0, "perplexity_end": 2.0}
    assert describe_difference("outputs/run", saved, now) is None
    assert build_config(PretrainConfig, saved) == build_config(PretrainConfig, now)
    # Nor before the objective had terms.
    flat = {"logits": "dot", "student_temperature": 0.1, "teacher_temperature": 0.1, "entropy_weight": 1.0}
    saved["objective"] = dict(flat)
    assert describe_difference("outputs/run", saved, now) is None
    now["objective"]["instance"]["entropy_weight"] = 2.0
    assert "objective.instance.entropy_weight is 2.0" in describe_difference("outputs/run", saved, now)
    now["objective"]["instance"]["entropy_weight"] = 1.0
    for name in flat:
        problem = describe_difference("outputs/run", saved | {"objective": flat | {name: "x"}}, now)
        assert f"set objective.instance.{name}, or set run.name" in problem and "\n" not in problem
    saved["prototypes"]["gmm"]["largest"] = 4
    problem = describe_difference("outputs/run", saved, now)
    assert (
        "outputs/run is of a former version, or not of this program: prototypes.gmm.largest is 4" in problem
        and "\n" not in problem
    )


def test_what_neither_run_reads_tells_no_two_apart():
    """A base that no longer sets what an arm left out, or sets it otherwise, keeps no run from going on."""
    path = str(ROOT / "configs" / "pretrain_test-resnet_cifar10_full.yaml")
    now, saved = (
        config_to_dict(load_config(PretrainConfig, path, overrides))
        for overrides in (
            [],
            ["prototypes.gmm.revival.interval_steps=5", "prototypes.clustering.sinkhorn_iterations=5"],
        )
    )
    assert saved != now and describe_difference("outputs/run", saved, now) is None
    revived = ["prototypes.gmm.revival.method=split", "prototypes.gmm.revival.interval_steps=7"]
    read = config_to_dict(load_config(PretrainConfig, path, revived))
    assert "prototypes.gmm.revival." in describe_difference("outputs/run", saved, read)
    assert "prototypes.gmm.revival." in describe_difference("outputs/run", read, saved)


def _without(values, key):
    """Nested values without one option; a section that holds nothing else goes with it."""
    first, _, rest = key.partition(".")
    if not rest:
        return {name: value for name, value in values.items() if name != first}
    section = _without(values[first], rest)
    return {
        name: section if name == first else value
        for name, value in values.items()
        if name != first or section
    }


def test_an_option_that_is_younger_than_a_run_counts_as_its_default():
    """Any of them but one whose default changes what runs do: `accumulation`, where there is any."""
    now = config_to_dict(build_config(PretrainConfig, MINIMAL))
    keys = [key for key in iterate_keys(PretrainConfig) if key != "data.shards"]
    assert len(keys) > 150
    for key in keys:
        assert describe_difference("outputs/run", _without(now, key), now) is None, key
    saved = _without(now, "optim.layer_decay")
    changed = config_to_dict(build_config(PretrainConfig, MINIMAL | {"optim": {"layer_decay": 0.9}}))
    assert "optim.layer_decay is 0.9, but" in describe_difference("outputs/run", saved, changed)
    parts = config_to_dict(
        build_config(PretrainConfig, MINIMAL | {"batch": {"gradient_accumulation_steps": 2}})
    )
    problem = describe_difference("outputs/run", _without(parts, "batch.accumulation"), parts)
    assert (
        "batch.accumulation is 'exact', but run directory outputs/run was made with 'per_micro_batch'"
        in problem
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("prototypes.gmm.beta.schedule=perplexity", "prototypes.gmm.beta.schedule is 'perplexity'"),
        (
            "prototypes.gmm.mixing_weights.mode=from_counts",
            "prototypes.gmm.mixing_weights.mode is 'from_counts'",
        ),
        ("prototypes.gmm.largest=4", "prototypes.gmm.largest is 4; expected no such option"),
    ],
)
def test_what_was_taken_out_is_named_in_one_line(override, expected):
    with pytest.raises(ConfigError) as error:
        load_config(PretrainConfig, str(ROOT / "configs/pretrain_vitl16_imagenet_full.yaml"), [override])
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)
