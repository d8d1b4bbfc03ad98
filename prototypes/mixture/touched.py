"""What a step touches: the statistics of some components, and the rows of the tables that it will write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import sparse

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

Components = slice | Tensor
"""Components: a range of them, or the indices of some, [k] int64."""


@dataclass
class StepStatistics:
    """The sufficient statistics of one step, of all components or of those that it touches.

    Attributes:
        components: which, ascending; all others have no mass.
        mass: [k] w of each.
        moments: [k, M] their moments, centred on the means.
        all_masses: [K] w of every component.
        sums: what is not indexed by components; see `statistics.FlatStatistics`.
    """

    components: Components
    mass: Tensor
    moments: Tensor
    all_masses: Tensor
    sums: dict[str, Tensor]

    @property
    def dropped_share(self) -> Float[Tensor, ""]:
        """The share of the mass that a sparse step leaves out, or that it would have left out."""
        return self.sums["dropped"] / self.sums["sum_weight"].clamp_min(1e-12)


def sum_touched(
    index: Int64[Tensor, "N m"] | None,
    responsibilities: Float[Tensor, "N m"],
    observed: Float[Tensor, "N M"],
    weight: Float[Tensor, " N"],
    num_components: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (components, mass, moments) of the components that have a responsibility, ascending; not centred.

    w_k = sum_i a_i gamma_ik and S_k = sum_i a_i gamma_ik s(h_i), a_i the rows' weights, every sum in the order of the
    rows: the same bits wherever it is computed. On a CPU exactly the components with an entry; on a GPU as many as
    there are places, the others without mass, so that no size is waited for. Where `index` is None the
    responsibilities are those of all components, and the sums a product.
    """
    table = torch.cat([observed, torch.ones_like(weight)[:, None]], dim=1) * weight[:, None]
    if index is None:
        products = table.T @ responsibilities
        touched = products[-1].nonzero().squeeze(1)
        sums = products.T[touched]
        return touched, sums[:, -1], sums[:, :-1]
    component, gamma = index.flatten(), responsibilities.flatten()
    place = torch.arange(len(component), device=component.device)
    is_exact = sparse.may_wait(component.device)
    if is_exact:
        place = gamma.nonzero().squeeze(1)
        component, gamma = component[place], gamma[place]
    component, order = component.sort(stable=True)
    if is_exact:
        touched = torch.unique_consecutive(component)
    else:
        presence = gamma.new_zeros(num_components).scatter_reduce_(0, component, gamma[order], "amax")
        touched = presence.topk(min(num_components, len(component))).indices.sort().values
    sums = nn.functional.embedding_bag(
        place[order] // index.shape[1],
        table,
        torch.searchsorted(component, touched),
        mode="sum",
        per_sample_weights=gamma[order],
    )
    return touched, sums[:, -1], sums[:, :-1]


class TouchedRows:
    """New rows of a module's tables, kept aside until the step is taken: dropping them leaves every bit.

    Attributes:
        components: [U] int64, distinct.
        rows: [U, ...] new rows by the names of their tables.
    """

    def __init__(self, module: nn.Module, names: tuple[str, ...], components: Tensor) -> None:
        self.components = components
        tables = {name: getattr(module, name) for name in names}
        self.rows = {
            name: table.new_empty(len(components), *table.shape[1:]) for name, table in tables.items()
        }

    def write(self, module: nn.Module) -> None:
        """Writes the rows into the tables."""
        for name, rows in self.rows.items():
            getattr(module, name).index_copy_(0, self.components, rows)
