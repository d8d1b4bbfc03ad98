"""Short ways to make estimators and features in tests."""

import dataclasses
from typing import get_args

import torch

from prototypes.build import build_estimator
from prototypes.config import EstimatorName, PartitionConfig, PrototypesConfig
from prototypes.mixture.config import (
    AnnealingConfig,
    GmmConfig,
    MemoryConfig,
    MixingWeightsConfig,
    VarianceConfig,
)

# Every family that `prototypes.estimator` can name, new ones included, but for the one that is no mixture.
MIXTURES = tuple(name for name in get_args(EstimatorName) if name != "sinkhorn")


def make_config(num_prototypes=16, dim=8, mode="full", estimator="gmm_diag", size=4, **gmm):
    """A configuration; keywords of GmmConfig go to the mixture, plain by default: beta 1, M = 20, input l2."""
    gmm.setdefault("beta", AnnealingConfig(schedule="constant", guard=None))
    gmm.setdefault("memory", MemoryConfig(samples=20.0))
    return PrototypesConfig(
        mode=mode,
        estimator=estimator,
        num_prototypes=num_prototypes,
        dim=dim,
        partition=PartitionConfig(size=size),
        gmm=GmmConfig(**gmm),
    )


def exact_gmm(**gmm):
    """Options under which EM is exact: raw input, no shrinkage, a floor too low to matter, free weights."""
    options = {
        "input": "raw",
        "variance": VarianceConfig(floor=1e-6, shrinkage=0.0),
        "mixing_weights": MixingWeightsConfig(mode="tracked", floor=1e-6),
    }
    return {**options, **gmm}


def build(config, **context):
    context = {"seed": 0, "num_observations_per_epoch": 1000, "total_steps": 100, **context}
    return build_estimator(config, **context)


def take_step(estimator, rows, **kwargs):
    estimator.commit(estimator.observe(rows, **kwargs))
    estimator.accept()


def tensors(estimator):
    return {
        key: value.clone() for key, value in estimator.state_dict().items() if isinstance(value, torch.Tensor)
    }


def assert_same_state(left, right):
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


def set_state(estimator, **tables):
    """Puts an estimator where a test wants it, past its initialisation."""
    for name, value in tables.items():
        getattr(estimator, name).copy_(torch.as_tensor(value, dtype=torch.float32))
    estimator.is_initialised = True
    estimator.forget_derived()
    return estimator


def clustered_rows(number, dim, num_clusters=6, spread=0.15, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_clusters, dim, generator=generator)
    index = torch.randint(0, num_clusters, (number,), generator=generator)
    return centres[index] + spread * torch.randn(number, dim, generator=generator)


def with_gmm(config, **changes):
    return dataclasses.replace(config, gmm=dataclasses.replace(config.gmm, **changes))
