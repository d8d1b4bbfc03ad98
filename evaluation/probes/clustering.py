"""Do groups found without labels agree with the classes: k-means, NMI, ARI, accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

_BLOCK = 8192


def cluster(
    features: Float[Tensor, "B D"], *, num_clusters: int, restarts: int, max_iterations: int, seed: int
) -> tuple[Float[Tensor, "K D"], Int64[Tensor, " B"], bool]:
    """Returns centres and assignments of k-means on L2-normalised features, and whether it had come to rest.

    k-means++ starts, Lloyd; of the starts the one of smallest inertia. Not collective; on the features' device, fp32.

    Raises:
        ValueError: more clusters than images.
    """
    if num_clusters > len(features):
        raise ValueError(
            f"clustering.num_clusters is {num_clusters}; expected at most {len(features)}, the images; "
            "set clustering.num_clusters"
        )
    points = normalize(features.float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor, Tensor, bool] | None = None
    for _ in range(restarts):
        centres = _plus_plus(points, num_clusters, generator)
        assignments, converged = torch.full((len(points),), -1), False
        for _ in range(max_iterations):
            distances, found = assign_to_nearest(points, centres)
            converged = torch.equal(found, assignments)
            if converged:
                break
            assignments = found
            counts = torch.bincount(found, minlength=num_clusters)
            sums = torch.zeros_like(centres).index_add_(0, found, points)
            # An empty cluster keeps its centre.
            centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
        inertia = float(distances.double().sum())
        if best is None or inertia < best[0]:
            best = (inertia, centres, assignments, converged)
    assert best is not None
    return best[1:]


def assign_to_nearest(
    points: Float[Tensor, "B D"], centres: Float[Tensor, "K D"]
) -> tuple[Float[Tensor, " B"], Int64[Tensor, " B"]]:
    """Returns squared distance to and index of the nearest centre of every point."""
    norms = centres.square().sum(dim=1)
    distances, found = [], []
    for block in points.split(_BLOCK):
        value, index = (norms - 2 * block @ centres.T).min(dim=1)
        distances.append((value + block.square().sum(dim=1)).clamp_min(0))
        found.append(index)
    return torch.cat(distances), torch.cat(found)


def agreement(assignments: Int64[Tensor, " B"], labels: Int64[Tensor, " B"]) -> dict[str, float]:
    """Returns NMI (arithmetic mean), ARI, and accuracy of clusters named by classes.

    `accuracy` names clusters one to one by the best matching (Hungarian algorithm), `purity` by each
    cluster's majority, which is what remains sensible with many more clusters than classes.
    """
    table = np.zeros((int(assignments.max()) + 1, int(labels.max()) + 1))
    np.add.at(table, (assignments.numpy(), labels.numpy()), 1)
    total = table.sum()
    rows, columns = match(-table)
    return {
        "nmi": _nmi(table),
        "ari": _ari(table),
        "accuracy": float(table[rows, columns].sum() / total),
        "purity": float(table.max(axis=1).sum() / total),
    }


def match(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and columns of the cheapest one-to-one matching (Hungarian algorithm with potentials, O(n^2 m)).

    Args:
        cost: [rows, columns]; the smaller side is matched whole.
    """
    if cost.shape[0] > cost.shape[1]:
        columns, rows = match(cost.T)
        return rows, columns
    num_rows, num_columns = cost.shape
    row_potential, column_potential = np.zeros(num_rows + 1), np.zeros(num_columns + 1)
    owner = np.zeros(num_columns + 1, dtype=int)  # which row, counted from 1, holds a column; 0 is free
    for row in range(1, num_rows + 1):
        owner[0], column = row, 0
        slack = np.full(num_columns + 1, np.inf)
        came_from = np.zeros(num_columns + 1, dtype=int)
        visited = np.zeros(num_columns + 1, dtype=bool)
        while owner[column] != 0:
            visited[column] = True
            current = owner[column]
            reduced = cost[current - 1] - row_potential[current] - column_potential[1:]
            better = ~visited[1:] & (reduced < slack[1:])
            slack[1:][better], came_from[1:][better] = reduced[better], column
            following = int(np.where(visited, np.inf, slack).argmin())
            step = slack[following]
            row_potential[owner[visited]] += step
            column_potential[visited] -= step
            slack[~visited] -= step
            column = following
        while column:
            previous = came_from[column]
            owner[column], column = owner[previous], previous
    columns = np.flatnonzero(owner[1:])
    return owner[1:][columns] - 1, columns


def _plus_plus(points: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    first = int(torch.randint(len(points), (1,), generator=generator))
    centres = points[first : first + 1]
    nearest = (points - centres).square().sum(dim=1)
    for _ in range(num_clusters - 1):
        threshold = torch.rand(1, generator=generator, dtype=torch.float64) * nearest.double().sum().cpu()
        index = int(
            torch.searchsorted(nearest.double().cumsum(0).cpu(), threshold).clamp_max(len(points) - 1)
        )
        chosen = points[index : index + 1]
        centres = torch.cat([centres, chosen])
        nearest = torch.minimum(nearest, (points - chosen).square().sum(dim=1))
    return centres


def _nmi(table: np.ndarray) -> float:
    joint = table / table.sum()
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    filled = joint > 0
    mutual = float((joint[filled] * np.log(joint[filled] / np.outer(rows, columns)[filled])).sum())
    entropies = _entropy(rows) + _entropy(columns)
    return 1.0 if entropies == 0 else max(0.0, 2 * mutual / entropies)


def _entropy(shares: np.ndarray) -> float:
    filled = shares[shares > 0]
    return float(-(filled * np.log(filled)).sum())


def _ari(table: np.ndarray) -> float:
    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    together, by_row, by_column = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    everything = pairs(table.sum(keepdims=True))
    expected = by_row * by_column / everything
    largest = (by_row + by_column) / 2
    return 1.0 if largest == expected else (together - expected) / (largest - expected)
