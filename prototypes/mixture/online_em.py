"""Online EM: when a mixture observes, commits, and takes or drops a step.

One step reads Psi^{t-1}, moves the sufficient statistics of the batch across ranks, and writes Psi^t into a
candidate, whose prototypes the encoder's loss then uses (Arteaga et al. 2026, section 3: the prototypes
first, the encoder against them).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import PrototypesConfig
from ..coupling import couple
from ..estimator import Assignment, EstimatorContext, Observation, Role
from ..learned import LearnedPrototypes, require_learned
from ..statistics import Collectives, FlatStatistics, drop_non_finite, full_precision
from . import initialisation, moments
from .annealing import CRITICAL_REFRESH_STEPS, Annealing, compute_critical_beta
from .assignments import count_winners_, probe_assignments
from .candidate import CandidateTables
from .exchange import Exchange, choose_method
from .figures import STEP_SUMS, describe_step, describe_tables, find_vanished, traced
from .forgetting import forget
from .initialisation import Collected
from .mixing import compute_rates, update_mixing_weights, update_usage
from .model import Mixture, iterate_chunks
from .revival import revive_

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

LOGITS_BYTES = 256 * 2**20
_PROBED_ROWS = 16
_SHORTEST_DIRECTION = 1e-12


class OnlineMixture(Mixture):
    """A mixture that follows the features, step by step.

    A second set of the tables holds the candidate; `accept` swaps the two, `discard` leaves them. The
    statistics, the logits and the published prototypes are buffers allocated once.
    """

    traced_means: Tensor

    def __init__(self, config: PrototypesConfig, context: EstimatorContext) -> None:
        super().__init__(config, context)
        self.is_initialised = False
        self.collected = Collected()
        self.register_buffer("traced_means", traced(self.means).clone())
        self._use_method(
            choose_method(
                self.gmm.synchronization,
                num_prototypes=self.num_prototypes,
                dim=self.dim,
                rows_per_rank=context.rows_per_rank,
                world_size=context.collectives.world_size,
            )
        )
        self._candidate = CandidateTables()
        self._next_scalars: dict[str, Any] | None = None
        self._held: list[tuple[Tensor, Tensor]] = []
        self._num_bad = 0
        self._moments_known = False
        self._statistics: FlatStatistics | None = None
        self._logits: Tensor | None = None
        self._published: Tensor | None = None
        self._vanished: Tensor | None = None
        self._is_published = False
        self._hits: Tensor | None = None
        self._before_revival: dict[str, Tensor] | None = None
        self._last: dict[str, Tensor] = {}
        self._last_rows: Tensor | None = None

    # ---------------------------------------------------------------- one step

    @torch.no_grad()
    def observe(
        self,
        projections: Float[Tensor, "N P"],
        weight: Float[Tensor, " N"] | None = None,
        group: Int64[Tensor, " N"] | None = None,
        is_last: bool = True,
    ) -> Observation:
        """Keeps the rows; on the last micro-batch runs the E-step and starts the exchange. Collective.

        Rows of all micro-batches go through one E-step with the state of the previous step, so A
        micro-batches of B rows are one batch of A B rows. `group` does not enter a mixture's
        responsibilities, which are per row.
        """
        del group
        rows, kept_weight, num_bad = drop_non_finite(projections.detach().float(), weight)
        self._held.append((rows, rows.new_ones(len(rows)) if kept_weight is None else kept_weight.float()))
        self._num_bad += num_bad
        if not is_last:
            return Observation()
        with full_precision(self.means.device):
            return self._observe_all()

    def _observe_all(self) -> Observation:
        inputs = torch.cat([rows for rows, _ in self._held])
        weight = torch.cat([weights for _, weights in self._held])
        inputs, weight = self.exchange.share_rows(inputs, weight)
        if not self.is_initialised:
            self._initialise_moments(inputs, weight)
        rows = self.preprocess(inputs)
        statistics = self._make_room(len(rows))
        assert self._hits is not None
        self._hits.zero_()
        self._before_revival = None
        init = self.gmm.init
        is_standing = initialisation.is_standing(init, self.num_prototypes, self.collected)
        is_collecting = is_standing and initialisation.is_collecting(
            init, self.step, self.context.total_steps
        )
        if is_standing:
            statistics.flat.zero_()
        else:
            self._accumulate(rows, weight, statistics)
        statistics.sums["sum_weight"].copy_(weight.sum())
        moments.accumulate_moments_(statistics.sums, inputs, rows, weight, self._moments())
        handle = self.exchange.start(statistics, self._num_bad)
        self._last_rows = rows if self.gmm.revival.method == "reseed" else None
        return Observation(handle, self._gather_if_local(rows) if is_collecting else None)

    @torch.no_grad()
    def commit(self, observation: Observation) -> None:
        """Waits for the statistics, writes the M-step into the candidate, publishes its prototypes."""
        if observation.handle is None or self._statistics is None:
            raise ValueError(
                "observation has no reduction; expected that of the call with is_last=True; pass it"
            )
        with full_precision(self.means.device):
            observation.handle.wait()
            self._candidate.allocate(self, self.table_names)
            self._next_scalars = {"is_initialised": self.is_initialised or self._moments_known}
            sums = self._statistics.sums
            rate = moments.compute_moments_rate(self.step)
            self._candidate.write(moments.update_moments(self._moments(), sums, sums["sum_weight"], rate))
            self._update_components(self._statistics)
            if observation.rows is not None:
                self._place(observation.rows)
            self._publish(self._candidate["means"])
        self._last = {name: sums[name].clone() for name in STEP_SUMS}

    def accept(self) -> None:
        """Swaps candidate and state, and advances beta."""
        assert self._next_scalars is not None, "accept() without commit()"
        self._candidate.swap(self)
        for name, value in self._next_scalars.items():
            setattr(self, name, value)
        if "collected" in self._next_scalars:
            self._begin_from_rows()
        self._forget_observations()
        self.step += 1
        if self.step % CRITICAL_REFRESH_STEPS == 0 and self.is_initialised:
            self.annealing.beta_critical = compute_critical_beta(self.row_covariance)
        self.annealing.advance(self.step)

    def discard(self) -> None:
        """Leaves the state; the published prototypes are the state's again."""
        self._forget_observations()
        self._is_published = False
        if not self.is_initialised:
            self._reset_tables()

    # ---------------------------------------------------------------- what is read from it

    def build_learned(self) -> nn.Module | None:
        """Returns learned prototypes where the coupling is on; they start where the means do."""
        if self.config.coupling.strength == 0:
            return None
        return LearnedPrototypes(self.num_prototypes, self.dim, self.context.seed)

    def prototypes(self, role: Role, learned: Float[Tensor, "K P"] | None = None) -> Float[Tensor, "K P"]:
        """Returns the unit means, one tensor shared by student and teacher, without gradient.

        After `commit` those of the candidate, C^t; before, those of the state. The tensor is overwritten by
        the next `commit`. With a coupling, the means mixed with `learned`; see `coupling.py`.
        """
        if not self._is_published:
            self._publish(self.means)
        assert self._published is not None
        if self.config.coupling.strength == 0:
            return self._published
        mixed = couple(require_learned(learned), self._published, self.config.coupling.strength)
        return mixed.detach() if role == "teacher" else mixed

    def assignment(self) -> Assignment | None:
        """Returns rows won and mass of the last E-step; see the base class."""
        assert self._hits is not None and self._statistics is not None, "assignment() without observe()"
        is_first = self.context.collectives.rank == 0
        return Assignment(self._hits * self.exchange.counts_rows, self._statistics.mass * is_first)

    def find_vanished(self) -> Bool[Tensor, " K"]:
        """Returns which published means have shrunk away; see `mixture_figures.find_vanished`."""
        assert self._vanished is not None, "find_vanished() without prototypes()"
        return self._vanished

    @torch.no_grad()
    def reseed(self, step: int) -> int:
        """Revives starved and duplicate components every `revival.interval_steps`; see `revival.py`.

        Alike on every rank; collective with `method: reseed`, which gathers rows. Call after `accept`.
        """
        config = self.gmm.revival
        if config.method == "off" or step == 0 or step % config.interval_steps:
            return 0
        rows = None if self._last_rows is None else self._gather_if_local(self._last_rows)
        self._before_revival = describe_tables(self, self.traced_means)
        self._is_published = False
        return revive_(self, rows, config, seed=self.context.seed, step=step)

    def metrics(self) -> dict[str, float]:
        """Returns `gmm/...` of the last committed step, before its revival; waits for the device."""
        values = {"gmm/beta": self.annealing.beta, "gmm/beta_critical": self.annealing.beta_critical}
        if not self._last:
            return values
        tables = self._before_revival or describe_tables(self, self.traced_means)
        return {**values, **describe_step(self._last), **{name: float(v) for name, v in tables.items()}}

    # ---------------------------------------------------------------- state

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the base class's entries and the scalars of schedule, start and exchange."""
        return {
            **super().get_extra_state(),
            **self.annealing.state(),
            "is_initialised": self.is_initialised,
            "num_seen": self.collected.seen,
            "num_placed": self.collected.placed,
            "synchronization": self.exchange.method,
        }

    def set_extra_state(self, state: Any) -> None:
        """Restores what `get_extra_state` returned; "auto" keeps the choice of the first start."""
        super().set_extra_state(state)
        self.annealing.load(state)
        self.is_initialised = bool(state["is_initialised"])
        self.collected = Collected(int(state["num_seen"]), int(state["num_placed"]))
        if self.gmm.synchronization.method == "auto":
            self._use_method(str(state["synchronization"]))
        self._forget_observations()
        self._is_published = False

    def _use_method(self, method: str) -> None:
        self.exchange = Exchange(
            self.gmm.synchronization, self.context.collectives, self.num_prototypes, method
        )

    def _make_room(self, num_rows: int) -> FlatStatistics:
        """Returns the statistics' buffer, allocated once, and makes room for the logits."""
        own = self.exchange.own.stop - self.exchange.own.start
        rows_per_chunk = max(1, min(num_rows, LOGITS_BYTES // (4 * own)))
        if self._logits is None or self._logits.shape != (rows_per_chunk, own):
            self._logits = torch.empty(rows_per_chunk, own, device=self.means.device)
        if self._statistics is None:
            self._statistics = FlatStatistics(
                self.num_prototypes, self.num_statistics, self.dim, self.means.device
            )
            self._hits = torch.zeros(self.num_prototypes, device=self.means.device)
        return self._statistics

    # ---------------------------------------------------------------- E-step

    def _accumulate(
        self, rows: Float[Tensor, "N P"], weight: Float[Tensor, " N"], statistics: FlatStatistics
    ) -> None:
        """E-step and statistics w_k = sum_i gamma_ik, S_k = sum_i gamma_ik s(h_i - m), then centred."""
        assert self._logits is not None and self._hits is not None
        own, across = self.exchange.own, self.exchange.reduce_over_prototypes()
        mass, sums = statistics.mass[own].zero_(), statistics.moments[own]
        statistics.tail.zero_()
        if len(rows) == 0:
            sums.zero_()
        shifted = rows - self.reference()
        features = self.row_features(shifted)
        observed = self.row_statistics(shifted) * weight[:, None]
        penalty = self._balance_penalty()
        for start in range(0, len(rows), len(self._logits)):
            part = features[start : start + len(self._logits)]
            log_joint = self._log_joint(part, own, out=self._logits[: len(part)])
            if start == 0:
                self._probe(log_joint[:_PROBED_ROWS], statistics, penalty, across)
            gamma = self.assign_(log_joint, penalty, across)
            own_rows = slice(start, start + len(part))
            count_winners_(self._hits[own], gamma, weight[own_rows], across)
            mass.addmv_(gamma.T, weight[own_rows])
            torch.addmm(sums, gamma.T, observed[own_rows], beta=0 if start == 0 else 1, out=sums)
        for chunk in iterate_chunks(own, self.means.device):
            self.centre_statistics_(chunk, statistics.mass[chunk], statistics.moments[chunk])

    def _probe(
        self,
        log_joint: Float[Tensor, "N K"],
        statistics: FlatStatistics,
        penalty: Float[Tensor, " K"] | None,
        across: Collectives | None,
    ) -> None:
        probe = probe_assignments(log_joint, self.annealing.beta, penalty, across)
        statistics.sums["num_probed"].fill_(float(len(log_joint)))
        statistics.sums["log_likelihood"].copy_(probe.log_likelihood)
        statistics.sums["log_perplexity"].copy_(probe.log_perplexity)

    def _gather_if_local(self, rows: Float[Tensor, "N P"]) -> Float[Tensor, "M P"]:
        is_local = self.exchange.method == "all_reduce"
        return self.context.collectives.gather_rows(rows) if is_local else rows

    def _initialise_moments(self, inputs: Float[Tensor, "N P"], weight: Float[Tensor, " N"]) -> None:
        """Sets the running moments from the first global batch: its E-step needs them already."""
        is_local = self.exchange.method == "all_reduce"
        collectives = self.context.collectives if is_local else Collectives()
        number = collectives.start_sum(weight.sum()).wait()
        self._moments_known = bool(number > 0)
        if not self._moments_known:
            return
        mean, covariance = moments.compute_global_moments(inputs, weight, collectives)
        self.input_mean, self.input_variance = mean, covariance.diagonal().clone()
        rows = self.preprocess(inputs)
        self.row_mean, self.row_covariance = moments.compute_global_moments(rows, weight, collectives)
        self.reset_components()
        self.annealing.begin(compute_critical_beta(self.row_covariance))

    def _reset_tables(self) -> None:
        """Puts back what the first batch has set: no step was ever accepted."""
        for name, tensor in self.initial_tables().items():
            setattr(self, name, tensor.to(self.means.device))
        self.annealing = Annealing(self.gmm.beta, self.context.total_steps)
        self._moments_known = False

    # ---------------------------------------------------------------- M-step

    def _update_components(self, statistics: FlatStatistics) -> None:
        # While the means wait for rows there is no mass: nothing is forgotten either.
        num_rows = torch.where(statistics.mass.sum() > 0, statistics.sums["sum_weight"], 0.0)
        forgetting = forget(self.gmm, self.memory, self.counts, statistics.mass, num_rows)
        weight_rate, usage_rate = compute_rates(statistics.mass, self.context.num_observations_per_epoch)
        usage = update_usage(self.usage, statistics.mass, usage_rate)
        weights = update_mixing_weights(
            self.gmm.mixing_weights, self.mixing_weights, statistics.mass, weight_rate
        )
        self._candidate.write({"counts": forgetting.counts, "usage": usage, "mixing_weights": weights})
        for chunk in iterate_chunks(slice(0, self.num_prototypes), self.means.device):
            self.m_step(chunk, forgetting.rate[chunk], statistics.mass[chunk], statistics.moments[chunk])
        if forgetting.shrink is not None:
            self._candidate["means"].mul_(forgetting.shrink[:, None])
        self.finish_m_step(statistics)

    def divide_by_mass(self, rate: Float[Tensor, " k"], mass: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Returns rho / w, exactly 0 where the rate is 0."""
        return torch.where(rate > 0, rate / mass.clamp_min(1e-30), 0.0)

    def move_means(
        self,
        chunk: slice,
        rate: Float[Tensor, " k"],
        mass: Float[Tensor, " k"],
        first: Float[Tensor, "k P"],
    ) -> Float[Tensor, "k P"]:
        """Writes mu + rho T1 / w to the candidate and returns the move rho T1 / w."""
        move = first * self.divide_by_mass(rate, mass)[:, None]
        torch.add(self.means[chunk], move, out=self._candidate["means"][chunk])
        return move

    def _place(self, rows: Float[Tensor, "N P"]) -> None:
        assert self._next_scalars is not None
        self._next_scalars["collected"] = initialisation.place_rows_(
            self._candidate["means"], rows, self.gmm.init, self.collected
        )

    def _begin_from_rows(self) -> None:
        """Once all rows are placed every component starts afresh, as wide as the rows are now."""
        self.traced_means.copy_(traced(self.means))
        if self.collected.seen == self.num_prototypes:
            self.reset_components()

    def _publish(self, means: Float[Tensor, "K P"]) -> None:
        if self._published is None:
            self._published = torch.empty_like(self.means)
        norms = torch.linalg.vector_norm(means, dim=1)
        self._vanished = find_vanished(norms, self)
        # A row that is too short for a direction is published as zeros: it is no unit row.
        lengths = torch.where(norms >= _SHORTEST_DIRECTION, norms, torch.inf)
        torch.div(means, lengths[:, None], out=self._published)
        self._is_published = True

    # ---------------------------------------------------------------- after the step

    def _forget_observations(self) -> None:
        self._held, self._num_bad, self._next_scalars = [], 0, None
