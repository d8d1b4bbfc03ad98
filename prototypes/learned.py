"""Prototypes that the encoder's loss trains (CARP, DINO), and fixed random ones, the mandatory control."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .config import PrototypesConfig
from .estimator import EstimatorContext, PrototypeEstimator, Role
from .objectives.koleo import compute_koleo
from .objectives.partitions import draw_partition
from .random_numbers import draw_unit_vectors

if TYPE_CHECKING:
    from jaxtyping import Float


class LearnedPrototypes(nn.Module):
    """A parameter [K, P] whose forward returns its rows at unit length.

    The same function as CARP's weight-normalised last layer with its gain frozen at 1; it starts at random
    directions. Gradient flows to the parameter, through the normalisation.
    """

    def __init__(self, num_prototypes: int, dim: int, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw_unit_vectors(num_prototypes, dim, seed))

    def forward(self) -> Float[Tensor, "K P"]:
        """Returns unit rows, fp32, a fresh tensor."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return nn.functional.normalize(self.weight.float(), dim=1)


class JointEstimator(PrototypeEstimator):
    """Prototypes trained by the consistency loss itself; the teacher's are their EMA copy (CARP).

    In the mode `joint_kp` a KoLeo term on the prototypes joins the loss (DINO+KP).
    """

    name = "joint"

    def __init__(self, config: PrototypesConfig, context: EstimatorContext) -> None:
        super().__init__(config, context)

    def build_learned(self) -> nn.Module:
        """Returns the trainable prototypes."""
        return LearnedPrototypes(self.num_prototypes, self.dim, self.context.seed)

    def prototypes(self, role: Role, learned: Float[Tensor, "K P"] | None = None) -> Float[Tensor, "K P"]:
        """Returns `learned` as it is; gradient flows to it for the student."""
        learned = require_learned(learned)
        return learned.detach() if role == "teacher" else learned

    def auxiliary_loss(
        self,
        learned: Float[Tensor, "K P"] | None = None,
        *,
        step: int = 0,
        micro_step: int = 0,
    ) -> Float[Tensor, ""] | None:
        """Returns koleo_weight * KoLeo of the student's prototypes in the mode `joint_kp`, else None.

        Its blocks are those of CARP's loss of the same step: the same function of the same numbers.
        """
        if self.config.mode != "joint_kp":
            return None
        learned = require_learned(learned)
        partition = draw_partition(
            self.num_prototypes,
            self.config.partition.size,
            seed=self.context.seed,
            step=step,
            micro_step=micro_step,
            device=learned.device,
        )
        return self.config.koleo_weight * compute_koleo(learned, partition)


def require_learned(learned: Float[Tensor, "K P"] | None) -> Float[Tensor, "K P"]:
    """Returns `learned`, or raises where the network's output was not handed in."""
    if learned is None:
        raise ValueError("learned is None; expected the output of build_learned(); pass it")
    return learned


class FrozenRandomEstimator(PrototypeEstimator):
    """Fixed random unit prototypes: the control arm. Unique by construction, tied to nothing."""

    name = "frozen_random"

    def __init__(self, config: PrototypesConfig, context: EstimatorContext) -> None:
        super().__init__(config, context)
        self.means: Tensor
        self.register_buffer("means", draw_unit_vectors(self.num_prototypes, self.dim, context.seed))

    def prototypes(self, role: Role, learned: Float[Tensor, "K P"] | None = None) -> Float[Tensor, "K P"]:
        """Returns the fixed directions."""
        del role, learned
        return self.means
