"""What the tables of a mixture look like: figures for the record, taken before a revival repairs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from .exchange import PROBE_SUMS
from .revival import find_starved

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from .model import Mixture

STEP_SUMS = (*PROBE_SUMS, "dropped", "sum_weight")
_TRACED_COMPONENTS = 1024
_VANISHED_LENGTH = 1e-3


def traced(means: Float[Tensor, "K P"]) -> Float[Tensor, "k P"]:
    """Returns the means whose way since the start is measured: about a thousand, evenly by index."""
    return means[:: max(1, len(means) // _TRACED_COMPONENTS)]


def find_vanished(norms: Float[Tensor, " K"], mixture: Mixture) -> Bool[Tensor, " K"]:
    """Returns which means of these lengths have shrunk away: below a thousandth of the rows' root mean square length.

    Uniform forgetting lets the mean of an unvisited component go to zero. Length zero is no direction, and well
    before that the component is out of the rows' reach.
    """
    square = mixture.row_covariance.trace() + mixture.row_mean.square().sum()
    return ~(norms >= _VANISHED_LENGTH * square.sqrt())


def describe_step(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns `gmm/...` figures of one step's `STEP_SUMS`; waits for the device."""
    last = {name: float(value) for name, value in sums.items()}
    probed = max(last["num_probed"], 1.0)
    return {
        "gmm/bad_rows": last["num_bad"],
        "gmm/dropped_mass": last["dropped"] / max(last["sum_weight"], 1.0e-12),
        "gmm/log_likelihood": last["log_likelihood"] / probed,
        "gmm/responsibility_perplexity": float(torch.tensor(last["log_perplexity"] / probed).exp()),
    }


def describe_tables(mixture: Mixture, start: Float[Tensor, "k P"]) -> dict[str, Tensor]:
    """Returns `gmm/...` figures of the tables, scalars on the device.

    Args:
        mixture: after `accept`, before a revival.
        start: the traced means as they were at the start.
    """
    moved = 1 - nn.functional.cosine_similarity(start, traced(mixture.means), dim=1)
    vanished = find_vanished(torch.linalg.vector_norm(mixture.means, dim=1), mixture)
    return {
        "gmm/starved": find_starved(mixture.usage).float().mean(),
        "gmm/displacement": moved.mean(),
        "gmm/count_min": mixture.counts.min(),
        "gmm/count_median": mixture.counts.median(),
        "gmm/zero_norm": vanished.float().mean(),
    }
