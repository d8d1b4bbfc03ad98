"""Logits of many rows against all prototypes, a bounded number of them at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# 128 MiB in fp32. A ViT-L recipe has a thousand times as many in one step: 8,000 masked patches, 65,536 prototypes.
LOGITS_PER_CHUNK = 2**25


class ChunkedLogits:
    """Logits = rows @ columns.T in chunks of rows, fp32, without gradient; one may go through them several times.

    They are computed anew each time, unless all of them fit into one chunk, which is kept: nobody may write into it.
    The products follow the ambient autocast.

    Args:
        rows: [N, Q].
        columns: [K, Q].
        logits_per_chunk: numbers that exist at once; at least one row's.
    """

    def __init__(
        self,
        rows: Float[Tensor, "N Q"],
        columns: Float[Tensor, "K Q"],
        logits_per_chunk: int = LOGITS_PER_CHUNK,
    ) -> None:
        self.num_rows, self.num_prototypes, self.device = len(rows), len(columns), rows.device
        self._rows, self._columns = rows.detach(), columns.detach().to(rows.dtype)
        self._rows_per_chunk = max(1, logits_per_chunk // len(columns))
        self._only: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields (which rows, their logits [n, K])."""
        for first in range(0, max(1, self.num_rows), self._rows_per_chunk):
            chosen = slice(first, min(first + self._rows_per_chunk, self.num_rows))
            yield chosen, self._compute(chosen)

    @torch.no_grad()
    def _compute(self, chosen: slice) -> Tensor:
        if self._only is not None:
            return self._only
        logits = (self._rows[chosen] @ self._columns.T).float()
        if chosen == slice(0, self.num_rows):
            self._only = logits
        return logits
