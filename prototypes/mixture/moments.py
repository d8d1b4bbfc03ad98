"""Running moments of the inputs and rows, and the space in which the mixture sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..statistics import Collectives
from .config import GmmConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_LAST_RATE = 0.01
"""Weight of one step in the running moments once a hundred were seen."""

REFERENCE_STEPS = 100
"""Steps between two copies of the running mean to the reference vector, once it moves slowly; see `model.Mixture`."""

MOMENT_TABLES = ("input_mean", "input_variance", "row_mean", "row_covariance")


def compute_moments_rate(step: int) -> float:
    """Returns the weight of one step in the running moments: 1 / (step + 1), then .01.

    With .01 from the start the first batch alone would hold the larger half for seventy steps, in which the
    features of an untrained encoder move fastest.
    """
    return max(_LAST_RATE, 1.0 / (step + 1))


def is_reference_step(step: int) -> bool:
    """Returns whether the reference moves after `step` updates: always while the running mean moves by 1 / (t + 1)."""
    return compute_moments_rate(step) > _LAST_RATE or step % REFERENCE_STEPS == 0


def initial_moments(dim: int) -> dict[str, Tensor]:
    """Returns the moments before any row was seen: mean 0, variance 1."""
    return {
        "input_mean": torch.zeros(dim),
        "input_variance": torch.ones(dim),
        "row_mean": torch.zeros(dim),
        "row_covariance": torch.eye(dim),
    }


def recentre(
    projections: Float[Tensor, "*batch P"],
    config: GmmConfig,
    mean: Float[Tensor, " P"],
    variance: Float[Tensor, " P"],
) -> Float[Tensor, "*batch P"]:
    """Returns the projections centred and standardised by the running statistics, as configured; fp32.

    The statistics are detached; gradient flows through `projections`. Components without mass drift with the
    features this way. Source: ours (the paper leaves the input of the mixture open).
    """
    projections = projections.float()
    if config.center or config.standardise:
        projections = projections - mean
    if config.standardise:
        projections = projections * variance.clamp_min(1e-12).rsqrt()
    return projections


def preprocess(
    inputs: Float[Tensor, "N P"],
    config: GmmConfig,
    mean: Float[Tensor, " P"],
    variance: Float[Tensor, " P"],
) -> Float[Tensor, "N P"]:
    """Returns the rows that the mixture models: recentred, then at unit length, as configured; fp32."""
    rows = recentre(inputs, config, mean, variance)
    return nn.functional.normalize(rows, dim=1) if config.input == "l2" else rows


def compute_global_moments(
    rows: Float[Tensor, "N P"], weight: Float[Tensor, " N"], collectives: Collectives
) -> tuple[Float[Tensor, " P"], Float[Tensor, "P P"]]:
    """Returns mean and covariance of all ranks' rows. Collective: two reductions, waited for.

    The second moment is taken around the mean, so features that share a direction lose no digits.
    """
    total = torch.cat([(weight[:, None] * rows).sum(0), weight.sum()[None]])
    total = collectives.start_sum(total).wait()
    number = total[-1].clamp_min(1e-12)
    mean = total[:-1] / number
    centred = rows - mean
    outer = collectives.start_sum(centred.T @ (weight[:, None] * centred)).wait()
    return mean, outer / number


def accumulate_moments_(
    sums: dict[str, Tensor],
    inputs: Float[Tensor, "N P"],
    rows: Float[Tensor, "N P"],
    weight: Float[Tensor, " N"],
    moments: dict[str, Tensor],
) -> None:
    """Writes this rank's first and second moments around the running means into `sums`, in place."""
    shifted = rows - moments["row_mean"]
    weighted = weight[:, None] * shifted
    sums["sum_rows"].copy_(weighted.sum(0))
    sums["sum_outer"].copy_(shifted.T @ weighted)
    shifted_inputs = inputs - moments["input_mean"]
    sums["sum_inputs"].copy_((weight[:, None] * shifted_inputs).sum(0))
    sums["sum_input_squares"].copy_((weight[:, None] * shifted_inputs.square()).sum(0))


def update_moments(
    moments: dict[str, Tensor], sums: dict[str, Tensor], num_rows: Float[Tensor, ""], rate: float
) -> dict[str, Tensor]:
    """Returns the running moments after a step of weight `rate`; without rows they stay bitwise."""
    weight = torch.where(num_rows > 0, rate, 0.0)
    number = num_rows.clamp_min(1e-12)
    row_mean, row_covariance = merge_moments(
        moments["row_mean"],
        moments["row_covariance"],
        sums["sum_rows"] / number,
        sums["sum_outer"] / number,
        weight,
    )
    input_mean, input_variance = merge_moments(
        moments["input_mean"],
        moments["input_variance"],
        sums["sum_inputs"] / number,
        sums["sum_input_squares"] / number,
        weight,
    )
    return dict(zip(MOMENT_TABLES, (input_mean, input_variance, row_mean, row_covariance), strict=True))


def merge_moments(
    mean: Float[Tensor, " P"],
    variance: Float[Tensor, "..."],
    shift: Float[Tensor, " P"],
    spread: Float[Tensor, "..."],
    rate: Float[Tensor, ""],
) -> tuple[Float[Tensor, " P"], Float[Tensor, "..."]]:
    """Returns the running mean and (co)variance after a batch of weight `rate`.

    mean' = mean + r s;  variance' = (1 - r) variance + r E[(x - mean)^2] - r^2 s^2, with s = E[x - mean]: no
    difference of large squares, exact for any rate.

    Args:
        mean: running mean.
        variance: running variance [P] or covariance [P, P].
        shift: batch mean of x - mean.
        spread: batch mean of (x - mean)^2, or of its outer product.
        rate: weight of the batch, 0 to 1.
    """
    square = shift * shift if variance.dim() == 1 else torch.outer(shift, shift)
    return mean + rate * shift, variance + rate * (spread - variance) - rate * rate * square
