"""Steps that leave out negligible responsibilities: what they keep and may not touch, when they are not taken."""

import logging

import numpy as np
import pytest
import torch

from prototypes.mixture import expectation, moments, sparse
from prototypes.mixture.assignments import find_winners
from prototypes.mixture.config import (
    AnnealingConfig,
    RevivalConfig,
    SparseConfig,
    SynchronizationConfig,
    VarianceConfig,
)
from prototypes.mixture.online_em import MAX_DROPPED
from tests.helpers.counting import DeviceCounter
from tests.unit.prototypes import oracle
from tests.unit.prototypes.building import (
    MIXTURES,
    assert_same_state,
    build,
    clustered_rows,
    exact_gmm,
    make_config,
    take_step,
    tensors,
)
from tests.unit.prototypes.lockstep import Lockstep

DENSE = SparseConfig(threshold=0.0)
K, P, N = 64, 8, 48


def begin(name="gmm_diag", step=200, num_steps=2, **options):
    """A mixture that has left its start behind: its reference moves seldom, its next step may be sparse."""
    options.setdefault("variance", VarianceConfig(shrinkage=0.0))
    estimator = build(make_config(K, P, estimator=name, **options))
    estimator.step = step
    for index in range(num_steps):
        take_step(estimator, clustered_rows(N, P, seed=index))
    estimator._is_dense, estimator._unread_share = False, None
    return estimator


def is_sparse(estimator):
    return estimator._found is not None


def moved(before, after, name):
    return (before[name] != after[name]).flatten(1).any(1)


# ------------------------------------------------------------------------------- exact


@pytest.mark.learned
@pytest.mark.parametrize("shrinkage", [0.0, 0.25])
def test_five_hundred_steps_on_three_ranks_follow_naive_float64(shrinkage, record_property):
    options = exact_gmm(variance=VarianceConfig(floor=0.05, shrinkage=shrinkage))
    config, ranks, num_steps, start = make_config(K, P, **options), Lockstep(3), 500, 95
    steps = [clustered_rows(N, P, num_clusters=24, spread=0.3, seed=seed) for seed in range(num_steps)]

    def body(rank):
        estimator = build(
            config, rank=rank, world_size=3, reduce_sum=ranks.reduce_sum(rank), gather=ranks.gather(rank)
        )
        estimator.step, figures = start, []
        for rows in steps:
            take_step(estimator, rows.split([20, 0, 28])[rank])
            figures.append((float(not is_sparse(estimator)), estimator.metrics()["gmm/dropped_mass"]))
        return tensors(estimator), figures

    (state, figures), *others = ranks.run(body)
    for other, _ in others:
        assert_same_state(state, other)
    expected = follow_naively(build(config), steps, start, shrinkage)
    worst = {
        name: float(
            np.linalg.norm(state[name].double().numpy() - value) / np.linalg.norm(value)
            if value.ndim == 1
            else (
                np.linalg.norm(state[name].double().numpy() - value, axis=1) / np.linalg.norm(value, axis=1)
            ).max()
        )
        for name, value in expected.items()
    }
    dense, dropped = np.array(figures).T
    for name, value in {**worst, "dropped": dropped.max(), "dense": dense.mean()}.items():
        record_property(name, value)
    assert dense.mean() < 0.1
    assert 0 < dropped.max() < MAX_DROPPED
    assert max(worst.values()) <= 1e-4, worst


def follow_naively(estimator, steps, start, shrinkage, memory=20.0):
    means = estimator.means.double().numpy().copy()
    counts, weights = np.ones(K), np.full(K, 1 / K)
    mean, covariance = steps[0].double().numpy().mean(0), np.cov(steps[0].double().numpy().T, bias=True)
    variances = np.tile(np.diag(covariance), (K, 1))
    for step, rows in enumerate(steps, start):
        h, floor = rows.double().numpy(), 0.05 * np.diag(covariance)
        prior = np.diag(covariance)
        shrunk = oracle.shrink(variances, counts, prior, shrinkage * memory)
        gamma = oracle.responsibilities(oracle.log_joint(h, means, shrunk, weights))
        mass = gamma.sum(0)
        new = oracle.m_step(h, gamma, means, variances, counts, memory)
        visited = mass > 1e-6
        means = np.where(visited[:, None], new[0], means)
        variances = np.where(visited[:, None], np.maximum(new[1], floor), variances)
        counts = np.where(visited, new[2], counts)
        weights = weights + min(0.01, len(h) / 2000) * (mass / mass.sum() - weights)
        weights = np.maximum(weights, 1e-6 / K)
        weights /= weights.sum()
        rate = max(0.01, 1 / (step + 1))
        mean, covariance = oracle.running_moments(mean, covariance, h, rate)
    return {"means": means, "variances": variances, "counts": counts, "mixing_weights": weights}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(
    "options", [{}, {"balance": 0.5}, {"variance": VarianceConfig(shrinkage=0.25)}, {"kmeans_hard": True}]
)
def test_a_sparse_step_is_the_dense_one_up_to_what_it_leaves_out(name, options):
    few, dense = begin(name, **options), begin(name, **options, sparse=DENSE)
    dense.load_state_dict(few.state_dict())
    rows = clustered_rows(N, P, seed=9)
    take_step(few, rows)
    take_step(dense, rows)
    assert is_sparse(few)
    assert few._natural_is_current != few.moves_together
    for key, value in tensors(dense).items():
        torch.testing.assert_close(tensors(few)[key], value, rtol=2e-5, atol=2e-5, msg=key)
    torch.testing.assert_close(few.prototypes("teacher"), dense.prototypes("teacher"))
    (hits, mass), (all_hits, all_mass) = few.assignment(), dense.assignment()
    assert torch.equal(hits, all_hits)
    torch.testing.assert_close(mass, all_mass, rtol=1e-4, atol=1e-5)
    for key, value in dense.metrics().items():
        if key != "gmm/dropped_mass":
            assert few.metrics()[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("name", MIXTURES)
def test_a_step_of_soft_rows_is_the_one_that_lists_what_it_keeps(name, monkeypatch):
    options = {
        "beta": AnnealingConfig(schedule="constant", end=4.0, guard=None),
        "sparse": SparseConfig(threshold=1e-5),
    }
    rows = clustered_rows(N, P, seed=9)
    weight = torch.rand(N, generator=torch.Generator().manual_seed(0)) + 0.5
    found = []
    for soft in (True, False):
        estimator = build(make_config(2048, P, estimator=name, **options))
        for seed in range(2):
            take_step(estimator, clustered_rows(N, P, seed=seed))
        estimator._is_dense, estimator._unread_share = False, None
        with monkeypatch.context() as patch:
            patch.setattr(expectation, "is_soft", lambda blocks, threshold, soft=soft: soft)
            patch.setattr(expectation, "keep_largest" if soft else "keep_whole_", None)
            take_step(estimator, rows, weight=weight)
        assert is_sparse(estimator)
        found.append(estimator)
    whole, listed = found
    for key, value in tensors(listed).items():
        torch.testing.assert_close(tensors(whole)[key], value, rtol=1e-4, atol=1e-5, msg=key)
    (hits, mass), (listed_hits, listed_mass) = whole.assignment(), listed.assignment()
    assert torch.equal(hits, listed_hits)
    assert torch.equal(mass > 0, listed_mass > 0)
    assert (mass == 0).any()
    torch.testing.assert_close(mass, listed_mass, rtol=1e-4, atol=1e-5)
    for key, value in listed.metrics().items():
        assert whole.metrics()[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_at_threshold_zero_nothing_sparse_happens_and_the_reference_is_not_read(monkeypatch):
    estimator, twin = begin(sparse=DENSE), begin(sparse=DENSE)
    twin.reference_vector.fill_(torch.nan)
    for name in ("find_top_logits", "keep_largest", "sum_touched"):
        monkeypatch.setattr(expectation, name, lambda *_, **__: pytest.fail("a sparse step"))
    for step in range(5):
        take_step(estimator, clustered_rows(N, P, seed=step))
        take_step(twin, clustered_rows(N, P, seed=step))
    left, right = tensors(estimator), tensors(twin)
    for key in set(left) - {"reference_vector"}:
        assert torch.equal(left[key], right[key]), key


# ------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("name", MIXTURES)
def test_mass_is_kept_and_what_is_not_touched_keeps_every_bit(name):
    estimator = begin(name)
    touched_once = torch.zeros(K, dtype=torch.bool)
    for seed in range(5):
        before = tensors(estimator)
        published = estimator.prototypes("teacher").clone()
        weight = torch.rand(N) + 0.5
        take_step(estimator, clustered_rows(N, P, num_clusters=4, spread=0.1, seed=seed), weight=weight)
        mass = estimator.assignment().mass
        torch.testing.assert_close(mass.sum(), weight.sum())
        untouched, after = mass == 0, tensors(estimator)
        touched_once |= ~untouched
        if not is_sparse(estimator):
            continue
        for table in estimator.row_tables:
            assert not moved(before, after, table)[untouched].any(), table
        assert torch.equal(after["counts"][untouched], before["counts"][untouched])
        assert torch.equal(estimator.prototypes("teacher")[untouched], published[untouched])
        # What a step publishes and keeps is what the tables say.
        twin = build(make_config(K, P, estimator=name, variance=VarianceConfig(shrinkage=0.0)))
        twin.load_state_dict(estimator.state_dict())
        assert torch.equal(twin.prototypes("teacher"), estimator.prototypes("teacher"))
    assert touched_once.any()


def test_natural_parameters_that_are_kept_are_those_of_the_tables():
    estimator = begin()
    for seed in range(7):
        take_step(estimator, clustered_rows(N, P, seed=seed))
        assert is_sparse(estimator)
        kept = estimator._natural
        theta, bias = estimator.natural_parameters(slice(0, K))
        assert torch.equal(kept[0], theta)
        assert torch.equal(kept[1], bias)
    assert not torch.equal(estimator.reference(), estimator.row_mean)


@pytest.mark.parametrize("width", [1, 511, 512, 513, 1300])
def test_winners_are_found_without_another_look(width):
    values = torch.randn(40, width, generator=torch.Generator().manual_seed(width))
    largest, winner = find_winners(values)
    assert torch.equal(largest, values.amax(1))
    assert torch.equal(winner, values.argmax(1))


# ------------------------------------------------------------------------------- when a step is dense


def test_a_step_that_would_leave_out_too_much_is_taken_with_everything(record_property):
    """Below step 100 the reference is the running mean: what is taken densely equals threshold 0 bit for bit."""
    soft = AnnealingConfig(schedule="constant", end=0.2, guard=None)
    steps = [clustered_rows(N, P, seed=seed) for seed in range(4)]
    dense, few = (
        build(make_config(K, P, beta=soft, sparse=SparseConfig(threshold=threshold)))
        for threshold in (0.0, 1e-2)
    )
    for rows in steps:
        few._is_dense, few._unread_share = False, None  # try, whatever the step before has found
        take_step(dense, rows)
        take_step(few, rows)
        assert not is_sparse(few)
        assert few.metrics()["gmm/dropped_mass"] == 0
    assert_same_state(tensors(dense), tensors(few))
    assert torch.equal(dense.assignment().hits, few.assignment().hits)


def test_steps_become_sparse_when_responsibilities_sharpen_and_dense_when_they_blur():
    estimator = build(make_config(K, P, sparse=SparseConfig(threshold=0.02)))
    seen = []
    for beta in (0.01, 400.0, 0.01, 400.0):
        for seed in range(3):
            estimator.annealing.beta = beta
            estimator.annealing.config = AnnealingConfig(schedule="constant", end=beta, guard=None)
            take_step(estimator, clustered_rows(N, P, seed=seed))
            assert estimator.metrics()["gmm/dropped_mass"] <= MAX_DROPPED
        seen.append(not is_sparse(estimator))
    assert seen == [True, False, True, False]


def test_a_mixture_that_is_soft_everywhere_stays_dense_without_trying(monkeypatch):
    """No responsibility is below the threshold: it is too many that count, and each step would be taken twice."""
    monkeypatch.setattr(sparse, "LARGEST", 8)
    estimator = build(make_config(K, P, beta=AnnealingConfig(schedule="constant", end=0.05, guard=None)))
    for name in ("find_top_logits", "keep_largest"):
        monkeypatch.setattr(expectation, name, lambda *_, **__: pytest.fail("a sparse step"))
    for seed in range(3):
        take_step(estimator, clustered_rows(N, P, seed=seed))
    assert estimator.metrics()["gmm/responsibility_perplexity"] > 20


def test_uniform_forgetting_says_once_that_it_is_dense(caplog):
    with caplog.at_level(logging.INFO):
        estimator = begin(forgetting="uniform")
        take_step(estimator, clustered_rows(N, P))
    said = [record.message for record in caplog.records if "all responsibilities" in record.message]
    assert len(said) == 1
    assert "uniform forgetting" in said[0]
    assert estimator._natural is None


def test_the_exchange_of_few_responsibilities_needs_a_threshold():
    with pytest.raises(ValueError, match=r"sparse.threshold is 0.0; expected more than 0"):
        make_config(K, P, sparse=DENSE, synchronization=SynchronizationConfig(method="sparse"))


# ------------------------------------------------------------------------------- take, drop, resume


@pytest.mark.parametrize("name", MIXTURES)
def test_a_dropped_sparse_step_leaves_every_bit(name):
    estimator, twin = begin(name), begin(name)
    take_step(estimator, clustered_rows(N, P, seed=3))
    take_step(twin, clustered_rows(N, P, seed=3))
    before, prototypes = tensors(estimator), estimator.prototypes("teacher").clone()
    extra, vanished = estimator.get_extra_state(), estimator.find_vanished()
    estimator.commit(estimator.observe(clustered_rows(N, P, seed=4)))
    assert estimator._touched_rows is not None
    assert not torch.equal(estimator.prototypes("teacher"), prototypes)
    estimator.discard()
    assert_same_state(before, tensors(estimator))
    assert torch.equal(estimator.prototypes("teacher"), prototypes)
    assert torch.equal(estimator.find_vanished(), vanished)
    assert estimator.get_extra_state() == extra
    for mixture in (estimator, twin):
        take_step(mixture, clustered_rows(N, P, seed=5))
    assert_same_state(tensors(twin), tensors(estimator))
    assert torch.equal(estimator.prototypes("teacher"), twin.prototypes("teacher"))


@pytest.mark.parametrize("name", MIXTURES)
def test_a_run_resumes_bitwise_between_two_references(name):
    options = {
        "variance": VarianceConfig(shrinkage=0.0),
        "revival": RevivalConfig(method="split", interval_steps=10, max_share=0.1),
    }
    estimator = begin(name, **options)
    for step in range(5):
        take_step(estimator, clustered_rows(N, P, seed=step))
    assert not torch.equal(estimator.reference_vector, estimator.row_mean)
    saved = {
        key: value.clone() if isinstance(value, torch.Tensor) else dict(value)
        for key, value in estimator.state_dict().items()
    }
    resumed = build(make_config(K, P, estimator=name, **options))
    resumed.load_state_dict(saved)
    references = set()
    for step in range(moments.REFERENCE_STEPS):
        for mixture in (estimator, resumed):
            take_step(mixture, clustered_rows(N, P, seed=step))
            mixture.reseed(mixture.step)
        assert torch.equal(estimator.prototypes("teacher"), resumed.prototypes("teacher"))
        references.add(float(estimator.reference_vector[0]))
    assert_same_state(tensors(estimator), tensors(resumed))
    assert estimator.get_extra_state() == resumed.get_extra_state()
    assert len(references) == 2


def test_a_state_from_before_there_was_a_reference_goes_on():
    estimator = begin()
    state = estimator.state_dict()
    extra = {key: value for key, value in state.pop("_extra_state").items() if key != "is_dense"}
    state.pop("reference_vector")
    resumed = build(make_config(K, P, variance=VarianceConfig(shrinkage=0.0)))
    resumed.load_state_dict({**state, "_extra_state": extra})
    assert torch.equal(resumed.reference(), estimator.row_mean)
    take_step(resumed, clustered_rows(N, P, seed=4))
    take_step(resumed, clustered_rows(N, P, seed=5))
    assert is_sparse(resumed)


def test_a_gpu_s_program_takes_the_same_steps_and_reads_nothing_on_the_way(monkeypatch):
    """With sizes that are fixed beforehand; run on a CPU. It reads one thing: how many rows are bad."""
    exact, fixed = begin(), begin()
    for seed in range(5):
        rows = clustered_rows(N, P, seed=seed)
        take_step(exact, rows)
        with monkeypatch.context() as patch, DeviceCounter() as counter:
            patch.setattr(sparse, "may_wait", lambda device: False)
            take_step(fixed, rows)
        assert list(counter.waits.values()) == [1], counter.waits
        assert is_sparse(fixed)
        assert torch.equal(exact.assignment().hits, fixed.assignment().hits)
    for key, value in tensors(exact).items():
        torch.testing.assert_close(tensors(fixed)[key], value, rtol=1e-5, atol=1e-6, msg=key)
    torch.testing.assert_close(exact.prototypes("teacher"), fixed.prototypes("teacher"))


def test_on_a_gpu_the_step_after_one_that_left_out_too_much_is_dense(monkeypatch):
    monkeypatch.setattr(sparse, "may_wait", lambda device: False)
    estimator = begin(sparse=SparseConfig(threshold=0.02))
    estimator.annealing.beta = 0.01
    estimator.annealing.config = AnnealingConfig(schedule="constant", end=0.01, guard=None)
    for expected in (True, False, False):
        take_step(estimator, clustered_rows(N, P))
        assert is_sparse(estimator) == expected
    assert estimator.get_extra_state()["is_dense"]
