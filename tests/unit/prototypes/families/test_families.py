"""Every family of mixtures, its E-step and one step, against naive float64; so are moments, weights and AdamW."""

import dataclasses

import numpy as np
import pytest
import torch

from prototypes.config import ClusteringConfig
from prototypes.diagnostics import UsageCounter
from prototypes.mixture.annealing import compute_critical_beta
from prototypes.mixture.config import MixingWeightsConfig, VarianceConfig
from prototypes.mixture.mixing import compute_rates, update_mixing_weights, update_usage
from tests.unit.prototypes import oracle
from tests.unit.prototypes.building import build, clustered_rows, exact_gmm, make_config, set_state, take_step

K, P, MEMORY = 6, 8, 20.0


def start(name, rows, seed=0, **gmm):
    """An estimator in a random state whose running moments are those of `rows`; and its tables in float64."""
    rng = np.random.default_rng(seed)
    estimator = build(make_config(K, P, size=3, estimator=name, **gmm))
    mean = rows.mean(0)
    tables = {
        "means": rng.normal(size=(K, P)),
        "counts": rng.uniform(1, 20, size=K),
        "mixing_weights": rng.dirichlet(np.full(K, 5.0)),
        "row_mean": mean,
        "row_covariance": (rows - mean).T @ (rows - mean) / len(rows),
    }
    if hasattr(estimator, "variances"):
        tables["variances"] = rng.uniform(0.3, 2.0, size=tuple(estimator.variances.shape))
    if name in ("vmf", "sph_kmeans"):
        lengths = rng.uniform(0.3, 0.8, size=(K, 1)) if name == "vmf" else 1.0
        tables["means"] *= lengths / np.linalg.norm(tables["means"], axis=1, keepdims=True)
    set_state(estimator, **tables)
    estimator.step = 200
    return estimator, {name: getattr(estimator, name).double().numpy().copy() for name in tables}


def unit_rows(number=50, seed=0):
    return torch.nn.functional.normalize(clustered_rows(number, P, spread=0.5, seed=seed), dim=1)


def assert_responsibilities(estimator, rows, log_rho):
    gamma = oracle.responsibilities(log_rho)
    np.testing.assert_allclose(estimator.responsibilities(rows).numpy(), gamma, atol=2e-5)
    return gamma


@pytest.mark.parametrize("name", ["gmm_spherical", "gmm_tied_diag", "gmm_tied_spherical"])
def test_shared_variances(name):
    rows = clustered_rows(50, P, spread=0.5)
    estimator, before = start(name, rows, **exact_gmm())
    h = rows.double().numpy()
    variances = np.broadcast_to(before["variances"], (K, P))
    log_rho = oracle.log_joint(h, before["means"], variances, before["mixing_weights"])
    gamma = assert_responsibilities(estimator, rows, log_rho)
    take_step(estimator, rows)
    means = oracle.merge(before["means"], before["counts"], gamma, h, MEMORY)
    np.testing.assert_allclose(estimator.means.numpy(), means, atol=1e-5)
    if name == "gmm_spherical":
        expected = oracle.m_step(h, gamma, before["means"], variances, before["counts"], MEMORY)[1]
        expected = expected.mean(1, keepdims=True)
    else:
        scatter = (gamma[:, :, None] * (h[:, None] - means[None]) ** 2).sum((0, 1)) / len(h)
        scatter = scatter if name == "gmm_tied_diag" else scatter.mean(keepdims=True)
        expected = 0.99 * before["variances"] + 0.01 * scatter
    np.testing.assert_allclose(estimator.variances.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("shrinkage", [0.0, 0.25])
def test_von_mises_fisher(shrinkage):
    rows = unit_rows()
    estimator, before = start("vmf", rows, variance=VarianceConfig(floor=0.05, shrinkage=shrinkage))
    h = rows.double().numpy()
    kappa = oracle.vmf_concentration(
        np.linalg.norm(before["means"], axis=1),
        before["counts"],
        P,
        np.diag(before["row_covariance"]).mean(),
        shrinkage * MEMORY,
        0.05,
    )
    gamma = oracle.responsibilities(oracle.vmf_log_joint(h, before["means"], before["mixing_weights"], kappa))
    # The expansion of the normaliser is good to about 1e-3 at eight dimensions.
    np.testing.assert_allclose(estimator.responsibilities(rows).numpy(), gamma, atol=1e-3)
    gamma = estimator.responsibilities(rows).double().numpy()
    take_step(estimator, rows)
    means = oracle.merge(before["means"], before["counts"], gamma, h, MEMORY)
    np.testing.assert_allclose(estimator.means.numpy(), means, atol=1e-5)


@pytest.mark.parametrize("hard", [False, True])
def test_spherical_k_means(hard):
    rows = unit_rows()
    estimator, before = start("sph_kmeans", rows, kmeans_temperature=0.2, kmeans_hard=hard)
    h = rows.double().numpy()
    cosine = h @ before["means"].T
    gamma = (cosine == cosine.max(1, keepdims=True)) * 1.0 if hard else oracle.responsibilities(cosine / 0.2)
    np.testing.assert_allclose(estimator.responsibilities(rows).numpy(), gamma, atol=2e-5)
    take_step(estimator, rows)
    means = oracle.merge(before["means"], before["counts"], gamma, h, MEMORY)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(estimator.means.numpy(), means, atol=1e-5)


def test_variational_bayes():
    rows = clustered_rows(50, P, spread=0.5)
    estimator, before = start(
        "vb_gmm", rows, **exact_gmm(variance=VarianceConfig(floor=1e-6, shrinkage=0.25))
    )
    config = estimator.gmm.variational
    log_rho = oracle.variational_log_joint(
        rows.double().numpy(),
        before["means"],
        before["variances"],
        before["counts"],
        before["mixing_weights"],
        before["row_mean"],
        np.diag(before["row_covariance"]),
        (config.mean_strength, 0.25 * MEMORY / 2, config.weight_concentration, MEMORY * K),
    )
    assert_responsibilities(estimator, rows, log_rho)
    np.testing.assert_allclose(
        estimator.log_likelihood(rows).numpy(), np.logaddexp.reduce(log_rho, axis=1), rtol=1e-5
    )


def test_running_moments_and_the_critical_beta():
    rows = clustered_rows(50, P, spread=0.5) + 3.0
    estimator, before = start("gmm_diag", rows, **exact_gmm())
    batch = clustered_rows(40, P, spread=0.7, seed=1)
    take_step(estimator, batch)
    mean, covariance = oracle.running_moments(
        before["row_mean"], before["row_covariance"], batch.double().numpy(), 0.01
    )
    np.testing.assert_allclose(estimator.row_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(estimator.row_covariance.numpy(), covariance, atol=1e-5)
    fresh = build(make_config(K, P, size=3, **exact_gmm()))
    take_step(fresh, rows)
    assert fresh.annealing.beta_critical == pytest.approx(
        oracle.critical_beta(rows.double().numpy()), rel=1e-4
    )
    assert compute_critical_beta(torch.eye(P)) == 1.0


def test_mixing_weights_usage_and_their_rates():
    rng = np.random.default_rng(0)
    weights, mass = rng.dirichlet(np.ones(K)), rng.uniform(0, 9, size=K)
    floor = 0.5
    tensors = [torch.tensor(value, dtype=torch.float32) for value in (weights, mass)]
    slow, fast = compute_rates(tensors[1], 1000)
    assert float(slow) == pytest.approx(min(0.01, mass.sum() / 2000))
    assert float(fast) == pytest.approx(min(0.1, 4 * mass.sum() / 1000))
    tracked = np.maximum(weights + 0.1 * (mass / mass.sum() - weights), floor / K)
    expected = {"tracked": tracked / tracked.sum(), "uniform": weights}
    for mode, value in expected.items():
        config = MixingWeightsConfig(mode=mode, floor=floor)
        updated = update_mixing_weights(config, *tensors, torch.tensor(0.1))
        np.testing.assert_allclose(updated.numpy(), value, rtol=1e-5)
    usage = update_usage(tensors[0], tensors[1], torch.tensor(0.1))
    np.testing.assert_allclose(usage.numpy(), weights + 0.1 * (mass / mass.sum() - weights), rtol=1e-5)


def test_usage_perplexity():
    counter = UsageCounter(7)
    counter.by_logits += torch.tensor([5, 0, 1, 1, 0, 9, 2])
    expected = oracle.perplexity(counter.by_logits.numpy()) / 7
    assert counter.metrics()["prototypes/usage_perplexity"] == pytest.approx(expected)


def test_the_clustering_optimizer_is_adamw():
    clustering = ClusteringConfig(learning_rate=0.01, weight_decay=0.1, warmup_fraction=0.0, cosine_end=0.0)
    config = dataclasses.replace(make_config(K, P, size=3, mode="partial"), clustering=clustering)
    estimator = build(config)
    table = torch.nn.Parameter(estimator.means.clone())
    optimizer = torch.optim.AdamW([table], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(5):
        observation = estimator.observe(clustered_rows(30, P, seed=step))
        gradient = observation.handle.wait()
        table.grad = (gradient[:-3] / gradient[-2]).view_as(table)
        optimizer.step()
        estimator.commit(observation)
        estimator.accept()
        torch.testing.assert_close(estimator.means, table.detach(), rtol=1e-5, atol=1e-6)
