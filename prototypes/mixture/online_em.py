"""Online EM: when a mixture observes, commits, and takes or drops a step.

One step reads Psi^{t-1}, moves the sufficient statistics of the batch across ranks, and writes Psi^t into a
candidate, whose prototypes the encoder's loss then uses (Arteaga et al. 2026, section 3: the prototypes
first, the encoder against them).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import PrototypesConfig
from ..coupling import couple
from ..estimator import Assignment, EstimatorContext, Observation, Role
from ..learned import require_learned
from ..statistics import Collectives, FlatStatistics, Handle, drop_non_finite, full_precision
from . import initialisation, moments, sparse
from .annealing import CRITICAL_REFRESH_STEPS, Annealing, compute_critical_beta
from .exchange import PROBE_SUMS, Entries
from .expectation import Batch
from .figures import STEP_SUMS, describe_step, describe_tables, traced
from .initialisation import Collected
from .maximisation import UpdatingMixture
from .publication import Publication
from .revival import revive_
from .touched import StepStatistics

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

MAX_DROPPED = 1e-3
"""Share of the rows' mass that a sparse step may leave out."""
_SPARSE_AGAIN = 0.5
"""Share of it below which steps are sparse again: at the border they would change places with every batch."""


class OnlineMixture(UpdatingMixture):
    """A mixture that follows the features, step by step.

    A sparse step keeps aside the rows that it will write; `accept` writes them, `discard` drops them. A dense one,
    of all components, has a second set of the tables for its candidate, and `accept` swaps the two.
    """

    def __init__(self, config: PrototypesConfig, context: EstimatorContext) -> None:
        super().__init__(config, context)
        self.is_initialised = False
        self._next_scalars: dict[str, Any] | None = None
        self._held: list[tuple[Tensor, Tensor]] = []
        self._num_bad = 0
        self._moments_known = False
        self._is_dense = True
        self._unread_share: Tensor | None = None
        self._batch: Batch | None = None
        self._table: FlatStatistics | None = None
        self._totals: FlatStatistics | None = None
        self._found: StepStatistics | None = None
        self._publication = Publication()
        self._before_revival: dict[str, Tensor] | None = None
        self._last: dict[str, Tensor] = {}
        self._last_mass: Tensor | None = None
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
        self.has_just_begun = False
        rows, kept_weight, num_bad = drop_non_finite(projections.detach().float(), weight, self._read)
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
        batch = self._batch = Batch(inputs, self.preprocess(inputs), weight)
        self._before_revival = None
        init = self.gmm.init
        is_standing = initialisation.is_standing(init, self.num_prototypes, self.collected)
        is_collecting = is_standing and initialisation.is_collecting(
            init, self.step, self.context.total_steps
        )
        handle: Handle
        if is_standing or self._is_dense or not self.may_be_sparse():
            handle = self._start_dense(batch, is_standing)
        else:
            handle = self._start_sparse(batch)
        self._last_rows = batch.rows if self.gmm.revival.method == "reseed" else None
        return Observation(handle, self._gather_if_local(batch.rows) if is_collecting else None)

    def _start_dense(self, batch: Batch, is_standing: bool) -> Handle:
        """Starts the exchange of all components' statistics. Collective."""
        self._found, self._natural, self._natural_is_current = None, None, False
        statistics = self._make_table()
        if is_standing:
            self.begin_batch(0)
            statistics.flat.zero_()
        else:
            self.sum_all_(batch, statistics)
        self._sum_moments(batch, statistics)
        return self.exchange.start(statistics, self._num_bad)

    def _start_sparse(self, batch: Batch) -> Handle:
        """Starts the exchange of the statistics of the components that the batch touches. Collective."""
        self._candidate_rows.clear()
        if not self.exchange.needs_table:
            self._table = None
        if self._totals is None:
            self._totals = FlatStatistics(0, self.num_statistics, self.dim, self.means.device)
        statistics = self._make_table() if self.exchange.needs_table else self._totals
        responsibilities = self.find_responsibilities(batch, statistics.sums)
        if self.exchange.method == "sparse":
            return self.exchange.start_entries(
                batch.inputs, batch.weight, responsibilities, statistics.sums, self._num_bad
            )
        self._found = found = self.sum_found(
            responsibilities.component, responsibilities.gamma, batch, statistics.sums
        )
        if self.exchange.needs_table:
            statistics.mass.copy_(found.all_masses)
            statistics.moments.zero_()
            statistics.moments[found.components] = found.moments
        self._sum_moments(batch, statistics)
        return self.exchange.start(statistics, self._num_bad)

    def _sum_moments(self, batch: Batch, statistics: FlatStatistics) -> None:
        statistics.sums["sum_weight"].copy_(batch.weight.sum())
        moments.accumulate_moments_(statistics.sums, batch.inputs, batch.rows, batch.weight, self._moments())

    @torch.no_grad()
    def commit(self, observation: Observation) -> None:
        """Waits for the statistics, writes the M-step into the candidate, publishes its prototypes; see `_receive`."""
        if observation.handle is None or self._batch is None:
            raise ValueError(
                "observation has no reduction; expected that of the call with is_last=True; pass it"
            )
        with full_precision(self.means.device):
            statistics = self._receive(observation.handle)
            is_dense = isinstance(statistics.components, slice)
            self._next_scalars = {"is_initialised": self.is_initialised or self._moments_known}
            if self.may_be_sparse():
                self._next_scalars["_is_dense"] = is_dense
                self._next_scalars["_unread_share"] = statistics.dropped_share
            self.update_components(statistics)
            if observation.rows is not None:
                self._place(observation.rows)
            self._publish_candidate()
        sums = statistics.sums
        self._last = {name: sums[name].clone() for name in STEP_SUMS}
        if is_dense:
            self._last["dropped"].zero_()
        self._last_mass, self._batch = statistics.all_masses, None

    def _read(self, num_bad: Tensor) -> int:
        """Returns a number of rows, and learns at once what the step before has left out. Waits for the device."""
        if self._unread_share is None:
            return int(num_bad)
        number, share = torch.stack([num_bad.to(self._unread_share.dtype), self._unread_share]).tolist()
        self._decide(share)
        return int(number)

    def _decide(self, share: float) -> None:
        """Makes the next step dense or sparse by what the last one has left out, or would have."""
        self._is_dense = not share <= MAX_DROPPED * (_SPARSE_AGAIN if self._is_dense else 1.0)
        self._unread_share = None

    def _receive(self, handle: Handle) -> StepStatistics:
        """Returns the statistics of all ranks. Collective.

        On a CPU a sparse step that would leave out too much is taken again with all components. A GPU would have to
        be waited for: there the step after it is dense, and all ranks know it from the same sum.
        """
        assert self._batch is not None
        gathered = handle.wait()
        if isinstance(handle, Entries):
            statistics = self._receive_entries(handle, gathered)
        elif self._found is None or self.exchange.needs_table:
            table = self._make_table()
            is_dense = self._found is None
            components = slice(0, self.num_prototypes) if is_dense else table.mass.nonzero().squeeze(1)
            statistics = StepStatistics(
                components, table.mass[components], table.moments[components], table.mass, table.sums
            )
        else:
            statistics = self._found
        is_sparse = isinstance(statistics.components, Tensor)
        if is_sparse and sparse.may_wait(self.means.device) and not statistics.dropped_share <= MAX_DROPPED:
            return self._receive(self._start_dense(self._batch, is_standing=False))
        return statistics

    def _receive_entries(self, handle: Entries, gathered: Float[Tensor, "M F"]) -> StepStatistics:
        assert self._totals is not None
        inputs, weight, dropped, index, gamma = handle.unpack(gathered)
        batch = Batch(inputs, self.preprocess(inputs), weight)
        sums = self._totals.sums
        for name, value in zip(PROBE_SUMS, handle.sums, strict=True):
            sums[name].copy_(value)
        sums["dropped"].copy_(weight @ dropped)
        self._sum_moments(batch, self._totals)
        return self.sum_found(index, gamma, batch, sums)

    def accept(self) -> None:
        """Makes the candidate the state, and advances beta."""
        assert self._next_scalars is not None, "accept() without commit()"
        self.accept_candidate()
        self._publication.settle()
        for name, value in self._next_scalars.items():
            setattr(self, name, value)
        begins = "collected" in self._next_scalars and self._begin_from_rows()
        self.step += 1
        if not self._has_reference or moments.is_reference_step(self.step):
            self.move_reference()
            self._natural_is_current = False
        elif self._touched_rows is not None:
            self.refresh_natural_(self._touched_rows.components)
        self._forget_observations()
        self.has_just_begun = begins
        if self.step % CRITICAL_REFRESH_STEPS == 0 and self.is_initialised:
            self.annealing.beta_critical = compute_critical_beta(self.row_covariance)
        self.annealing.advance(self.step)

    def discard(self) -> None:
        """Leaves the state; the published prototypes are the state's again."""
        self._publication.take_back()
        self._forget_observations()
        if not self.is_initialised:
            self._reset_tables()

    # ---------------------------------------------------------------- what is read from it

    def prototypes(self, role: Role, learned: Float[Tensor, "K P"] | None = None) -> Float[Tensor, "K P"]:
        """Returns the unit means, one tensor shared by student and teacher, without gradient.

        After `commit` those of the candidate, C^t; before, those of the state. The tensor is overwritten by
        the next `commit`. With a coupling, the means mixed with `learned`; see `coupling.py`.
        """
        published = self._publication.read(self)
        if self.config.coupling.strength == 0:
            return published
        mixed = couple(require_learned(learned), published, self.config.coupling.strength)
        return mixed.detach() if role == "teacher" else mixed

    def assignment(self) -> Assignment | None:
        """Returns rows won and mass of the last E-step; see the base class."""
        assert self._hits is not None and self._last_mass is not None, "assignment() without commit()"
        is_first = self.context.collectives.rank == 0
        return Assignment(self._hits * self.exchange.counts_rows, self._last_mass * is_first)

    def find_vanished(self) -> Bool[Tensor, " K"]:
        """Returns which published means have shrunk away; see `figures.find_vanished`."""
        return self._publication.find_vanished(self)

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
        self.forget_derived()
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
        """Returns the base class's entries and the scalars of schedule, start and exchange; waits for the device."""
        if self._unread_share is not None:
            self._decide(float(self._unread_share))
        return {
            **super().get_extra_state(),
            **self.annealing.state(),
            "is_initialised": self.is_initialised,
            "num_seen": self.collected.seen,
            "num_placed": self.collected.placed,
            "is_dense": self._is_dense,
            "synchronization": self.exchange.method,
            "kernel": self.kernel,
        }

    def set_extra_state(self, state: Any) -> None:
        """Restores what `get_extra_state` returned; "auto" keeps the choice of the first start."""
        super().set_extra_state(state)
        self.annealing.load(state)
        self.is_initialised = bool(state["is_initialised"])
        self.collected = Collected(int(state["num_seen"]), int(state["num_placed"]))
        if self.gmm.synchronization.method == "auto":
            self.exchange = self.choose_exchange(str(state["synchronization"]))
        self.resume_kernel(state.get("kernel"))
        self._is_dense, self._unread_share = bool(state.get("is_dense", True)), None
        self._forget_observations()
        self.forget_derived()

    def forget_derived(self) -> None:
        """Marks what is computed from the tables as out of date, after somebody has written to them."""
        self._natural_is_current = False
        self._publication.is_current = False

    def _make_table(self) -> FlatStatistics:
        """Returns the statistics' buffer of all components, allocated once."""
        if self._table is None:
            self._table = FlatStatistics(
                self.num_prototypes, self.num_statistics, self.dim, self.means.device
            )
        return self._table

    def _gather_if_local(self, rows: Float[Tensor, "N P"]) -> Float[Tensor, "M P"]:
        return self.context.collectives.gather_rows(rows) if self.exchange.is_local else rows

    def _initialise_moments(self, inputs: Float[Tensor, "N P"], weight: Float[Tensor, " N"]) -> None:
        """Sets the running moments from the first global batch: its E-step needs them already."""
        collectives = self.context.collectives if self.exchange.is_local else Collectives()
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
        self.forget_derived()

    # ---------------------------------------------------------------- after the step

    def _place(self, rows: Float[Tensor, "N P"]) -> None:
        assert self._next_scalars is not None
        self._next_scalars["collected"] = initialisation.place_rows_(
            self._candidate_rows["means"], rows, self.gmm.init, self.collected
        )

    def _begin_from_rows(self) -> bool:
        """Once all rows are placed every component starts afresh, as wide as the rows are now: whether they are."""
        self.traced_means.copy_(traced(self.means))
        if self.collected.seen == self.num_prototypes:
            self.reset_components()
            return True
        return False

    def _publish_candidate(self) -> None:
        if self._touched_rows is None:
            self._publication.publish(self._candidate_rows["means"])
        else:
            self._publication.publish_rows(
                self, self._touched_rows.components, self._touched_rows.rows["means"]
            )

    def _forget_observations(self) -> None:
        self._held, self._num_bad, self._next_scalars = [], 0, None
        self._batch, self._touched_rows, self.has_just_begun = None, None, False
