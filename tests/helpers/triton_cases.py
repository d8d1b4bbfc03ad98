"""Runs the Triton E-step in Triton's interpreter and keeps what it was given and what it found: OUT.pt.

A process of its own: the interpreter must be chosen before triton is imported, and the shapes that pytest checks at
every call would come between triton and its kernels.
"""

import sys

import torch

from benchmarks.gmm import place_at_the_variance_floor
from prototypes.mixture import kernel as kernel_module
from prototypes.mixture.config import AnnealingConfig
from tests.unit.prototypes.building import MIXTURES, build, clustered_rows, make_config, take_step, tensors

PRODUCTS = ("fp32", "bf16x3")
# rows, components, features, kept: several blocks of rows and ranges of components, remainders everywhere, one tile,
# all components kept, no rows.
SHAPES = {
    "split": (66, 200, 40, 4),
    "one_tile": (3, 60, 8, 32),
    "all_kept": (2, 4, 3, 4),
    "no_rows": (0, 80, 8, 8),
}

# Natural parameters that are kept and that are not; logits that the probe needs beside what the kernel keeps.
TRAINED = {
    "kept": ("gmm_diag", {}),
    "tied": ("gmm_tied_spherical", {}),
    "penalised": ("vmf", {"balance": 0.5}),
    "annealed": ("gmm_spherical", {"beta": AnnealingConfig(start=0.8, guard=None)}),
    "hard": ("sph_kmeans", {"kmeans_hard": True}),
}


def draw(num_rows, num_components, num_features):
    generator = torch.Generator().manual_seed(num_components)
    features = torch.randn(num_rows, num_features, generator=generator)
    theta = torch.randn(num_components, num_features, generator=generator)
    return features, theta, torch.randn(num_components, generator=generator)


def with_ties():
    """Rows of small integers, so that products are exact: pairs of components share every logit."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(-2, 3, (3, 8), generator=generator).float()
    theta = torch.randint(-2, 3, (70, 8), generator=generator).float()
    return features, torch.cat([theta, theta]), torch.zeros(140)


def of_a_family(name):
    """A mixture of that family that has seen a few batches, and a batch; as the E-step would see them."""
    estimator = build(make_config(num_prototypes=64, dim=8, estimator=name, kernel="torch"))
    for seed in range(3):
        take_step(estimator, clustered_rows(64, 8, seed=seed))
    rows = clustered_rows(3, 8, seed=7)
    everything = slice(0, 64)
    theta, bias = estimator.natural_parameters(everything)
    return estimator._features(rows), theta.contiguous(), bias + estimator.log_mixing_weights(everything)


def at_the_variance_floor(cosine):
    """The hardest rows for a product: each between two means, all variances at the floor."""
    estimator, rows = place_at_the_variance_floor(cosine, num_prototypes=128, dim=64, num_rows=4)
    everything = slice(0, 128)
    theta, bias = estimator.natural_parameters(everything)
    return estimator._features(rows), theta, bias + estimator.log_mixing_weights(everything)


def train(name, **gmm):
    """The state of a mixture after a dense and some sparse steps, and what kernel they used."""
    estimator = build(make_config(num_prototypes=64, dim=32, estimator=name, **gmm))
    for seed in range(3):
        take_step(estimator, clustered_rows(64 if seed == 0 else 3, 32, spread=0.05, seed=seed))
    state = {
        **tensors(estimator),
        "responsibilities": estimator.responsibilities(clustered_rows(9, 32, seed=9)),
    }
    return state, estimator.get_extra_state()["kernel"], estimator._is_dense


def main(out):
    from prototypes.mixture.triton_e_step import (
        scan_components,
    )  # the tests import this file where triton is missing

    cases = {name: (*draw(n, k, f), 0.7, m) for name, (n, k, f, m) in SHAPES.items()}
    cases["ties"] = (*with_ties(), 1.0, 8)
    cases |= {name: (*of_a_family(name), 1.0, 8) for name in MIXTURES}
    cases |= {f"floor_{cosine}": (*at_the_variance_floor(cosine), 1.0, 8) for cosine in (0.0, 0.9)}
    found = {}
    for name, inputs in cases.items():
        for product in PRODUCTS:
            found[name, product] = (inputs, tuple(scan_components(*inputs, product)))
    for case, (name, gmm) in TRAINED.items():
        for kernel in ("torch", "triton"):
            found[case, kernel] = train(name, kernel=kernel, **gmm)
    kernel_module._WARM_UP_RUNS, kernel_module._TIMED_RUNS = 0, 1
    found["auto"] = train("gmm_diag", kernel="auto")
    torch.save(found, out)


if __name__ == "__main__":
    main(sys.argv[1])
