"""The one interface behind which every mode and estimator of the prototypes stands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .config import PrototypesConfig
from .random_numbers import draw_unit_vectors
from .statistics import Collectives, Handle

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

Role = Literal["student", "teacher"]
LogitKind = Literal["dot", "cosine", "clustering", "posterior"]

STATE_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class EstimatorContext:
    """What an estimator needs to know of the run.

    Attributes:
        seed: the run's seed; every rank builds the same state from it.
        num_observations_per_epoch: teacher rows in one epoch over all ranks, V_t * images.
        total_steps: optimizer steps of the whole training; schedules run over them.
        rows_per_rank: teacher rows that one rank observes in one step, for the cost rule.
        collectives: the exchange between ranks.
    """

    seed: int
    num_observations_per_epoch: int
    total_steps: int
    rows_per_rank: int = 128
    collectives: Collectives = field(default_factory=Collectives)


@dataclass
class Observation:
    """What `observe` has started and `commit` waits for.

    Attributes:
        handle: the reduction under way; None while more micro-batches follow, or where nothing is reduced.
        rows: rows gathered from all ranks, where the estimator keeps rows rather than statistics.
    """

    handle: Handle | None = None
    rows: Tensor | None = None


class Assignment(NamedTuple):
    """How one step's E-step shared out its rows, before any component was revived; a sum over ranks is the total.

    Attributes:
        hits: [K] rows that each prototype won, the argmax of the responsibilities; this rank's part.
        mass: [K] summed responsibilities; this rank's part.
    """

    hits: Tensor
    mass: Tensor


class PrototypeEstimator(nn.Module, ABC):
    """Estimates K prototypes from teacher projections, outside the engine-wrapped network, in fp32.

    One step calls, in this order, `observe` (once per micro-batch), `commit`, `prototypes`, and after the
    finite check that all ranks agree on `accept` or `discard`. `observe` uses the state of the previous step;
    `commit` writes a candidate and publishes its prototypes; `accept` makes the candidate the state,
    `discard` drops it and leaves every state tensor as it was, bit for bit. After `accept`, what `learned_start`
    returns, if anything, is to be written over the learned prototypes.

    Attributes:
        num_prototypes: K.
        dim: width of the projections, P.
        context: what it knows of the run.
    """

    name = "none"
    has_components = False  # whether there is an E-step that shares rows out

    def __init__(self, config: PrototypesConfig, context: EstimatorContext) -> None:
        super().__init__()
        self.config = config
        self.context = context
        self.num_prototypes = config.num_prototypes
        self.dim = config.dim
        self.step = 0

    def observe(
        self,
        projections: Float[Tensor, "N P"],
        weight: Float[Tensor, " N"] | None = None,
        group: Int64[Tensor, " N"] | None = None,
        is_last: bool = True,
    ) -> Observation:
        """Returns an observation of this rank's teacher projections; no gradient.

        Collective on the call with `is_last`, which starts the asynchronous reduction of everything observed
        since the last commit; earlier calls only keep their rows. The base class observes nothing.

        Args:
            projections: teacher projections, any float dtype; rows that are not finite are dropped, counted.
            weight: weight of each row, >= 0; None is 1 for every row.
            group: group of each row (token position, crop); used where targets are balanced within groups.
            is_last: whether this is the last micro-batch of the step.
        """
        del projections, weight, group, is_last
        return Observation()

    def commit(self, observation: Observation) -> None:
        """Waits for the reduction and writes the candidate state, whose prototypes are published."""
        del observation

    def accept(self) -> None:
        """Makes the candidate the state: the step was taken."""
        self.step += 1

    def discard(self) -> None:
        """Drops the candidate: the step was skipped, the state is bitwise what it was before `observe`."""

    @abstractmethod
    def prototypes(self, role: Role, learned: Float[Tensor, "K P"] | None = None) -> Float[Tensor, "K P"]:
        """Returns the unit rows that `role` compares its projections with.

        Args:
            role: "student" or "teacher".
            learned: output of the module of `build_learned`, from the student's or the teacher's network;
                needed by estimators that have one.
        """

    def build_learned(self) -> nn.Module | None:
        """Returns the module of the prototypes that the encoder's loss trains, or None where there are none.

        Its forward returns unit rows [K, P]. It belongs inside the engine-wrapped student; the teacher's
        network holds the EMA copy.
        """
        return None

    def learned_start(self) -> Float[Tensor, "K P"] | None:
        """Returns the unit rows to be written over the learned prototypes of student and teacher after this step.

        None in every step but the one that has found them, the same on all ranks; valid as `assignment` is.
        """
        return None

    def logit_operands(
        self,
        projections: Float[Tensor, "*batch P"],
        role: Role,
        learned: Float[Tensor, "K P"] | None = None,
        kind: LogitKind = "dot",
    ) -> tuple[Float[Tensor, "*batch Q"], Float[Tensor, "K Q"]]:
        """Returns (rows, columns) with logits = rows @ columns.T: what the objective takes.

        Args:
            projections: projections of `role`; gradient flows through them.
            role: "student" or "teacher".
            learned: as in `prototypes`.
            kind: "dot": projections . prototypes, as CARP; "cosine": unit projections . prototypes; "clustering":
                those that a clustering trains its own prototypes on, "cosine" where there is none; "posterior": log
                joint density times the mixture's beta, mixtures only. A temperature is the objective's affair.

        Raises:
            ValueError: "posterior" without a mixture.
        """
        if kind == "posterior":
            raise ValueError(
                f"logits are posterior with the mode {self.config.mode}; expected a mixture; "
                "set prototypes.mode=full or objective.instance.logits=dot"
            )
        if kind in ("cosine", "clustering"):
            projections = nn.functional.normalize(projections.float(), dim=-1)
        return projections, self.prototypes(role, learned)

    def logits(
        self,
        projections: Float[Tensor, "N P"],
        index: Int64[Tensor, " k"] | None = None,
        role: Role = "teacher",
        learned: Float[Tensor, "K P"] | None = None,
    ) -> Float[Tensor, "N k"]:
        """Returns the "dot" logits of rows against all prototypes or those at `index`; small inputs only."""
        rows, columns = self.logit_operands(projections, role, learned)
        columns = columns if index is None else columns[index]
        return rows @ columns.to(rows.dtype).T

    def auxiliary_loss(
        self,
        learned: Float[Tensor, "K P"] | None = None,
        *,
        step: int = 0,
        micro_step: int = 0,
    ) -> Float[Tensor, ""] | None:
        """Returns a loss of the learned prototypes to add to the objective, or None.

        Args:
            learned: as in `prototypes`.
            step: optimizer step; whatever is drawn is a function of the seed, it and `micro_step`.
            micro_step: number of the loss inside the step.
        """
        del learned, step, micro_step
        return None

    def assignment(self) -> Assignment | None:
        """Returns how the E-step of the last step shared out its rows; None where there is none, as of learned ones.

        This rank's part; valid after `accept` and until the next `observe`.
        """
        return None

    def find_vanished(self) -> Bool[Tensor, " K"]:
        """Returns which of the published prototypes have shrunk away and point nowhere."""
        return torch.zeros(self.num_prototypes, dtype=torch.bool)

    def cosines_to_start(self, prototypes: Float[Tensor, "K P"]) -> Float[Tensor, " k"]:
        """Returns the cosine of the teacher's prototypes to where they started: proof that they moved, or did not.

        The start of all of them is a function of the seed, which is drawn again. Not collective.

        Args:
            prototypes: what `prototypes("teacher")` gave.
        """
        start = draw_unit_vectors(self.num_prototypes, self.dim, self.context.seed)
        return nn.functional.cosine_similarity(start.to(prototypes.device), prototypes, dim=1)

    def reseed(self, step: int) -> int:
        """Revives starved components, alike on every rank; returns how many. Off unless configured.

        The step's figures are taken before: what a revival has just repaired is no measure of the mixture.
        """
        del step
        return 0

    def describe_drift(
        self, before: Float[Tensor, "N P"], after: Float[Tensor, "N P"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Returns `gmm/...`: whether components can follow features that move while they wait; {} without components.

        Args:
            before: projections of some images.
            after: of the same images, as many steps later as pass until a component wins a row again.
        """
        del before, after
        return {}

    def metrics(self) -> dict[str, float]:
        """Returns scalars of the last committed step under the names of the metrics file; waits for it."""
        return {}

    def get_extra_state(self) -> dict[str, Any]:
        """Returns what identifies the state beside its tensors: schema, estimator, sizes, step."""
        return {
            "schema": STATE_SCHEMA,
            "estimator": self.name,
            "num_prototypes": self.num_prototypes,
            "dim": self.dim,
            "step": self.step,
        }

    def set_extra_state(self, state: Any) -> None:
        """Restores the step."""
        self.step = int(state["step"])

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads a state strictly.

        Raises:
            ValueError: another schema, estimator or K, a missing or unexpected tensor, a wrong shape or
                dtype: one line naming it. Nothing is loaded then.
        """
        problem = self._find_state_problem(state_dict)
        if problem is not None:
            raise ValueError(
                f"the state of the prototypes does not fit: {problem}; resume with the configuration it was "
                "written with, or set run.resume=false"
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _find_state_problem(self, state_dict: Any) -> str | None:
        identity = state_dict.get("_extra_state")
        if not isinstance(identity, dict):
            return "_extra_state is missing"
        expected_identity = self.get_extra_state()
        for key in ("schema", "estimator", "num_prototypes", "dim"):
            if identity.get(key) != expected_identity[key]:
                return f"{key} is {identity.get(key)}, expected {expected_identity[key]}"
        expected = {key: value for key, value in self.state_dict().items() if isinstance(value, Tensor)}
        for key, value in expected.items():
            found = state_dict.get(key)
            if not isinstance(found, Tensor):
                return f"{key} is missing"
            if found.shape != value.shape:
                return f"{key} has shape {tuple(found.shape)}, expected {tuple(value.shape)}"
            if found.dtype != value.dtype:
                return f"{key} has dtype {found.dtype}, expected {value.dtype}"
        unexpected = sorted(set(state_dict) - set(expected) - {"_extra_state"})
        return f"{unexpected[0]} is not expected" if unexpected else None
