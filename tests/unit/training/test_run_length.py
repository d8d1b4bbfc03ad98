"""Where epochs end, and how long a run is."""

import logging

import pytest

from runtime.config import build_config
from training.config import PretrainConfig
from training.run_length import check_length, ends_epoch


@pytest.mark.parametrize(
    ("images", "batch", "epochs"),
    [
        (50_000, 128, 4),
        (45_000, 128, 2),
        (50_000, 128, 30),
        (60_000, 256, 4),
        (384, 32, 3),
        (33, 32, 7),
        (95, 64, 9),
    ],
)
def test_a_run_ends_with_its_last_epoch(images, batch, epochs):
    config = build_config(
        PretrainConfig,
        {"data": {"shards": "x"}, "batch": {"global_batch_size": batch}, "optim": {"epochs": epochs}},
    )
    steps = config.num_steps(images)
    ends = [step for step in range(steps + 1) if ends_epoch(config, images, step)]
    assert len(ends) == epochs and ends[-1] == steps
    lengths = {after - before for before, after in zip([0, *ends], ends, strict=False)}
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("init", "steps", "is_said"), [("data", 7, True), ("data", 8, False), ("sphere", 1, False)]
)
def test_a_mixture_that_never_sees_its_features_is_said(init, steps, is_said, caplog):
    # Two views of 64 images a step, 1,024 features.
    config = build_config(
        PretrainConfig,
        {
            "data": {"shards": "x"},
            "batch": {"global_batch_size": 64},
            "optim": {"steps": steps, "warmup_epochs": 0},
            "prototypes": {"num_prototypes": 1024, "gmm": {"init": {"method": init}}},
        },
    )
    with caplog.at_level(logging.WARNING):
        check_length(config, 6400)
    assert (
        "prototypes.gmm.init.method is data, which has seen its 1024 features after step 8" in caplog.text
    ) == is_said
