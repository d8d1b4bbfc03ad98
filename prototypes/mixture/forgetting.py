"""How old statistics are forgotten as new responsibility arrives: pure functions of [K] vectors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from .config import GmmConfig, MemoryConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

MIN_MASS = 1e-6
"""Responsibility below which a component counts as unvisited: fp32 means of less mass are noise."""


_COUNT_FLOOR = 1e-6
"""Smallest count that uniform forgetting divides by; below it a mean shrinks to zero."""


class Forgetting(NamedTuple):
    """What a batch does to each component.

    Attributes:
        rate: rho_k of the update, 0 where the component was not visited.
        counts: n_k afterwards.
        shrink: factor of the means, or None for 1: uniform forgetting lets S1 / max(S0, floor) go to zero.
    """

    rate: Tensor
    counts: Tensor
    shrink: Tensor | None = None


def derive_memory(config: MemoryConfig, num_observations_per_epoch: int, num_prototypes: int) -> float:
    """Returns the effective memory M = 1 / (1 - lambda) in assigned samples.

    M = clamp(epochs * observations per epoch / K, minimum, maximum): half an epoch of the samples assigned to
    one component, unless given. Our choice; the paper leaves eta open.
    """
    if config.samples is not None:
        return config.samples
    per_component = num_observations_per_epoch / num_prototypes
    return min(max(config.epochs * per_component, config.minimum), config.maximum)


def forget(
    config: GmmConfig,
    memory: float,
    counts: Float[Tensor, " K"],
    mass: Float[Tensor, " K"],
    total_mass: Float[Tensor, ""],
) -> Forgetting:
    """Returns the rates and counts after a batch, by responsibility or uniformly.

    Responsibility-based (Celaya & Agostini 2015; the paper's Table A.1), for a batch of mass w_k::

        d_k = lambda^{w_k};  Omega_k = (1 - d_k) / (1 - lambda);  n_k' = d_k n_k + Omega_k;  rho_k = Omega_k / n_k'

    so w_k = 0 leaves the component bit-exactly as it was, and n_k settles at M = 1 / (1 - lambda) for every
    w_k > 0. The simple gain replaces Omega_k by w_k. With `responsibility_scale: mean` the exponent is
    w_k / N, which slows a large codebook down (kept to show it): one that wins w_k / N = 1 % of every batch has still
    moved most of the way after a hundred steps. Uniform forgetting (the ablation)::

        n_k' = (1 - eta) n_k + w_k;  rho_k = w_k / n_k';  mu_k = S1_k / max(n_k, 1e-6)

    "none" (the control) has rho_k = 0: means and variances stay, bit for bit, whatever mass they win.

    Args:
        config: forgetting, gain and scale.
        memory: M.
        counts: n_k before the batch.
        mass: w_k, the summed responsibilities of the batch over all ranks.
        total_mass: sum of the rows' weights, N.
    """
    if config.forgetting == "none":
        return Forgetting(torch.zeros_like(counts), counts)
    visited = mass > MIN_MASS
    if config.forgetting == "uniform":
        return _forget_uniformly(config.uniform_rate, counts, mass, visited, total_mass)
    exponent = mass if config.responsibility_scale == "sum" else mass / total_mass.clamp_min(1.0)
    # 1 - lambda^w without the cancellation of 1 - exp(-small)
    forgotten = -torch.expm1(exponent * math.log1p(-1.0 / memory))
    gain = forgotten * memory if config.gain == "omega" else exponent
    # n' = n + (gain - (1 - d) n): exactly stationary at the fixed point, where d n + gain would round
    new_counts = counts + (gain - forgotten * counts)
    rate = torch.where(visited, gain / new_counts, 0.0)
    return Forgetting(rate, torch.where(visited, new_counts, counts))


def _forget_uniformly(
    forgotten: float,
    counts: Float[Tensor, " K"],
    mass: Float[Tensor, " K"],
    visited: Bool[Tensor, " K"],
    total_mass: Float[Tensor, ""],
) -> Forgetting:
    new_counts = torch.where(total_mass > 0, (1 - forgotten) * counts + mass, counts)
    rate = torch.where(visited, mass / new_counts.clamp_min(_COUNT_FLOOR), 0.0)
    kept = new_counts / counts.clamp_min(torch.finfo(counts.dtype).tiny)
    shrink = torch.where(new_counts < _COUNT_FLOOR, kept.clamp_max(1.0), 1.0)
    return Forgetting(rate, new_counts, shrink)
