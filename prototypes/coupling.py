"""The ladder between prototypes that the mixture estimates and prototypes that the encoder's loss trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def couple(
    learned: Float[Tensor, "K P"], estimated: Float[Tensor, "K P"], strength: float
) -> Float[Tensor, "K P"]:
    """Returns unit rows on the way from `estimated` (strength 0) to `learned` (strength 1).

    C = normalize(kappa C_learned + (1 - kappa) sg(C_EM)): kappa = 0 is the mode `full` and kappa = 1 the mode
    `joint`, both exactly. The gradient that reaches the learned prototypes is scaled by about kappa on the
    way. Source: ours. The mixing stands inside the forward pass, where it holds under every engine: pulling
    the parameters after the optimizer step would be undone by the fp32 copy that ZeRO keeps.

    Args:
        learned: unit rows; gradient flows to them.
        estimated: unit rows of the mixture; detached.
        strength: kappa, 0 to 1.
    """
    if strength == 0:
        return estimated
    if strength == 1:
        return learned
    return nn.functional.normalize(strength * learned + (1 - strength) * estimated.detach(), dim=1)
