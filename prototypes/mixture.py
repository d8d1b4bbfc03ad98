"""Online EM of a mixture: everything that does not depend on the family of its components.

A component's log joint density is an inner product, log rho_ik = f(h_i) . theta_k + b_k, so one GEMM is the
E-step and one GEMM gamma^T f(H) the sufficient statistics. A family (`gmm.py`, `vmf.py`, ...) says what f,
theta and b are and how the statistics move its parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prototypes.annealing import CRITICAL_REFRESH_STEPS, Annealing, compute_critical_beta
from prototypes.assignments import normalise_responsibilities_, probe_assignments
from prototypes.config import PrototypesConfig
from prototypes.diagnostics import greedy_leaders
from prototypes.estimator import LogitKind, Observation, PrototypeEstimator, Role
from prototypes.forgetting import derive_memory, forget
from prototypes.learned import draw_unit_vectors
from prototypes.statistics import (
    Collectives,
    FlatStatistics,
    drop_non_finite,
    full_precision,
    merge_moments,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

_MOMENTS_RATE = 0.01
_USAGE_RATE = 0.01
_COMPONENTS_PER_CHUNK = 2048
_LOGITS_BYTES = 256 * 2**20
_PROBED_ROWS = 64
_TRACED_COMPONENTS = 1024
_STARVED_SHARE = 0.05


class OnlineMixture(PrototypeEstimator):
    """Skeleton of the online mixtures of the mode `full`.

    State, fp32, identical on all ranks: `means` [K, P] and the family's own tables, `counts` n_k (they
    saturate at the memory M), `mixing_weights` pi_k (tracked on their own), `usage` (running share of
    responsibility), and the running moments of the inputs and of the rows. A second set of the same tensors
    holds the candidate; `accept` swaps the two, `discard` leaves them.
    """

    num_moments: int

    def __init__(
        self,
        config: PrototypesConfig,
        *,
        seed: int,
        num_observations_per_epoch: int,
        total_steps: int,
        collectives: Collectives,
    ) -> None:
        super().__init__(config)
        self.gmm = config.gmm
        self.collectives = collectives
        self.num_observations_per_epoch = num_observations_per_epoch
        self.memory = derive_memory(self.gmm.memory, num_observations_per_epoch, self.num_prototypes)
        self.annealing = Annealing(self.gmm.beta, total_steps)
        self.collect_from_step = (
            int(self.gmm.init.warmup_fraction * total_steps) if self.gmm.init.method == "data_spread" else 0
        )
        self.is_initialised = False
        self.num_collected = self.num_placed = 0
        self._build_tables(seed)
        self._candidate: dict[str, Tensor] = {}
        self._candidate_scalars: dict[str, Any] = {}
        self._held: list[tuple[Tensor, Tensor]] = []
        self._num_bad = 0
        self._statistics: FlatStatistics | None = None
        self._logits: Tensor | None = None
        self._published: Tensor | None = None
        self._is_published = False
        self._last: dict[str, Tensor] = {}

    # ---------------------------------------------------------------- what a family defines

    @abstractmethod
    def row_features(self, rows: Float[Tensor, "N P"]) -> Float[Tensor, "N F"]:
        """Returns f(h), whose inner product with theta_k is the log density of component k."""

    @abstractmethod
    def natural_parameters(self, chunk: slice) -> tuple[Float[Tensor, "k F"], Float[Tensor, " k"]]:
        """Returns (theta, log normaliser) of a range of components, without the mixing weights."""

    @abstractmethod
    def m_step(
        self,
        chunk: slice,
        rate: Float[Tensor, " k"],
        mass: Float[Tensor, " k"],
        moments: Float[Tensor, "k F"],
    ) -> None:
        """Writes the candidate's parameters of a range of components, from centred statistics."""

    def reset_components(self) -> None:
        """Sets the family's parameters once the rows' moments are known."""

    def centre_statistics_(
        self, chunk: slice, mass: Float[Tensor, " k"], moments: Float[Tensor, "k F"]
    ) -> None:
        """Moves the statistics of a range of components from the reference vector to the current means."""

    # ---------------------------------------------------------------- one step

    @torch.no_grad()
    def observe(
        self,
        projections: Float[Tensor, "N P"],
        weight: Float[Tensor, " N"] | None = None,
        group: Int64[Tensor, " N"] | None = None,
        is_last: bool = True,
    ) -> Observation:
        """Keeps the rows; on the last micro-batch runs the E-step and starts the reduction. Collective.

        Rows of all micro-batches go through one E-step with the state of the previous step, so that A
        micro-batches of B rows are one batch of A B rows. `group` does not enter a mixture's responsibilities.
        """
        del group
        rows, kept_weight, num_bad = drop_non_finite(projections.detach().float(), weight)
        self._held.append((rows, rows.new_ones(len(rows)) if kept_weight is None else kept_weight.float()))
        self._num_bad += num_bad
        if not is_last:
            return Observation()
        with full_precision(self.means.device):
            return self._observe_all()

    @torch.no_grad()
    def commit(self, observation: Observation) -> None:
        """Waits for the statistics, writes the M-step into the candidate, publishes its prototypes."""
        if observation.handle is None or self._statistics is None:
            raise ValueError("the observation is not the last one of its step; observe with is_last=True")
        with full_precision(self.means.device):
            reduced = observation.handle.wait()
            if reduced.data_ptr() != self._statistics.flat.data_ptr():
                self._statistics.flat.copy_(reduced)
            self._prepare_candidate()
            self._update_moments()
            self._update_components()
            if observation.rows is not None:
                self._place_rows(observation.rows)
            self._publish(self._candidate["means"])
        self._last = {
            name: view.clone() for name, view in self._statistics.views.items() if name.startswith("sum_")
        }

    def accept(self) -> None:
        """Swaps candidate and state, and advances beta."""
        for name, tensor in self._candidate.items():
            self._candidate[name] = getattr(self, name)
            setattr(self, name, tensor)
        for name, value in self._candidate_scalars.items():
            setattr(self, name, value)
        self._forget_observations()
        self.step += 1
        if self.step % CRITICAL_REFRESH_STEPS == 0 and self.is_initialised:
            self.annealing.beta_critical = compute_critical_beta(self.row_covariance)
        self.annealing.advance(self.step, self._perplexity_for_schedule())

    def discard(self) -> None:
        """Leaves the state; the published prototypes are the state's again."""
        self._drop_candidate()

    def prototypes(self, role: Role, learned: Float[Tensor, "K P"] | None = None) -> Float[Tensor, "K P"]:
        """Returns the unit means, one tensor shared by student and teacher, without gradient.

        After `commit` those of the candidate, C^t; before, those of the state.
        """
        del role, learned
        if not self._is_published:
            self._publish(self.means)
        assert self._published is not None
        return self._published

    def logit_operands(
        self,
        projections: Float[Tensor, "... P"],
        role: Role,
        learned: Float[Tensor, "K P"] | None = None,
        kind: LogitKind = "dot",
        temperature: float = 1.0,
    ) -> tuple[Float[Tensor, "... Q"], Float[Tensor, "K Q"]]:
        """Returns rows and columns of the logits; see the base class.

        Where the inputs are centred or standardised the means live in that space, so projections are moved
        there too, without the unit length: otherwise every logit carries a bias that is the same for all
        images. "posterior" is beta log rho: rows [f(h), 1], columns beta [theta, b].
        """
        if kind == "posterior":
            rows = self._preprocess(projections.float().flatten(0, -2)) - self.row_mean
            features = self.row_features(rows)
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
            with torch.no_grad(), full_precision(self.means.device):
                theta, bias = self.natural_parameters(slice(0, self.num_prototypes))
                columns = torch.cat([theta, (bias + self.mixing_weights.log())[:, None]], dim=1)
            return features.view(*projections.shape[:-1], -1), columns * self.annealing.beta
        if self.gmm.center or self.gmm.standardise:
            projections = self._recentre(projections)
        return super().logit_operands(projections, role, learned, kind, temperature)

    @torch.no_grad()
    def log_likelihood(self, projections: Float[Tensor, "N P"]) -> Float[Tensor, " N"]:
        """Returns log p(h) of each row under the state, in nats; changes nothing."""
        with full_precision(self.means.device):
            features = self.row_features(self._preprocess(projections.float()) - self._reference())
            return torch.cat(
                [torch.logsumexp(self._log_joint(part), dim=1) for part in features.split(_PROBED_ROWS)]
            )

    @torch.no_grad()
    def responsibilities(self, projections: Float[Tensor, "N P"]) -> Float[Tensor, "N K"]:
        """Returns gamma of each row under the state at the current beta; changes nothing."""
        with full_precision(self.means.device):
            features = self.row_features(self._preprocess(projections.float()) - self._reference())
            return normalise_responsibilities_(
                self._log_joint(features), self.annealing.beta, self._balance_penalty()
            )

    # ---------------------------------------------------------------- state and metrics

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the base class's entries and the scalars of the schedule and the initialisation."""
        return {
            **super().get_extra_state(),
            **self.annealing.state(),
            "is_initialised": self.is_initialised,
            "num_collected": self.num_collected,
            "num_placed": self.num_placed,
        }

    def set_extra_state(self, state: Any) -> None:
        """Restores what `get_extra_state` returned."""
        super().set_extra_state(state)
        self.annealing.load(state)
        self.is_initialised = bool(state["is_initialised"])
        self.num_collected, self.num_placed = int(state["num_collected"]), int(state["num_placed"])

    def metrics(self) -> dict[str, float]:
        """Returns `gmm/...` of the last committed step; waits for the device."""
        values = {"gmm/beta": self.annealing.beta, "gmm/beta_critical": self.annealing.beta_critical}
        if not self._last:
            return values
        num_rows, num_bad, num_probed, log_likelihood, log_perplexity = self._last["sum_scalars"].tolist()
        probed = max(num_probed, 1.0)
        usage = self.usage * self.num_prototypes
        traced = nn.functional.cosine_similarity(self.traced_means, self._traced(self.means), dim=1)
        return {
            **values,
            "gmm/rows": num_rows,
            "gmm/bad_rows": num_bad,
            "gmm/log_likelihood": log_likelihood / probed,
            "gmm/responsibility_perplexity": float(torch.tensor(log_perplexity / probed).exp()),
            "gmm/starved": float((usage < _STARVED_SHARE).float().mean()),
            "gmm/displacement": float(1 - traced.mean()),
            "gmm/count_median": float(self.counts.median()),
        }

    # ---------------------------------------------------------------- construction

    def _build_tables(self, seed: int) -> None:
        num, dim = self.num_prototypes, self.dim
        tables = {
            "means": draw_unit_vectors(num, dim, seed),
            "counts": torch.ones(num),
            "mixing_weights": torch.full((num,), 1.0 / num),
            "usage": torch.full((num,), 1.0 / num),
            "input_mean": torch.zeros(dim),
            "input_variance": torch.ones(dim),
            "row_mean": torch.zeros(dim),
            "row_covariance": torch.eye(dim),
            **self.family_tables(),
        }
        self.table_names = tuple(tables)
        for name, tensor in tables.items():
            self.register_buffer(name, tensor)
        self.register_buffer("traced_means", self._traced(tables["means"]).clone())
        self.means: Tensor
        self.counts: Tensor
        self.mixing_weights: Tensor
        self.usage: Tensor
        self.input_mean: Tensor
        self.input_variance: Tensor
        self.row_mean: Tensor
        self.row_covariance: Tensor
        self.traced_means: Tensor

    def family_tables(self) -> dict[str, Tensor]:
        """Returns the family's own tables at construction, fp32, first axis K."""
        return {}

    def _traced(self, means: Float[Tensor, "K P"]) -> Float[Tensor, "k P"]:
        return means[:: max(1, self.num_prototypes // _TRACED_COMPONENTS)]

    def _buffers_for(self, num_rows: int) -> FlatStatistics:
        """Returns the statistics' buffer, allocated once, and makes room for the logits."""
        rows_per_chunk = max(1, min(num_rows, _LOGITS_BYTES // (4 * self.num_prototypes)))
        if self._logits is None or len(self._logits) < rows_per_chunk:
            self._logits = torch.empty(rows_per_chunk, self.num_prototypes, device=self.means.device)
        if self._statistics is None:
            shapes = {
                "mass": (self.num_prototypes,),
                "moments": (self.num_prototypes, self.num_moments),
                "sum_scalars": (5,),
                "sum_rows": (self.dim,),
                "sum_outer": (self.dim, self.dim),
                "sum_inputs": (self.dim,),
                "sum_input_squares": (self.dim,),
            }
            self._statistics = FlatStatistics(shapes, self.means.device)
        return self._statistics

    # ---------------------------------------------------------------- observing

    def _observe_all(self) -> Observation:
        inputs = torch.cat([rows for rows, _ in self._held])
        weight = torch.cat([weights for _, weights in self._held])
        if not self.is_initialised:
            self._initialise_moments(inputs, weight)
        rows = self._preprocess(inputs)
        statistics = self._buffers_for(len(rows))
        is_collecting = self._is_collecting()
        if is_collecting:
            statistics.flat.zero_()
        else:
            self._accumulate(rows, weight, statistics)
        self._accumulate_moments(inputs, rows, weight, statistics)
        gathered = self.collectives.gather_rows(rows) if is_collecting else None
        return Observation(self.collectives.start_sum(statistics.flat), gathered)

    def _initialise_moments(self, inputs: Float[Tensor, "N P"], weight: Float[Tensor, " N"]) -> None:
        """Sets the running moments from the first global batch: the first E-step needs them."""
        if self.gmm.center or self.gmm.standardise:
            self.input_mean, covariance = self._global_moments(inputs, weight)
            self.input_variance = covariance.diagonal().clone()
        self.row_mean, self.row_covariance = self._global_moments(self._preprocess(inputs), weight)
        self.reset_components()
        self.annealing.begin(compute_critical_beta(self.row_covariance))

    def _global_moments(
        self, rows: Float[Tensor, "N P"], weight: Float[Tensor, " N"]
    ) -> tuple[Float[Tensor, " P"], Float[Tensor, "P P"]]:
        """Returns mean and covariance of all ranks' rows, in two reductions, without cancellation."""
        total = torch.cat([(weight[:, None] * rows).sum(0), weight.sum()[None]])
        total = self.collectives.start_sum(total).wait()
        number = total[-1].clamp_min(1.0)
        mean = total[:-1] / number
        centred = rows - mean
        outer = self.collectives.start_sum(centred.T @ (weight[:, None] * centred)).wait()
        return mean, outer / number

    def _recentre(self, projections: Float[Tensor, "... P"]) -> Float[Tensor, "... P"]:
        projections = projections.float() - self.input_mean
        return projections * self._inverse_scale() if self.gmm.standardise else projections

    def _inverse_scale(self) -> Float[Tensor, " P"]:
        return self.input_variance.clamp_min(1e-12).rsqrt()

    def _preprocess(self, inputs: Float[Tensor, "N P"]) -> Float[Tensor, "N P"]:
        """Returns the rows that the mixture models: centred, standardised, at unit length, as configured."""
        rows = inputs
        if self.gmm.center or self.gmm.standardise:
            rows = self._recentre(rows)
        return nn.functional.normalize(rows, dim=1) if self.gmm.input == "l2" else rows

    def _reference(self) -> Float[Tensor, " P"]:
        """Returns the vector m that rows and means are shifted by; equal on all ranks."""
        return self.row_mean

    def _accumulate(
        self, rows: Float[Tensor, "N P"], weight: Float[Tensor, " N"], statistics: FlatStatistics
    ) -> None:
        """E-step and sufficient statistics w_k = sum gamma_ik, S_k = sum gamma_ik f(h_i - m), centred."""
        assert self._logits is not None
        mass, moments = statistics["mass"], statistics["moments"]
        features = self.row_features(rows - self._reference())
        penalty = self._balance_penalty()
        statistics["sum_scalars"].zero_()
        mass.zero_()
        if len(rows) == 0:
            moments.zero_()
        start = 0
        for part, part_weight in zip(
            features.split(len(self._logits)), weight.split(len(self._logits)), strict=True
        ):
            if len(part) == 0:
                break
            log_joint = self._log_joint(part, out=self._logits[: len(part)])
            if start == 0:
                self._probe(log_joint, statistics)
            gamma = normalise_responsibilities_(log_joint, self.annealing.beta, penalty)
            gamma.mul_(part_weight[:, None])
            mass += gamma.sum(0)
            torch.addmm(moments, gamma.T, part, beta=0 if start == 0 else 1, out=moments)
            start += len(part)
        for chunk in self._chunks():
            self.centre_statistics_(chunk, mass[chunk], moments[chunk])

    def _log_joint(
        self, features: Float[Tensor, "N F"], out: Float[Tensor, "N K"] | None = None
    ) -> Float[Tensor, "N K"]:
        """Returns log rho_ik = f(h_i) . theta_k + b_k + log pi_k; theta exists for one chunk at a time."""
        if out is None:
            out = features.new_empty(len(features), self.num_prototypes)
        for chunk in self._chunks():
            theta, bias = self.natural_parameters(chunk)
            bias = bias + self.mixing_weights[chunk].log()
            torch.addmm(bias, features, theta.T, out=out[:, chunk])
        return out

    def _chunks(self) -> Iterator[slice]:
        for start in range(0, self.num_prototypes, _COMPONENTS_PER_CHUNK):
            yield slice(start, min(start + _COMPONENTS_PER_CHUNK, self.num_prototypes))

    def _balance_penalty(self) -> Float[Tensor, " K"] | None:
        if self.gmm.balance == 0:
            return None
        return self.gmm.balance * (self.usage * self.num_prototypes).clamp_min(1e-6).log()

    def _probe(self, log_joint: Float[Tensor, "N K"], statistics: FlatStatistics) -> None:
        probed = log_joint[:_PROBED_ROWS]
        sums = probe_assignments(probed, self.annealing.beta)
        scalars = statistics["sum_scalars"]
        scalars[2] = float(len(probed))
        scalars[3], scalars[4] = sums.log_likelihood, sums.log_perplexity

    def _accumulate_moments(
        self,
        inputs: Float[Tensor, "N P"],
        rows: Float[Tensor, "N P"],
        weight: Float[Tensor, " N"],
        statistics: FlatStatistics,
    ) -> None:
        statistics["sum_scalars"][0] = weight.sum()
        statistics["sum_scalars"][1] = float(self._num_bad)
        shifted = rows - self.row_mean
        weighted = weight[:, None] * shifted
        statistics["sum_rows"].copy_(weighted.sum(0))
        statistics["sum_outer"].copy_(shifted.T @ weighted)
        shifted_inputs = inputs - self.input_mean
        statistics["sum_inputs"].copy_((weight[:, None] * shifted_inputs).sum(0))
        statistics["sum_input_squares"].copy_((weight[:, None] * shifted_inputs.square()).sum(0))

    # ---------------------------------------------------------------- committing

    def _prepare_candidate(self) -> None:
        if not self._candidate:
            self._candidate = {name: torch.empty_like(getattr(self, name)) for name in self.table_names}
        self._candidate_scalars = {"is_initialised": True}

    def _update_moments(self) -> None:
        """Running moments: exponential average over steps with the exact update of a merged (co)variance."""
        statistics, candidate = self._statistics, self._candidate
        assert statistics is not None
        num_rows = statistics["sum_scalars"][0]
        rate = torch.where(num_rows > 0, _MOMENTS_RATE, 0.0)
        number = num_rows.clamp_min(1e-12)
        row_moments = merge_moments(
            self.row_mean,
            self.row_covariance,
            statistics["sum_rows"] / number,
            statistics["sum_outer"] / number,
            rate,
        )
        input_moments = merge_moments(
            self.input_mean,
            self.input_variance,
            statistics["sum_inputs"] / number,
            statistics["sum_input_squares"] / number,
            rate,
        )
        for name, value in zip(("row_mean", "row_covariance"), row_moments, strict=True):
            candidate[name].copy_(value)
        for name, value in zip(("input_mean", "input_variance"), input_moments, strict=True):
            candidate[name].copy_(value)

    def _update_components(self) -> None:
        statistics, candidate = self._statistics, self._candidate
        assert statistics is not None
        mass, moments = statistics["mass"], statistics["moments"]
        forgetting = forget(self.gmm, self.memory, self.counts, mass, statistics["sum_scalars"][0])
        candidate["counts"].copy_(forgetting.counts)
        self._update_mixing_weights(mass)
        for chunk in self._chunks():
            self.m_step(chunk, forgetting.rate[chunk], mass[chunk], moments[chunk])

    def _update_mixing_weights(self, mass: Float[Tensor, " K"]) -> None:
        """Pi <- pi + e (w / sum w - pi), floored and renormalised, with e = min(.01, N / (2 epoch))."""
        total = mass.sum()
        share = mass / total.clamp_min(1e-12)
        rate = (total / (2 * self.num_observations_per_epoch)).clamp_max(_USAGE_RATE)
        self._candidate["usage"].copy_(self.usage + rate * (share - self.usage))
        weights = self.mixing_weights
        if self.gmm.mixing_weights.mode == "tracked":
            weights = weights + rate * (share - weights)
        elif self.gmm.mixing_weights.mode == "from_counts":
            weights = self._candidate["counts"] / self._candidate["counts"].sum()
        if self.gmm.mixing_weights.mode != "uniform":
            weights = weights.clamp_min(self.gmm.mixing_weights.floor / self.num_prototypes)
            weights = torch.where(total > 0, weights / weights.sum(), self.mixing_weights)
        self._candidate["mixing_weights"].copy_(weights)

    def _is_collecting(self) -> bool:
        """Whether this step's rows become means; always false for random directions."""
        return (
            self.gmm.init.method != "sphere"
            and self.step >= self.collect_from_step
            and self.num_collected < self.num_prototypes
        )

    def _place_rows(self, rows: Float[Tensor, "M P"]) -> None:
        """Writes collected rows over the candidate's next means; K rows are looked at in all."""
        means = self._candidate["means"]
        rows = rows[: self.num_prototypes - self.num_collected]
        num_looked_at = len(rows)
        if self.gmm.init.method == "data_spread":
            rows = greedy_leaders(rows, self.gmm.init.spread_distance, leaders=means[: self.num_placed])
        means[self.num_placed : self.num_placed + len(rows)] = rows
        self._candidate_scalars["num_collected"] = self.num_collected + num_looked_at
        self._candidate_scalars["num_placed"] = self.num_placed + len(rows)

    def _publish(self, means: Float[Tensor, "K P"]) -> None:
        if self._published is None:
            self._published = torch.empty_like(self.means)
        norms = torch.linalg.vector_norm(means, dim=1, keepdim=True).clamp_min_(1e-12)
        torch.div(means, norms, out=self._published)
        self._is_published = True

    # ---------------------------------------------------------------- after the step

    def _perplexity_for_schedule(self) -> float | None:
        if self.gmm.beta.schedule != "perplexity" or not self._last:
            return None
        _, _, num_probed, _, log_perplexity = self._last["sum_scalars"].tolist()
        return log_perplexity / num_probed if num_probed > 0 else None

    def _forget_observations(self) -> None:
        self._held, self._num_bad = [], 0
        self._candidate_scalars = {}

    def _drop_candidate(self) -> None:
        self._forget_observations()
        self._is_published = False
        if not self.is_initialised:
            self.reset_moments()

    def reset_moments(self) -> None:
        """Puts the moments back to their values at construction: the first step was skipped."""
        self.input_mean, self.input_variance = (
            torch.zeros_like(self.input_mean),
            torch.ones_like(self.input_mean),
        )
        self.row_mean, self.row_covariance = (
            torch.zeros_like(self.row_mean),
            torch.eye(self.dim).to(self.row_mean),
        )
