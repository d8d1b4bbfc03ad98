"""Uniqueness, usage, ranks and alarms."""

import math

import pytest
import torch

from prototypes.alarms import Collapse, find_alarms
from prototypes.build import build_objective
from prototypes.config import InstanceConfig, ObjectiveConfig, PrototypesConfig
from prototypes.diagnostics import (
    UsageCounter,
    count_unique,
    effective_rank,
    find_directions,
    mean_cosine,
)
from prototypes.estimator import Assignment
from prototypes.mixture.annealing import compute_critical_beta
from prototypes.mixture.config import AnnealingConfig
from prototypes.mixture.revival import find_duplicates
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


@pytest.mark.parametrize("bad", [0.0, 1e-14, 1e-30, torch.nan, torch.inf])
def test_a_row_without_direction_is_no_prototype(bad):
    rows = torch.eye(6, 8)
    rows[3] = bad
    assert find_directions(rows).tolist() == [True, True, True, False, True, True]
    assert set(count_unique(rows).values()) == {5}
    assert set(count_unique(rows[3:4].repeat(1100, 1)).values()) == {0}
    assert mean_cosine(rows) == pytest.approx(0, abs=1e-6)
    if bad not in (torch.nan, torch.inf):
        assert (
            find_duplicates(rows, torch.full((6,), 1 / 6), 0.025).tolist()
            == [False] * 3 + [True] + [False] * 2
        )
    expected = effective_rank(rows[find_directions(rows)])
    assert effective_rank(rows) == pytest.approx(expected, rel=1e-4)


def test_no_figure_of_nothing_ends_a_run():
    nothing = torch.full((3, 4), torch.nan)
    assert math.isnan(effective_rank(nothing)) and mean_cosine(nothing) == 1.0
    assert set(count_unique(nothing).values()) == {0}
    assert compute_critical_beta(torch.full((4, 4), torch.inf)) == 0.0


@pytest.mark.learned
def test_usage_counts_the_argmax_over_all_prototypes(record_property):
    prototypes = torch.nn.functional.normalize(torch.randn(50, 8), dim=1)
    rows = torch.randn(2, 30, 8)
    counter = UsageCounter(50)
    counter.update(rows[:1], prototypes)
    counter.update(rows[1:], prototypes)
    logits = rows.flatten(0, 1) @ prototypes.T
    expected = torch.bincount(logits.argmax(1), minlength=50)
    first, second = logits.topk(2, dim=1).values.T
    record_property("closest two logits", float((first - second).min()))
    assert torch.equal(counter.by_logits, expected.double())
    values = counter.metrics()
    assert values["prototypes/used"] == pytest.approx(float((expected > 0).float().mean()))
    assert values["prototypes/dead"] == pytest.approx(1 - values["prototypes/used"])
    assert values["prototypes/used_by_logits"] == values["prototypes/used"]
    assert values["prototypes/usage_rows"] == 60 and values["prototypes/used_ceiling"] == 1
    assert "prototypes/used_by_mass" not in values
    counter.reset()
    counter.by_logits += 3
    assert counter.metrics()["prototypes/usage_perplexity"] == pytest.approx(1.0)


def test_a_mixture_is_used_where_its_e_step_uses_it():
    """Logits name one component of four, the E-step another two, one of which has vanished."""
    counter = UsageCounter(4)
    counter.update(torch.eye(4)[:1].repeat(3, 1), torch.eye(4))
    hits, mass = torch.tensor([0.0, 2.0, 1.0, 0.0]), torch.tensor([0.1, 1.5, 1.0, 0.4])
    counter.add_assignment(Assignment(hits, mass))
    is_alive = torch.tensor([True, True, False, True])
    values = {name.removeprefix("prototypes/"): value for name, value in counter.metrics(is_alive).items()}
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert values == pytest.approx(
        {
            "used": 0.25,
            "dead": 0.75,
            "used_by_mass": 0.25,
            "used_by_logits": 0.25,
            "usage_perplexity": math.exp(entropy) / 4,
            "usage_rows": 3,
            "used_ceiling": 0.75,
        }
    )
    assert counter.metrics()["prototypes/used"] == 0.5


def test_a_mixture_that_has_not_begun_is_neither_used_nor_dead():
    counter = UsageCounter(4)
    counter.update(torch.eye(4)[:1], torch.eye(4))
    counter.add_assignment(Assignment(torch.zeros(4), torch.zeros(4)))
    assert counter.metrics() == {"prototypes/used_by_logits": 0.25}
    counter.add_assignment(Assignment(torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.ones(4)))
    assert counter.metrics()["prototypes/used"] == 0.25


def test_uniform_forgetting_shrinks_means_away_and_the_record_says_so():
    """Three clusters, sixteen components: thirteen are never visited, and shrink to exactly zero."""
    estimator = build(make_config(16, 64, **exact_gmm(forgetting="uniform", uniform_rate=0.1, input="l2")))
    counter, seen = UsageCounter(16), []
    for step in range(1000):
        rows = clustered_rows(16, 64, num_clusters=3, spread=0.05, seed=0)
        take_step(estimator, rows)
        counter.add_assignment(estimator.assignment())
        if step % 50 == 49:
            prototypes = estimator.prototypes("teacher")
            vanished = estimator.find_vanished()
            lengths = torch.linalg.vector_norm(prototypes, dim=1)
            assert bool((((lengths - 1).abs() < 1e-5) | (lengths == 0)).all())
            seen.append((count_unique(prototypes[~vanished])[0.5], int(vanished.sum()), estimator.metrics()))
    assert bool((estimator.means == 0).all(dim=1).any())
    unique, num_vanished, metrics = seen[-1]
    assert num_vanished >= 10 and unique == 16 - num_vanished
    assert count_unique(prototypes)[0.5] == unique
    assert counter.metrics(~vanished)["prototypes/used"] <= unique / 16
    assert metrics["gmm/zero_norm"] == num_vanished / 16
    alarms = [alarm.name for alarm in find_alarms(metrics, step=2000)]
    assert {"underflow", "vanished_means"} <= set(alarms)
    # It is named as soon as a mean has gone, not when its last bit has.
    for unique, num_vanished, metrics in seen:
        named = [alarm.name for alarm in find_alarms(metrics, step=0)]
        assert ("vanished_means" in named) == (num_vanished > 0)
        assert unique <= 16 - num_vanished


def test_rank_and_cosine_of_known_features():
    assert effective_rank(torch.eye(6)) == pytest.approx(6, rel=1e-4)
    assert effective_rank(torch.ones(9, 6)) == pytest.approx(1, rel=1e-3)
    assert mean_cosine(torch.ones(9, 6)) == pytest.approx(1)
    assert mean_cosine(torch.eye(6)) == pytest.approx(0, abs=1e-6)


CARP = build_objective(ObjectiveConfig(), PrototypesConfig(), seed=0).collapses
HEALTHY = {
    "loss/consistency": 2.9,
    "loss/entropy": 0.2,
    "prototypes/used": 0.8,
    "prototypes/used_ceiling": 1.0,
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
        ("prototype_death", {"prototypes/used": 0.03}),
        ("prototype_death", {"prototypes/used": 0.001, "prototypes/used_ceiling": 0.05}),
        ("underflow", {"gmm/count_min": 1e-12}),
        ("vanished_means", {"gmm/zero_norm": 0.4}),
        ("frozen_codebook", {"gmm/displacement": 1e-5}),
        ("feature_collapse", {"features/mean_cosine": 0.999}),
        ("feature_collapse", {"features/effective_rank": 1.2}),
        ("beta_below_critical", {"gmm/beta": 0.03}),
    ],
)
def test_each_alarm_fires_alone_on_its_case(name, change):
    alarms = find_alarms({**HEALTHY, **change}, step=5000, collapses=CARP)
    assert [alarm.name for alarm in alarms] == [name]
    assert "\n" not in alarms[0].message


def test_the_objective_says_how_its_own_scalars_collapse():
    metrics, own = {**HEALTHY, "loss/cross_entropy": 4.17}, Collapse(("cross_entropy",), 64)
    (alarm,) = find_alarms(metrics, step=200, collapses=[own, *CARP])
    assert alarm.name == "uniform_collapse" and "cross_entropy is 4.170, within 1 % of ln 64" in alarm.message
    assert find_alarms(metrics, step=199, collapses=[own]) == find_alarms(metrics, step=200) == []


@pytest.mark.parametrize(
    ("name", "says", "not_this"),
    [("carp", "entropy_weight >= 1", "targets"), ("dino", "teacher temp", "entropy")],
)
def test_an_alarm_names_the_options_of_the_objective_that_runs(name, says, not_this):
    """The advice against collapsed features was an option of CARP, whatever was trained."""
    config = ObjectiveConfig(instance=InstanceConfig(name=name))
    collapses = build_objective(config, PrototypesConfig(), seed=0).collapses
    (alarm,) = find_alarms({**HEALTHY, "features/effective_rank": 1.2}, step=200, collapses=collapses)
    assert alarm.name == "feature_collapse" and says in alarm.message and not_this not in alarm.message


def test_targets_that_say_nothing_raise_an_alarm_whichever_way_they_are_constant():
    (collapse,) = build_objective(
        ObjectiveConfig(instance=InstanceConfig(name="dino")), PrototypesConfig(num_prototypes=512), seed=0
    ).collapses
    for information, names in ((0.01, ["uniform_collapse"]), (2.0, [])):
        metrics = {**HEALTHY, "loss/target_information": information}
        alarms = find_alarms(metrics, step=200, collapses=[collapse])
        assert [alarm.name for alarm in alarms] == names
        assert all("constant targets: target_information is 0.010" in alarm.message for alarm in alarms)


def test_no_alarm_on_healthy_or_missing_values():
    assert find_alarms(HEALTHY, step=5000, collapses=CARP) == []
    assert find_alarms({}, step=5000, collapses=CARP) == []
    few_rows = {**HEALTHY, "prototypes/used": 0.04, "prototypes/used_ceiling": 0.05}
    assert find_alarms(few_rows, step=5000, collapses=CARP) == []
    standing = {**HEALTHY, "prototypes/used": 0.0, "prototypes/used_ceiling": 0.0}
    assert find_alarms(standing, step=5000, collapses=CARP) == []
    fresh = {**HEALTHY, "loss/consistency": 6.24, "prototypes/used": 0.0, "gmm/displacement": 0.0}
    assert find_alarms(fresh, step=0, collapses=CARP) == []


def run_for_alarms(num_steps=220, rows=None, **gmm):
    estimator = build(make_config(32, 8, **gmm))
    for step in range(num_steps):
        take_step(estimator, clustered_rows(32, 8, seed=step % 20) if rows is None else rows)
    return estimator.metrics()


@pytest.mark.learned
def test_alarms_on_planted_estimators():
    healthy = run_for_alarms()
    assert find_alarms(healthy, step=2000) == []
    estimator = build(make_config(1024, 8, responsibility_scale="mean"))
    for step in range(5):
        take_step(estimator, clustered_rows(128, 8, seed=step))
    frozen = find_alarms(estimator.metrics(), step=2000)
    assert [alarm.name for alarm in frozen] == ["frozen_codebook"]
    uniform = build(make_config(32, 8, **exact_gmm(forgetting="uniform", uniform_rate=0.5)))
    uniform.means[0] = 300.0
    for step in range(40):
        take_step(uniform, clustered_rows(32, 8, seed=step))
    underflow = find_alarms(uniform.metrics(), step=40)
    assert [alarm.name for alarm in underflow] == ["underflow", "vanished_means"]
    cold = run_for_alarms(num_steps=5, beta=AnnealingConfig(schedule="constant", end=0.05, guard=None))
    assert "beta_below_critical" in [alarm.name for alarm in find_alarms(cold, step=2000)]
