"""The diagonal mixture against naive float64 and against scikit-learn; forgetting; the numbered checks."""

import math

import numpy as np
import pytest
import torch

from prototypes.mixture.config import AnnealingConfig, GmmConfig, MemoryConfig, VarianceConfig
from prototypes.mixture.forgetting import derive_memory, forget
from tests.unit.prototypes import oracle
from tests.unit.prototypes.building import (
    assert_same_state,
    build,
    clustered_rows,
    exact_gmm,
    make_config,
    set_state,
    take_step,
    tensors,
)


def random_mixture(num_prototypes=12, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "means": rng.normal(size=(num_prototypes, dim)),
        "variances": rng.uniform(0.3, 2.0, size=(num_prototypes, dim)),
        "counts": rng.uniform(1, 20, size=num_prototypes),
        "mixing_weights": rng.dirichlet(np.full(num_prototypes, 5.0)),
    }


def as_float64(estimator):
    names = ("means", "variances", "counts", "mixing_weights")
    return {name: getattr(estimator, name).double().numpy().copy() for name in names}


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_step_equals_the_float64_oracle(beta):
    config = make_config(12, 8, **exact_gmm(beta=AnnealingConfig(schedule="constant", end=beta, guard=None)))
    estimator = set_state(build(config), **random_mixture())
    before = as_float64(estimator)
    rows = torch.randn(50, 8)
    h = rows.double().numpy()
    log_rho = oracle.log_joint(h, before["means"], before["variances"], before["mixing_weights"])
    gamma = oracle.responsibilities(log_rho, beta)
    np.testing.assert_allclose(estimator.responsibilities(rows).numpy(), gamma, atol=2e-6)
    np.testing.assert_allclose(
        estimator.log_likelihood(rows).numpy(), np.logaddexp.reduce(log_rho, axis=1), rtol=1e-5
    )
    take_step(estimator, rows)
    means, variances, counts = oracle.m_step(
        h, gamma, before["means"], before["variances"], before["counts"], 20.0
    )
    after = as_float64(estimator)
    np.testing.assert_allclose(after["means"], means, atol=1e-5)
    np.testing.assert_allclose(after["variances"], variances, atol=1e-5)
    np.testing.assert_allclose(after["counts"], counts, rtol=1e-5)
    share = gamma.sum(0) / gamma.sum()
    rate = min(0.01, 50 / 2000)
    expected_weights = before["mixing_weights"] + rate * (share - before["mixing_weights"])
    np.testing.assert_allclose(after["mixing_weights"], expected_weights / expected_weights.sum(), rtol=1e-5)


def test_shrinkage_and_floor():
    config = make_config(12, 8, input="raw", variance=VarianceConfig(floor=0.5, shrinkage=0.25))
    estimator = set_state(build(config), **random_mixture())
    state = as_float64(estimator)
    expected = oracle.shrink(state["variances"], state["counts"], np.ones(8), 0.25 * 20)
    np.testing.assert_allclose(estimator.shrunk_variances(slice(0, 12)).numpy(), expected, rtol=1e-5)
    for _ in range(300):
        take_step(estimator, 0.01 * torch.randn(64, 8) + estimator.means[:1])
    floor = 0.5 * estimator.row_covariance.diagonal()
    visited = estimator.counts > 15
    assert visited.any()
    assert (estimator.variances[visited] >= floor * 0.95).all()


# ------------------------------------------------------------------------------- forgetting (6.2: 1 - 4, 7)


def test_component_without_mass_keeps_its_state_bitwise():
    config = make_config(12, 8, **exact_gmm())
    mixture = random_mixture()
    mixture["means"][3] += 200.0
    estimator = set_state(build(config), **mixture)
    before = tensors(estimator)
    for _ in range(5):
        take_step(estimator, torch.randn(64, 8))
    after = tensors(estimator)
    for name in ("means", "variances", "counts"):
        assert torch.equal(before[name][3], after[name][3]), name
        assert not torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("mass", [0.03, 0.3, 3.0, 30.0])
def test_counts_settle_at_the_memory(mass):
    config, memory = GmmConfig(), 20.0
    counts = torch.tensor([16.0, 19.0, 26.0])
    for _ in range(int(200 / mass) + 20):
        counts = forget(config, memory, counts, torch.full((3,), mass), torch.tensor(100.0)).counts
    assert (counts - memory).abs().max() < 1e-3
    rate = forget(config, memory, counts, torch.full((3,), mass), torch.tensor(100.0)).rate
    torch.testing.assert_close(rate, torch.full((3,), 1 - (1 - 1 / memory) ** mass), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("mass", "expected"), [(0.05, 19.52), (3.0, 21.0), (300.0, 300.0)])
def test_simple_gain_settles_where_it_was_measured(mass, expected):
    counts = torch.tensor([expected + 0.5])
    for _ in range(int(200 / mass) + 20):
        counts = forget(
            GmmConfig(gain="simple"), 20.0, counts, torch.tensor([mass]), torch.tensor(1.0)
        ).counts
    assert float(counts) == pytest.approx(expected, rel=0.002)


@pytest.mark.learned
def test_batch_update_is_close_to_one_sample_after_the_other(record_property):
    config = make_config(4, 8, **exact_gmm())
    rng = np.random.default_rng(1)
    mixture = random_mixture(4)
    mixture["counts"][:] = 20.0
    estimator = set_state(build(config), **mixture)
    rows = torch.tensor(rng.normal(size=(16, 8)), dtype=torch.float32)
    before = as_float64(estimator)
    gamma = estimator.responsibilities(rows).double().numpy()
    sequential = oracle.sequential_means(
        rows.double().numpy(), gamma, before["means"], before["counts"], 20.0
    )
    take_step(estimator, rows)
    batch = as_float64(estimator)["means"]
    light = gamma.sum(0) <= 6
    assert gamma.sum(0)[light].max() > 1
    scale = np.linalg.norm(sequential[light], axis=1)
    error = (np.linalg.norm(batch - sequential, axis=1)[light] / scale).max()
    record_property("error", error)
    assert error < 0.02


def test_variance_recursion_is_second_moment_minus_square():
    memory = 20.0
    rng = np.random.default_rng(2)
    config = make_config(4, 2, **exact_gmm())
    estimator = set_state(build(config), **random_mixture(4, 2))
    for _ in range(30):
        before = as_float64(estimator)
        rows = torch.tensor(rng.normal(size=(20, 2)), dtype=torch.float32)
        gamma = estimator.responsibilities(rows).double().numpy()
        take_step(estimator, rows)
        expected = oracle.m_step(
            rows.double().numpy(), gamma, before["means"], before["variances"], before["counts"], memory
        )
        np.testing.assert_allclose(estimator.variances.numpy(), expected[1], atol=1e-5)


def test_uniform_forgetting_loses_what_it_does_not_see_and_responsibility_based_does_not():
    norms, nothing, total = {}, torch.zeros(1), torch.tensor(64.0)
    for forgetting in ("uniform", "responsibility"):
        counts, norm = torch.tensor([20.0]), torch.tensor([1.0])
        for _ in range(2000):
            step = forget(GmmConfig(forgetting=forgetting, uniform_rate=0.05), 20.0, counts, nothing, total)
            assert step.rate.item() == 0
            counts, norm = step.counts, norm * (1.0 if step.shrink is None else step.shrink)
        norms[forgetting] = (norm.item(), counts.item())
    assert norms["uniform"][0] < 1e-3
    assert norms["responsibility"] == (1.0, 20.0)


def test_uniform_forgetting_shrinks_the_means_of_the_state():
    # Far away and so narrow that it meets no row, not even once its mean has shrunk to the origin.
    mixture = random_mixture(4, 2)
    mixture["means"][0], mixture["variances"][0], mixture["counts"][0] = 300.0, 1e-8, 1e-7
    options = {
        "forgetting": "uniform",
        "uniform_rate": 0.5,
        "variance": VarianceConfig(floor=1e-9, shrinkage=0.0),
    }
    estimator = set_state(build(make_config(4, 2, **{**exact_gmm(), **options})), **mixture)
    for _ in range(30):
        take_step(estimator, torch.randn(8, 2))
    assert estimator.means[0].norm() < 1e-3
    assert estimator.means.isfinite().all()


def test_mean_responsibility_exponent_freezes_the_codebook():
    mass, total, counts = torch.full((64,), 0.5), torch.tensor(64.0), torch.full((64,), 20.0)
    rates = {
        scale: forget(GmmConfig(responsibility_scale=scale), 20.0, counts, mass, total).rate[0]
        for scale in ("sum", "mean")
    }
    assert rates["mean"] == pytest.approx(float(rates["sum"]) / 64, rel=0.05)


def test_memory_follows_the_half_epoch_rule():
    assert derive_memory(MemoryConfig(), 2 * 1_281_167, 65_536) == pytest.approx(19.55, abs=0.01)
    assert derive_memory(MemoryConfig(), 2 * 437_513, 65_536) == pytest.approx(6.68, abs=0.01)
    assert derive_memory(MemoryConfig(), 2 * 60_000, 1024) == pytest.approx(58.6, abs=0.01)
    assert derive_memory(MemoryConfig(), 10, 1024) == 4
    assert derive_memory(MemoryConfig(), 10**9, 1024) == 200
    assert derive_memory(MemoryConfig(samples=33.0), 10, 1024) == 33


# ------------------------------------------------------------------------------- EM as a whole (6.2: 5, 6, 8)


@pytest.mark.learned
def test_recovers_three_separated_blobs(record_property):
    rng = np.random.default_rng(0)
    true_means = np.zeros((3, 8))
    true_means[[0, 1, 2], [0, 1, 2]] = 4.0
    true_weights = np.array([0.5, 0.3, 0.2])
    labels = rng.choice(3, p=true_weights, size=20_000)
    data = (true_means[labels] + 0.5 * rng.normal(size=(20_000, 8))).astype(np.float32)
    start = true_means + 0.5 * rng.normal(size=(3, 8))
    config = make_config(3, 8, size=3, **exact_gmm(memory=MemoryConfig(samples=4000.0)))
    estimator = build(config, num_observations_per_epoch=20_000)
    # Memory of 4,000 samples wants a start that counts for less than the data.
    set_state(estimator, means=start, variances=np.ones((3, 8)), counts=np.ones(3))
    for _ in range(8):
        for batch in torch.tensor(data).split(500):
            take_step(estimator, batch)
    mean_error = float((estimator.means - torch.tensor(true_means)).abs().max())
    weights = np.bincount(labels, minlength=3) / len(labels)
    weight_error = np.abs(estimator.mixing_weights.numpy() - weights).max()
    means, variances, pi = start.copy(), np.ones((3, 8)), np.full(3, 1 / 3)
    for _ in range(30):
        gamma = oracle.responsibilities(oracle.log_joint(data, means, variances, pi))
        mass = gamma.sum(0)
        means = gamma.T @ data / mass[:, None]
        variances = gamma.T @ data**2 / mass[:, None] - means**2
        pi = mass / mass.sum()
    batch_em = np.logaddexp.reduce(oracle.log_joint(data, means, variances, pi), axis=1).mean()
    online = float(estimator.log_likelihood(torch.tensor(data)).mean())
    found = {"mean error": mean_error, "weight error": weight_error, "below batch EM": batch_em - online}
    for name, value in found.items():
        record_property(name, value)
    assert mean_error < 0.05 and weight_error < 0.02 and online > batch_em - 0.02


@pytest.mark.learned
def test_likelihood_rises_monotonically_on_a_fixed_batch(record_property):
    data = clustered_rows(400, 8, spread=0.5, seed=3)
    # A memory far below the mass makes lambda^w zero: each step is plain batch EM.
    estimator = build(make_config(6, 8, size=2, **exact_gmm(memory=MemoryConfig(samples=1.5))))
    take_step(estimator, data)
    previous = float(estimator.log_likelihood(data).mean())
    weights_rate = 400 / 2000
    assert weights_rate > 0.01
    values = []
    for _ in range(40):
        take_step(estimator, data)
        values.append(float(estimator.log_likelihood(data).mean()))
    steps = np.diff([previous, *values])
    record_property("smallest rise", steps.min())
    record_property("rise", values[-1] - previous)
    assert steps.min() > -1e-4
    assert values[-1] > previous + 0.5


@pytest.mark.learned
def test_beta_below_critical_merges_all_means_and_above_does_not(record_property):
    from prototypes.diagnostics import count_unique

    def unique_after(factor):
        rows = torch.randn(512, 16) @ torch.diag(torch.linspace(1.0, 0.2, 16))
        mixing = torch.linalg.qr(torch.randn(16, 16))[0]
        rows = rows @ mixing
        estimator = build(make_config(64, 16, **exact_gmm()), total_steps=200)
        take_step(estimator, rows)
        beta = factor * estimator.annealing.beta_critical
        estimator.annealing.config = AnnealingConfig(schedule="constant", end=beta, guard=None)
        estimator.annealing.beta = beta
        for _ in range(150):
            take_step(estimator, rows)
        unit = torch.nn.functional.normalize(estimator.means, dim=1)
        cosine = (unit @ unit.T)[~torch.eye(64, dtype=torch.bool)]
        record_property(f"cosine distances at {factor}, least", 1 - float(cosine.max()))
        record_property(f"cosine distances at {factor}, most", 1 - float(cosine.min()))
        return count_unique(estimator.means, (0.025,))[0.025]

    torch.manual_seed(0)
    assert unique_after(0.5) == 1
    assert unique_after(3.0) == 64


@pytest.mark.parametrize(("cosine", "floor"), [(0.0, 1.0), (0.0, 0.05), (0.9, 0.05), (0.9999, 0.05)])
@pytest.mark.learned
def test_e_step_against_naive_float64(cosine, floor, record_property):
    num_prototypes, dim, number = 256, 256, 64
    generator = torch.Generator().manual_seed(4)
    direction = torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)
    noise = torch.nn.functional.normalize(torch.randn(512, dim, generator=generator), dim=1)
    rows = math.sqrt(cosine) * direction + math.sqrt(1 - cosine) * noise
    rows = torch.nn.functional.normalize(rows, dim=1)
    estimator = build(make_config(num_prototypes, dim, variance=VarianceConfig(floor=0.05, shrinkage=0.0)))
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / len(rows)
    # So close, beside their width, that many components compete for each row, and rows between two of them.
    means = mean + 0.1 * math.sqrt(floor) * (rows[:num_prototypes] - mean)
    tables = {"means": means, "row_mean": mean, "row_covariance": covariance}
    set_state(estimator, **tables, variances=(floor * covariance.diagonal()).expand(num_prototypes, dim))
    h = (means[:number] + means[number : 2 * number]) / 2
    features = estimator.row_features(estimator.preprocess(h) - estimator.reference())
    log_rho = estimator._log_joint(features).double().numpy()
    exact = oracle.log_joint(
        estimator.preprocess(h).double().numpy(),
        estimator.means.double().numpy(),
        estimator.variances.double().numpy(),
        estimator.mixing_weights.double().numpy(),
    )
    limit = 1e-3 if floor == 1.0 else 5e-3
    # The common offset of a row cancels in the responsibilities.
    error = (log_rho - log_rho.max(1, keepdims=True)) - (exact - exact.max(1, keepdims=True))
    near = exact > exact.max(1, keepdims=True) - 20
    gamma = oracle.responsibilities(exact)
    l1 = np.abs(estimator.responsibilities(h).numpy() - gamma).sum(1).max()
    assert near.sum(1).mean() > 10, "one component alone has no error beside itself"
    record_property("log joint", np.abs(error[near]).max())
    record_property("l1", l1)
    assert np.abs(error[near]).max() <= limit
    assert l1 <= 5e-3


def test_agrees_with_scikit_learn_from_the_same_parameters():
    from sklearn.mixture import GaussianMixture

    data = clustered_rows(300, 8, spread=0.6, seed=5)
    mixture = random_mixture(6)
    estimator = set_state(
        build(make_config(6, 8, size=2, **exact_gmm(memory=MemoryConfig(samples=1.0001)))), **mixture
    )
    reference = GaussianMixture(6, covariance_type="diag", reg_covar=0.0)
    state = as_float64(estimator)
    reference.weights_, reference.means_ = state["mixing_weights"], state["means"]
    reference.covariances_ = state["variances"]
    reference.precisions_cholesky_ = 1 / np.sqrt(state["variances"])
    h = data.double().numpy()
    np.testing.assert_allclose(
        estimator.responsibilities(data).numpy(), reference.predict_proba(h), atol=1e-5
    )
    np.testing.assert_allclose(estimator.log_likelihood(data).numpy(), reference.score_samples(h), rtol=1e-5)
    log_gamma = reference._estimate_log_prob_resp(h)[1]
    reference._m_step(h, log_gamma)
    take_step(estimator, data)
    np.testing.assert_allclose(estimator.means.numpy(), reference.means_, atol=1e-4)
    np.testing.assert_allclose(estimator.variances.numpy(), reference.covariances_, atol=1e-4)


def test_identical_features_for_a_thousand_steps_stay_finite():
    estimator = build(make_config(16, 8))
    row = torch.randn(1, 8)
    for _ in range(1000):
        take_step(estimator, row.expand(32, 8))
    state = tensors(estimator)
    assert all(value.isfinite().all() for value in state.values())
    assert estimator.prototypes("teacher").isfinite().all()
    assert estimator.responsibilities(row).isfinite().all()


@pytest.mark.learned
def test_running_means_do_not_stall_in_single_precision(record_property):
    """A slow random walk of a component is tracked like float64 would."""
    estimator = set_state(build(make_config(2, 2, size=2, **exact_gmm(memory=MemoryConfig(samples=200.0)))))
    set_state(
        estimator, means=[[1.0, 1.0], [50.0, 50.0]], variances=torch.full((2, 2), 0.5), counts=[200.0, 200.0]
    )
    reference, counts = np.array([1.0, 1.0]), 200.0
    generator = torch.Generator().manual_seed(6)
    for step in range(2000):
        row = torch.tensor([[1.0 + 1e-4 * step, 1.0]]) + 1e-3 * torch.randn(1, 2, generator=generator)
        take_step(estimator, row, weight=torch.tensor([0.05]))
        d = (1 - 1 / 200.0) ** 0.05
        omega = (1 - d) * 200.0
        counts = d * counts + omega
        reference = reference + omega / counts * (row[0].double().numpy() - reference)
    found = estimator.means[0].double().numpy()
    record_property("error", np.abs(found / reference - 1).max())
    np.testing.assert_allclose(found, reference, rtol=2e-6)


def test_first_step_that_is_skipped_leaves_no_trace():
    estimator = build(make_config(16, 8))
    before = tensors(estimator)
    extra = estimator.get_extra_state()
    estimator.commit(estimator.observe(torch.randn(32, 8)))
    estimator.discard()
    assert_same_state(before, tensors(estimator))
    assert estimator.get_extra_state() == extra
