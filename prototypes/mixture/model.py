"""A mixture with K components: its tables, its density and its responsibilities.

A component's log joint density is an inner product, log rho_ik = f(h_i) . theta_k + b_k + log pi_k, so one
GEMM is the E-step and one GEMM gamma^T f(H) the sufficient statistics. A family (`families/`)
says what f, theta and b are and how the statistics move its parameters; `online_em.py` says when.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import PrototypesConfig
from ..estimator import EstimatorContext, LogitKind, PrototypeEstimator, Role
from ..random_numbers import draw_unit_vectors
from ..statistics import Collectives, full_precision
from . import moments
from .annealing import Annealing
from .assignments import normalise_responsibilities_
from .forgetting import derive_memory
from .touched import Components, StepStatistics

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

# A chunk's tables stay in a core's cache on the CPU; a GPU wants few, large kernels instead.
_COMPONENTS_PER_CHUNK = {"cpu": 512}
_COMPONENTS_PER_CHUNK_ON_GPU = 16384
_ROWS_AT_ONCE = 64
_SMALLEST_VARIANCE = 1e-12


class Mixture(PrototypeEstimator):
    """The model: tables, density, responsibilities.

    Tables, fp32, identical on all ranks: `means` [K, P] and the family's own, `counts` n_k (they saturate at
    the memory M), `mixing_weights` pi_k (tracked on their own), `usage` (running share of responsibility),
    and the running moments of the inputs and of the rows.

    Rows and means are shifted by a reference vector near the rows' mean. With sparse steps it is a copy of the running
    mean, taken every step at first and every `moments.REFERENCE_STEPS` later, and a part of the state: in between, the
    natural parameters of a component that no row touches stay as they are. Any vector gives the same mixture.

    Attributes:
        table_names: everything that a step writes.
        row_tables: those of them of which a step writes the rows of the components it touches, [K, ...].
        is_sparse: whether steps may leave out negligible responsibilities.
    """

    has_components = True
    table_names: tuple[str, ...]
    row_tables: tuple[str, ...] = ("means",)
    means: Tensor
    counts: Tensor
    mixing_weights: Tensor
    usage: Tensor
    input_mean: Tensor
    input_variance: Tensor
    row_mean: Tensor
    row_covariance: Tensor
    is_initialised: bool
    reference_vector: Tensor

    def __init__(self, config: PrototypesConfig, context: EstimatorContext) -> None:
        super().__init__(config, context)
        self.gmm = config.gmm
        self.memory = derive_memory(self.gmm.memory, context.num_observations_per_epoch, self.num_prototypes)
        self.annealing = Annealing(self.gmm.beta, context.total_steps)
        tables = self.initial_tables()
        self.table_names = tuple(tables)
        for name, tensor in tables.items():
            self.register_buffer(name, tensor)
        self.is_sparse = self.gmm.sparse.threshold > 0 and self.gmm.forgetting != "uniform"
        self.register_buffer("reference_vector", self.row_mean.clone())
        self._has_reference = False

    # ---------------------------------------------------------------- what a family defines

    @abstractmethod
    def row_features(self, rows: Float[Tensor, "N P"]) -> Float[Tensor, "N F"]:
        """Returns f(h), whose inner product with theta_k is the log density of component k."""

    def row_statistics(self, rows: Float[Tensor, "N P"]) -> Float[Tensor, "N M"]:
        """Returns what the sufficient statistics sum over rows; the rows themselves unless a family adds to them."""
        return rows

    @abstractmethod
    def natural_parameters(self, chunk: Components) -> tuple[Float[Tensor, "k F"], Float[Tensor, " k"]]:
        """Returns (theta, b) of components, without the mixing weights; a function of the state."""

    @abstractmethod
    def centre_statistics_(
        self, chunk: Components, mass: Float[Tensor, " k"], statistics: Float[Tensor, "k M"]
    ) -> None:
        """Moves the statistics of components from the reference to the current means, in place."""

    @abstractmethod
    def m_step(
        self,
        chunk: Components,
        rate: Float[Tensor, " k"],
        mass: Float[Tensor, " k"],
        statistics: Float[Tensor, "k M"],
        out: dict[str, Tensor],
    ) -> None:
        """Writes new rows of `row_tables` to `out`, from centred statistics; where the rate is 0 the old ones."""

    @property
    @abstractmethod
    def num_statistics(self) -> int:
        """Columns M of the sufficient statistics."""

    def family_tables(self) -> dict[str, Tensor]:
        """Returns the family's own tables at construction, fp32."""
        return {}

    def reset_components(self) -> None:
        """Sets the family's parameters once the rows' moments are known."""

    def finish_m_step(self, statistics: StepStatistics, out: dict[str, Tensor]) -> None:
        """Writes what all components share, after `m_step` has written `out` of all that have mass."""
        del statistics, out

    @property
    def moves_together(self) -> bool:
        """Whether every step changes the natural parameters of all components, beyond the reference."""
        return False

    @property
    def row_variance(self) -> Float[Tensor, " P"]:
        """Variance of the rows per dimension, never zero: identical rows must not divide by it."""
        return self.row_covariance.diagonal().clamp_min(_SMALLEST_VARIANCE)

    def component_variances(self) -> Float[Tensor, "K P"]:
        """Returns a variance of every component; the rows' own where the family tracks none."""
        return self.row_variance.expand(self.num_prototypes, self.dim)

    def restart_components_(self, index: Int64[Tensor, " R"]) -> None:
        """Forgets what components have seen, in place: n = 1, an even share of mixing weight and usage."""
        self.counts[index] = 1.0
        self.usage[index] = 1.0 / self.num_prototypes
        self.mixing_weights[index] = 1.0 / self.num_prototypes
        self.mixing_weights /= self.mixing_weights.sum()
        self.usage /= self.usage.sum()

    def split_components_(
        self, children: Int64[Tensor, " R"], parents: Int64[Tensor, " R"], offset: Float[Tensor, "R P"]
    ) -> None:
        """Moves children beside their parents and shares what the parents have seen between the two, in place.

        A child as wide as all rows beside a narrow parent would get no responsibility: a family copies the
        parent's spread too.
        """
        self.means[children] = self.means[parents] + offset
        self.means[parents] -= offset
        for shared in (self.counts, self.mixing_weights, self.usage):
            half = 0.5 * shared[parents]
            shared[children], shared[parents] = half, half
        self.mixing_weights /= self.mixing_weights.sum()
        self.usage /= self.usage.sum()

    def reference(self) -> Float[Tensor, " P"]:
        """Returns the vector that rows and means are shifted by; equal on all ranks."""
        return self.reference_vector if self.keeps_reference else self.row_mean

    @property
    def keeps_reference(self) -> bool:
        """Whether the reference is a copy of the running mean, and not the running mean itself."""
        return self.is_sparse and self._has_reference

    def move_reference(self) -> None:
        """Sets the reference to the running mean."""
        self.reference_vector.copy_(self.row_mean)
        self._has_reference = True

    def log_mixing_weights(self, chunk: slice) -> Float[Tensor, " k"]:
        """Returns log pi of a range of components."""
        return self.mixing_weights[chunk].log()

    def assign_(
        self,
        log_joint: Float[Tensor, "N K"],
        penalty: Float[Tensor, " K"] | None,
        across: Collectives | None,
    ) -> Float[Tensor, "N K"]:
        """Turns log joint densities into responsibilities, in place."""
        return normalise_responsibilities_(log_joint, self.annealing.beta, penalty, across)

    # ---------------------------------------------------------------- density

    @torch.no_grad()
    def log_likelihood(self, projections: Float[Tensor, "N P"]) -> Float[Tensor, " N"]:
        """Returns log p(h) of each row under the state, in nats; changes nothing."""
        with full_precision(self.means.device):
            features = self._features(projections)
            parts = [torch.logsumexp(self._log_joint(part), dim=1) for part in features.split(_ROWS_AT_ONCE)]
            return torch.cat(parts)

    @torch.no_grad()
    def responsibilities(self, projections: Float[Tensor, "N P"]) -> Float[Tensor, "N K"]:
        """Returns gamma of each row under the state at the current beta; changes nothing."""
        with full_precision(self.means.device):
            log_joint = self._log_joint(self._features(projections))
            return self.assign_(log_joint, self._balance_penalty(), None)

    def preprocess(self, inputs: Float[Tensor, "N P"]) -> Float[Tensor, "N P"]:
        """Returns the rows that the mixture models, from projections."""
        return moments.preprocess(inputs, self.gmm, self.input_mean, self.input_variance)

    @torch.no_grad()
    def describe_drift(
        self, before: Float[Tensor, "N P"], after: Float[Tensor, "N P"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Returns `gmm/drift_per_revisit` and `gmm/spacing`, scalars on the device; nothing before the start.

        Both in the space of the mixture's rows, medians over the images: |h' - h|, and the distance from the mean
        nearest to h' to the mean nearest to that one. A component that sees a row again only after the row has moved
        farther than that finds it won by another one, whatever the M-step does.
        """
        if not self.is_initialised:
            return {}
        rows = self.preprocess(after.float())
        drift = torch.linalg.vector_norm(rows - self.preprocess(before.float()), dim=1)
        winners = self.means[torch.cdist(rows, self.means).argmin(dim=1)]
        spacing = torch.cdist(winners, self.means).topk(2, dim=1, largest=False).values[:, 1]
        return {"gmm/drift_per_revisit": drift.median(), "gmm/spacing": spacing.median()}

    def logit_operands(
        self,
        projections: Float[Tensor, "*batch P"],
        role: Role,
        learned: Float[Tensor, "K P"] | None = None,
        kind: LogitKind = "dot",
    ) -> tuple[Float[Tensor, "*batch Q"], Float[Tensor, "K Q"]]:
        """Returns rows and columns of the logits; see the base class.

        Where the inputs are centred or standardised the means live in that space, so projections are moved
        there too, without the unit length: otherwise every logit carries a bias that is the same for all
        images. "posterior" is beta log rho: rows [f(h), 1], columns beta [theta, b + log pi].
        """
        if kind == "posterior":
            return self._posterior_operands(projections)
        if self.gmm.center or self.gmm.standardise:
            projections = moments.recentre(projections, self.gmm, self.input_mean, self.input_variance)
        return super().logit_operands(projections, role, learned, kind)

    def _posterior_operands(
        self, projections: Float[Tensor, "*batch P"]
    ) -> tuple[Float[Tensor, "*batch Q"], Float[Tensor, "K Q"]]:
        features = self._features(projections.flatten(0, -2))
        features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        everything = slice(0, self.num_prototypes)
        with torch.no_grad(), full_precision(self.means.device):
            theta, bias = self.natural_parameters(everything)
            bias = bias + self.log_mixing_weights(everything)
            columns = torch.cat([theta, bias[:, None]], dim=1).mul_(self.annealing.beta)
        return features.view(*projections.shape[:-1], -1), columns

    def _features(self, projections: Float[Tensor, "N P"]) -> Float[Tensor, "N F"]:
        return self.row_features(self.preprocess(projections) - self.reference())

    def _log_joint(
        self,
        features: Float[Tensor, "N F"],
        own: slice | None = None,
        out: Float[Tensor, "N k"] | None = None,
    ) -> Float[Tensor, "N k"]:
        """Returns log rho_ik = f(h_i) . theta_k + b_k + log pi_k; theta exists for one chunk at a time.

        Args:
            features: f of the shifted rows.
            own: range of components; None is all.
            out: written to where given.
        """
        own = slice(0, self.num_prototypes) if own is None else own
        if out is None:
            out = features.new_empty(len(features), own.stop - own.start)
        for chunk in iterate_chunks(own, self.means.device):
            theta, bias = self.natural_parameters(chunk)
            columns = out[:, chunk.start - own.start : chunk.stop - own.start]
            torch.addmm(bias + self.log_mixing_weights(chunk), features, theta.T, out=columns)
        return out

    def _balance_penalty(self) -> Float[Tensor, " K"] | None:
        """Returns balance * log(K usage), which the tempered logits lose; None where it is off."""
        if self.gmm.balance == 0:
            return None
        return self.gmm.balance * (self.usage * self.num_prototypes).clamp_min(1e-6).log()

    def initial_tables(self) -> dict[str, Tensor]:
        """Returns every table at construction: a pure function of the configuration and the seed."""
        num = self.num_prototypes
        return {
            "means": draw_unit_vectors(num, self.dim, self.context.seed),
            "counts": torch.ones(num),
            "mixing_weights": torch.full((num,), 1.0 / num),
            "usage": torch.full((num,), 1.0 / num),
            **moments.initial_moments(self.dim),
            **self.family_tables(),
        }

    def set_extra_state(self, state: Any) -> None:
        """Restores what the base class does; a reference there is after the first step."""
        super().set_extra_state(state)
        self._has_reference = self.step > 0

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads a state; one from before the reference was kept gets its running mean."""
        if "reference_vector" not in state_dict and "row_mean" in state_dict:
            state_dict = {**state_dict, "reference_vector": state_dict["row_mean"].clone()}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _moments(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in moments.MOMENT_TABLES}


def iterate_chunks(components: slice, device: torch.device) -> Iterator[slice]:
    """Yields ranges of components whose tables are worked on together."""
    size = _COMPONENTS_PER_CHUNK.get(device.type, _COMPONENTS_PER_CHUNK_ON_GPU)
    for start in range(components.start, components.stop, size):
        yield slice(start, min(start + size, components.stop))
