"""What keeps targets apart where the loss does not move the prototypes: a centre; and how far apart they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from .interface import MeanOverRanks

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class TargetLoss(NamedTuple):
    """Scalars of a cross-entropy with targets, fp32.

    Attributes:
        total: the cross-entropy; only it has a gradient. Its least value is `target_entropy`.
        target_entropy: mean entropy of a target in nats: log K where targets are uniform.
        target_information: entropy of the mean target of all ranks less `target_entropy`: what a target says about its
            image. 0 where all targets are one, be it uniform or one-hot: the collapse, whichever way.
    """

    total: Tensor
    target_entropy: Tensor
    target_information: Tensor


class TargetFigures:
    """Sums over the targets of a rank, from which entropy and information follow."""

    def __init__(self, num_prototypes: int, device: torch.device) -> None:
        # [K] sum of the targets, their number and the sum of their entropies: one tensor to reduce.
        self._sums = torch.zeros(num_prototypes + 2, device=device)

    @torch.no_grad()
    def take(self, logits: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch K"]:
        """Returns the targets softmax(logits), after adding them, each with the weight 1.

        Their entropy is -sum p log p with the logarithms at hand: taking those of p costs as much as the logits did.
        """
        log_probs = torch.log_softmax(logits, dim=-1)
        probs = log_probs.exp()
        self._sums[:-2] += probs.flatten(0, -2).sum(0)
        self._sums[-2] += logits.shape[:-1].numel()
        self._sums[-1] -= log_probs.mul_(probs).sum()
        return probs

    def complete(self, loss: Tensor, mean_over_ranks: MeanOverRanks | None) -> TargetLoss:
        """Returns a loss with its targets' figures over all ranks. Collective: one reduction of K + 2 floats."""
        sums = self._sums if mean_over_ranks is None else mean_over_ranks(self._sums)
        count = sums[-2].clamp_min(torch.finfo(sums.dtype).tiny)
        entropy = sums[-1] / count
        return TargetLoss(loss, entropy, torch.special.entr(sums[:-2] / count).sum() - entropy)


@torch.no_grad()
def compute_mean_logits(
    rows: Float[Tensor, "*batch Q"],
    columns: Float[Tensor, "K Q"],
    mean_over_ranks: MeanOverRanks | None = None,
) -> Float[Tensor, " K"]:
    """Returns the mean of rows . columns over all ranks' rows, each counted once; fp32, no gradient.

    The mean logit is the mean row's: no logits are needed, and Q + 1 floats cross the wire in place of K. Without a
    row anywhere it is 0. Collective through `mean_over_ranks`.
    """
    flat = rows.flatten(0, -2).float()
    sums = torch.cat([flat.sum(0), flat.new_tensor([float(len(flat))])])
    sums = sums if mean_over_ranks is None else mean_over_ranks(sums)
    with torch.autocast(sums.device.type, enabled=False):
        return columns.float() @ (sums[:-1] / sums[-1].clamp_min(torch.finfo(sums.dtype).tiny))


def move_centre(
    centre: Float[Tensor, " K"], mean_logits: Float[Tensor, " K"], momentum: float
) -> Float[Tensor, " K"]:
    """Returns momentum * centre + (1 - momentum) * mean_logits.

    Targets are softmax((t - centre) / T) with the centre of the steps before: t are logits without temperature (DINO,
    Caron et al. 2021, eq. 4). The same in offsets of the logits: centre / T. Differs from DINOv2 for patches where
    ranks hold different numbers of them: there each rank's mean counts alike, here each patch does.
    """
    return torch.lerp(mean_logits, centre, momentum)
