"""A second set of state tensors, which becomes the state when a step is taken."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class CandidateTables:
    """Spare tensors shaped like a module's buffers: written by a step, swapped in when it is accepted.

    A swap moves no data, and a step that is dropped leaves the buffers bitwise as they were.
    """

    def __init__(self) -> None:
        self.tables: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.tables[name]

    def allocate(self, module: nn.Module, names: Iterable[str]) -> None:
        """Makes the spare tensors, once; their contents are undefined."""
        if not self.tables:
            self.tables = {name: torch.empty_like(getattr(module, name)) for name in names}

    def clear(self) -> None:
        """Gives the spare tensors back."""
        self.tables = {}

    def write(self, values: dict[str, Tensor]) -> None:
        """Copies values into the spare tensors of their names."""
        for name, value in values.items():
            self.tables[name].copy_(value)

    def swap(self, module: nn.Module) -> None:
        """Exchanges the module's buffers and the spare tensors."""
        for name, table in self.tables.items():
            self.tables[name] = getattr(module, name)
            setattr(module, name, table)
