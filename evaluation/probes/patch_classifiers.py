"""Classifiers of patches: standardised tokens, and the vote of the nearest training patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from evaluation.features.processes import Processes
from evaluation.probes.knn import nearest

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

# Images whose tokens are summed up at once, and most similarities in memory at once (1 GiB).
_CHUNK, _MOST_SIMILARITIES = 64, 2**28
_QUERY_BLOCK = 1024


@dataclass(frozen=True)
class Scaler:
    """Mean 0 and variance 1 of every dimension on the images that it was fitted on (scikit-learn's StandardScaler)."""

    mean: Float[Tensor, " D"]
    std: Float[Tensor, " D"]

    @classmethod
    def fit(cls, tokens: Float[Tensor, "B N D"]) -> Scaler:
        """Returns the scaler of all patches, void ones too; a dimension that does not vary is divided by 1."""
        count = tokens.shape[0] * tokens.shape[1]
        mean = sum(part.double().sum(dim=(0, 1)) for part in tokens.split(_CHUNK)) / count
        assert isinstance(mean, Tensor)
        square = sum((part.double() - mean).square().sum(dim=(0, 1)) for part in tokens.split(_CHUNK))
        assert isinstance(square, Tensor)
        std = (square / count).sqrt()
        return cls(mean.float(), torch.where(std > 0, std, 1.0).float())

    def rows(self, tokens: Float[Tensor, "... D"]) -> Float[Tensor, "R D"]:
        """Returns standardised tokens in fp32, one a row."""
        return (tokens.flatten(0, -2).float() - self.mean) / self.std


def classify_patches(
    bank: Float[Tensor, "M D"],
    bank_labels: Int64[Tensor, " M"],
    queries: Float[Tensor, "R D"],
    *,
    ks: Sequence[int],
    distance: str,
    num_classes: int,
    processes: Processes,
) -> dict[int, Int64[Tensor, " R"]]:
    """Returns the majority of the k nearest bank patches for every query and every k. Collective.

    One vote each; classes of equal vote win by class index, neighbours of equal distance by bank index. Exact, fp32.

    Args:
        bank: training patches.
        bank_labels: their classes.
        queries: patches to classify.
        ks: numbers of neighbours, none above M.
        distance: `cosine` or `L2`.
        num_classes: C.
        processes: blocks of queries are dealt to them, predictions are gathered.
    """
    device = processes.device
    keys, labels = _as_keys(bank, distance).to(device), bank_labels.to(device)
    size = max(1, min(_QUERY_BLOCK, _MOST_SIMILARITIES // len(bank)))
    own: dict[int, dict[int, Tensor]] = {}
    blocks = queries.split(size)
    for number in processes.mine(len(blocks)):
        _, indices = nearest(_as_queries(blocks[number], distance).to(device), keys, max(ks))
        own[number] = {k: _majority(labels[indices[:, :k]], num_classes).cpu() for k in ks}
    everyone = {number: found for part in processes.gather(own) for number, found in part.items()}
    return {k: torch.cat([everyone[number][k] for number in sorted(everyone)]) for k in ks}


def _majority(labels: Int64[Tensor, "R k"], num_classes: int) -> Int64[Tensor, " R"]:
    votes = torch.zeros(len(labels), num_classes, device=labels.device, dtype=torch.int32)
    return votes.scatter_add_(1, labels, torch.ones_like(labels, dtype=torch.int32)).argmax(dim=1)


def _as_keys(rows: Float[Tensor, "M D"], distance: str) -> Tensor:
    """Returns keys whose dot product with `_as_queries` is larger the nearer: -|q - k|^2 / 2 + |q|^2 / 2 for L2."""
    if distance == "cosine":
        return normalize(rows, dim=1)
    return torch.cat([rows, -0.5 * rows.square().sum(dim=1, keepdim=True)], dim=1)


def _as_queries(rows: Float[Tensor, "R D"], distance: str) -> Tensor:
    if distance == "cosine":
        return normalize(rows, dim=1)
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
