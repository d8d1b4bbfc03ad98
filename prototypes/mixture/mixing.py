"""Mixing weights and usage: running shares of responsibility, one per component."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .config import MixingWeightsConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


_WEIGHT_EPOCHS = 2.0
_USAGE_EPOCHS = 0.25
_MAX_WEIGHT_RATE = 0.01
_MAX_USAGE_RATE = 0.1


def compute_rates(
    mass: Float[Tensor, " K"], num_observations_per_epoch: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Returns the weights e of one batch in the mixing weights and in the usage; 0 without mass.

    e = min(.01, N / 2 epochs) for pi, which must not follow chance. Usage is what revival and balance act
    on: min(.1, N / (1/4 epoch)), so that a component without mass falls below 5 % of an even share within an
    epoch; at the pace of pi that takes six. Source: ours.

    Args:
        mass: w_k of the batch over all ranks.
        num_observations_per_epoch: rows in one epoch over all ranks.
    """
    epochs = mass.sum() / num_observations_per_epoch
    weight_rate = (epochs / _WEIGHT_EPOCHS).clamp_max(_MAX_WEIGHT_RATE)
    return weight_rate, (epochs / _USAGE_EPOCHS).clamp_max(_MAX_USAGE_RATE)


def update_usage(
    usage: Float[Tensor, " K"], mass: Float[Tensor, " K"], rate: Float[Tensor, ""]
) -> Float[Tensor, " K"]:
    """Returns u <- u + e (w / sum w - u), the running share of responsibility, without a floor.

    Args:
        usage: running share, sums to 1.
        mass: w_k of the batch over all ranks.
        rate: e, 0 where the batch has no mass.
    """
    return usage + rate * (mass / mass.sum().clamp_min(1e-12) - usage)


def update_mixing_weights(
    config: MixingWeightsConfig,
    weights: Float[Tensor, " K"],
    mass: Float[Tensor, " K"],
    rate: Float[Tensor, ""],
) -> Float[Tensor, " K"]:
    """Returns pi after a batch; bitwise `weights` where the batch has no mass.

    "tracked": pi <- pi + e (w / sum w - pi), then max(pi, floor / K), renormalised. pi is tracked on its own
    because the counts saturate at M for every component: pi in proportion to them would be nearly uniform. Time-based
    averaging is right here: a weight must fall when mass stays away. Source: ours, after Sato & Ishii 2000.
    """
    if config.mode == "uniform":
        return weights
    floored = update_usage(weights, mass, rate).clamp_min(config.floor / len(weights))
    return torch.where(mass.sum() > 0, floored / floored.sum(), weights)
