"""Uniqueness, usage, ranks and alarms."""

import pytest
import torch

from prototypes.alarms import find_alarms
from prototypes.diagnostics import UsageCounter, count_unique, effective_rank, mean_cosine
from prototypes.gmm_config import AnnealingConfig
from tests.unit.prototypes import oracle
from tests.unit.prototypes.building import build, clustered_rows, exact_gmm, make_config, take_step


def test_unique_prototypes_of_known_sets():
    assert count_unique(torch.randn(1, 8).repeat(50, 1))[0.025] == 1
    assert set(count_unique(torch.eye(12)).values()) == {12}
    antipodal = torch.randn(1, 8) * torch.tensor([1.0, -1.0]).repeat(20)[:, None]
    assert set(count_unique(antipodal).values()) == {2}


@pytest.mark.parametrize("number", [7, 1024, 1025, 2600])
def test_unique_prototypes_equal_the_naive_cover(number):
    rows = clustered_rows(number, 8, num_clusters=40, spread=0.3)
    counted = count_unique(rows)
    for eps, value in counted.items():
        assert value == oracle.count_unique(rows.double().numpy(), eps), eps


def test_unique_prototypes_are_exact_at_the_threshold():
    """Pairs whose cosine distance misses eps by 1e-9 in float64, a hundred times less than fp32 resolves."""
    for offset, expected in ((-1e-9, 1), (1e-9, 2)):
        cosine = 1 - (0.1 + offset)
        pair = torch.tensor([[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]], dtype=torch.float64)
        assert count_unique(pair, (0.1,))[0.1] == expected


def test_unique_refuses_a_row_without_direction():
    rows = torch.randn(5, 4)
    rows[3] = 0
    with pytest.raises(ValueError, match="prototype 3 is zero or not finite"):
        count_unique(rows)


def test_usage_counts_the_argmax_over_all_prototypes():
    prototypes = torch.nn.functional.normalize(torch.randn(50, 8), dim=1)
    rows = torch.randn(2, 30, 8)
    counter = UsageCounter(50)
    counter.update(rows[:1], prototypes)
    counter.update(rows[1:], prototypes)
    expected = torch.bincount((rows.flatten(0, 1) @ prototypes.T).argmax(1), minlength=50)
    assert torch.equal(counter.hits, expected)
    values = counter.metrics()
    assert values["prototypes/used"] == pytest.approx(float((expected > 0).float().mean()))
    assert values["prototypes/dead"] == pytest.approx(1 - values["prototypes/used"])
    counter.reset()
    counter.hits += 3
    assert counter.metrics()["prototypes/usage_perplexity"] == pytest.approx(1.0)


def test_rank_and_cosine_of_known_features():
    assert effective_rank(torch.eye(6)) == pytest.approx(6, rel=1e-4)
    assert effective_rank(torch.ones(9, 6)) == pytest.approx(1, rel=1e-3)
    assert mean_cosine(torch.ones(9, 6)) == pytest.approx(1)
    assert mean_cosine(torch.eye(6)) == pytest.approx(0, abs=1e-6)


HEALTHY = {
    "loss/consistency": 2.9,
    "loss/entropy": 0.2,
    "prototypes/dead": 0.2,
    "gmm/count_min": 1.0,
    "gmm/zero_norm": 0.0,
    "gmm/displacement": 0.3,
    "features/mean_cosine": 0.2,
    "features/effective_rank": 40.0,
    "gmm/beta": 1.0,
    "gmm/beta_critical": 0.05,
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("uniform_collapse", {"loss/consistency": 6.20, "loss/entropy": 0.0}),
        ("uniform_collapse", {"loss/consistency": 0.02, "loss/entropy": 6.20}),
        ("prototype_death", {"prototypes/dead": 0.97}),
        ("underflow", {"gmm/count_min": 1e-12}),
        ("underflow", {"gmm/zero_norm": 0.4}),
        ("frozen_codebook", {"gmm/displacement": 1e-5}),
        ("feature_collapse", {"features/mean_cosine": 0.999}),
        ("feature_collapse", {"features/effective_rank": 1.2}),
        ("beta_below_critical", {"gmm/beta": 0.03}),
    ],
)
def test_each_alarm_fires_alone_on_its_case(name, change):
    alarms = find_alarms({**HEALTHY, **change}, step=5000, partition_size=512)
    assert [alarm.name for alarm in alarms] == [name]
    assert "\n" not in alarms[0].message


def test_no_alarm_on_healthy_or_missing_values():
    assert find_alarms(HEALTHY, step=5000, partition_size=512) == []
    assert find_alarms({}, step=5000, partition_size=512) == []
    fresh = {**HEALTHY, "loss/consistency": 6.24, "prototypes/dead": 1.0, "gmm/displacement": 0.0}
    assert find_alarms(fresh, step=0, partition_size=512) == []


def run_for_alarms(num_steps=220, rows=None, **gmm):
    estimator = build(make_config(32, 8, **gmm))
    for step in range(num_steps):
        take_step(estimator, clustered_rows(32, 8, seed=step % 20) if rows is None else rows)
    return estimator.metrics()


def test_alarms_on_planted_estimators():
    healthy = run_for_alarms()
    assert find_alarms(healthy, step=2000, partition_size=4) == []
    estimator = build(make_config(1024, 8, responsibility_scale="mean"))
    for step in range(5):
        take_step(estimator, clustered_rows(128, 8, seed=step))
    frozen = find_alarms(estimator.metrics(), step=2000, partition_size=4)
    assert [alarm.name for alarm in frozen] == ["frozen_codebook"]
    uniform = build(make_config(32, 8, **exact_gmm(forgetting="uniform", uniform_rate=0.5)))
    uniform.means[0] = 300.0
    for step in range(40):
        take_step(uniform, clustered_rows(32, 8, seed=step))
    underflow = find_alarms(uniform.metrics(), step=40, partition_size=4)
    assert [alarm.name for alarm in underflow] == ["underflow"]
    cold = run_for_alarms(num_steps=5, beta=AnnealingConfig(schedule="constant", end=0.05, guard=None))
    assert "beta_below_critical" in [alarm.name for alarm in find_alarms(cold, step=2000, partition_size=4)]
