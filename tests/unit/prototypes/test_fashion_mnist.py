"""The estimator alone on real features: Fashion-MNIST pixels, PCA-64, half-whitened, unit length; K = 1,024.

Measured once with NumPy (4 epochs of batches of 256, M = 29): a mixture started from data uses most prototypes
and fits well; uniform forgetting loses half of them; an exponent of mean responsibilities freezes the codebook,
whose uniqueness is then that of random directions.
"""

import numpy as np
import pytest
import torch

from prototypes.build import build_estimator
from prototypes.config import PartitionConfig, PrototypesConfig
from prototypes.diagnostics import count_unique
from prototypes.mixture.config import (
    AnnealingConfig,
    GmmConfig,
    InitialisationConfig,
    MemoryConfig,
    MixingWeightsConfig,
    VarianceConfig,
)

ARMS = {
    "frozen": {"responsibility_scale": "mean"},
    "rbf_sphere": {},
    "rbf_data": {"init": "data"},
    "rbf_annealed": {"beta": (0.3, 1.0)},
    "rbf_cold": {"beta": (0.1, 1.0)},
    "uniform_sphere": {"forgetting": "uniform"},
    "uniform_data": {"forgetting": "uniform", "init": "data"},
    "uniform_slow": {"forgetting": "uniform", "init": "data", "beta": (0.3, 1.0), "uniform_rate": 0.01},
}


@pytest.fixture(scope="module")
def features():
    pytest.importorskip("data.writing.fashion_mnist", reason="needs data/writing/fashion_mnist.py")
    from data.datasets import DataError
    from data.writing.fashion_mnist import fetch, open_fashion_mnist

    try:
        images = open_fashion_mnist(fetch("datasets/downloads/fashion-mnist"), "train").images
    except DataError as error:
        pytest.skip(f"needs Fashion-MNIST: {error}")
    pixels = torch.tensor(images.reshape(len(images), -1) / np.float32(255), dtype=torch.float32)
    pixels -= pixels.mean(0)
    values, vectors = torch.linalg.eigh((pixels.T @ pixels / len(pixels)).double())
    projected = pixels @ vectors[:, -64:].float()
    half_white = projected * values[-64:].float().pow(-0.25)
    return torch.nn.functional.normalize(half_white, dim=1)


def make_arm(name, total_steps):
    options = dict(ARMS[name])
    start, end = options.pop("beta", (1.0, 1.0))
    schedule = "geometric" if start < end else "constant"
    beta = AnnealingConfig(schedule=schedule, start=start, end=end, fraction=0.5, guard=None)
    init = InitialisationConfig(method=options.pop("init", "sphere"))
    gmm = GmmConfig(
        beta=beta,
        init=init,
        memory=MemoryConfig(samples=29.0),
        variance=VarianceConfig(floor=0.05, shrinkage=0.0),
        mixing_weights=MixingWeightsConfig(mode="tracked"),
        **options,
    )
    config = PrototypesConfig(num_prototypes=1024, dim=64, partition=PartitionConfig(size=256), gmm=gmm)
    return build_estimator(config, seed=0, num_observations_per_epoch=60_000, total_steps=total_steps)


def run_arm(name, features, epochs=4):
    batches = len(features) // 256
    estimator = make_arm(name, epochs * batches)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for index in torch.randperm(len(features), generator=generator)[: batches * 256].split(256):
            estimator.commit(estimator.observe(features[index]))
            estimator.accept()
    held, prototypes = features[:4000], estimator.prototypes("teacher")
    gamma = torch.cat([estimator.responsibilities(rows) for rows in held.split(500)])
    mass = sum(estimator.responsibilities(rows).sum(0) for rows in features.split(2000))
    norms = estimator.means.norm(dim=1)
    # A mean that has vanished has no direction; as the zero vector it would be refused.
    unique = count_unique(torch.where(norms[:, None] > 0, estimator.means, 1.0))
    return {
        **{f"u({eps})": count / 1024 for eps, count in unique.items()},
        "dead": float((mass < 0.05 * len(features) / 1024).float().mean()),
        "zero_norm": float((norms < 1e-3).float().mean()),
        "used": len(gamma.argmax(1).unique()),
        "distance": float(1 - (held @ prototypes.T).amax(1).mean()),
        "log_likelihood": float(estimator.log_likelihood(held).mean()),
    }


@pytest.mark.learned
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_table_of_estimators_on_fashion_mnist(features, record_property):
    results = {name: run_arm(name, features) for name in ARMS}
    for name, result in results.items():
        for key, value in result.items():
            record_property(f"{name} {key}", value)
        print(f"{name:16s}", " ".join(f"{key} {value:.3g}" for key, value in result.items()))
    data, uniform = results["rbf_data"], results["uniform_data"]
    assert data["used"] >= 0.8 * 1024
    assert data["log_likelihood"] > uniform["log_likelihood"] + 5
    assert data["dead"] <= 0.1
    assert data["zero_norm"] == 0
    assert data["u(0.025)"] >= 0.99
    assert uniform["zero_norm"] > 0.05
    assert results["frozen"]["used"] < 0.05 * 1024
    assert results["frozen"]["u(0.5)"] > 0.9
