"""Guards of a run: loss spikes, and replicas that silently drift apart.

The guard against non-finite gradients is the engine's (`Engine.gradients_are_finite`), because only the engine
knows where gradients live; `training/step.py` asks all guards before anything moves.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Bits are summed row by row: the weight of a row is odd, so that no change of one row is lost modulo 2^64.
_ROW_NUMBERS = 4096


class LossSpikeGuard:
    """Refuses a step whose loss exceeds `factor` times the median of recent losses, or is not finite.

    Only admitted, finite losses enter the window: neither a NaN nor a spike can poison it. The first `warmup`
    losses are admitted if finite. A plateau that is really higher would be refused forever; `max_skipped_steps`
    of the trainer ends such a run. Not collective: fed with a loss that all ranks share, all guards agree.

    Args:
        factor: largest admitted multiple of the median, above 1; None admits every finite loss.
        window: losses that are remembered.
        warmup: losses needed before the median counts.
    """

    def __init__(self, factor: float | None, *, window: int = 128, warmup: int = 16) -> None:
        if factor is not None and factor <= 1.0:
            raise ValueError(
                f"spike factor is {factor}; expected more than 1 or null; set optim.spike_factor"
            )
        self._factor = factor
        self._warmup = warmup
        self._losses: deque[float] = deque(maxlen=window)

    def admits(self, loss: float) -> bool:
        """Returns whether a step with this loss may move anything."""
        if not math.isfinite(loss):
            return False
        if self._factor is None or len(self._losses) < self._warmup:
            return True
        median = sorted(self._losses)[len(self._losses) // 2]
        # The total loss can be negative (its entropy term is subtracted): the threshold is a distance.
        return loss <= median + (self._factor - 1.0) * max(abs(median), 1e-3)

    def record(self, loss: float) -> None:
        """Remembers the loss of a step that was applied; a non-finite one is not taken."""
        if math.isfinite(loss):
            self._losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """Returns the window: a resumed run decides as the uninterrupted one."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a window over; the newest losses that fit stay."""
        self._losses.clear()
        self._losses.extend(state["losses"])


class ReplicaMismatchError(RuntimeError):
    """Copies that must be bitwise equal on all ranks are not; the message names ranks and tensors."""


class Gathering(Protocol):
    """What the check of replicas needs of `runtime.distributed.Process`."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Returns every rank's value in rank order. Collective."""


def check_replicas(tensors: Iterable[tuple[str, Tensor]], process: Gathering, step: int) -> None:
    """Returns if named tensors are bitwise equal on all ranks. Collective: every rank, the same names.

    Cost: one pass over the bytes on each tensor's device, one synchronisation, eight bytes a tensor on the wire.

    Args:
        tensors: the replicated state: mixture, weights, teacher. Sharded tensors have no replica to compare.
        process: the ranks.
        step: for the message.

    Raises:
        ReplicaMismatchError: on all ranks alike.
    """
    if process.world_size == 1:
        return
    names, sums = [], []
    for name, tensor in tensors:
        names.append(name)
        sums.append(compute_checksum(tensor))
    if not sums:
        return
    mine = torch.stack([value.to(sums[0].device) for value in sums]).tolist()
    all_ranks = process.all_gather_object(mine)
    if all(theirs == mine for theirs in all_ranks):
        # Not a decision of this rank alone: equality with every rank is equality of all of them.
        return
    raise ReplicaMismatchError(f"step {step}: {_describe_mismatch(names, all_ranks)}")


@torch.no_grad()
def compute_checksum(tensor: Tensor) -> Tensor:
    """Returns a 64-bit sum of a tensor's bits, as int64 scalar on its device; any single changed bit changes it.

    The order of summation does not matter (integers modulo 2^64), so the value is the same on every device.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGER_OF_SIZE[tensor.element_size()])
    whole = bits.numel() // _ROW_NUMBERS * _ROW_NUMBERS
    rows = bits[:whole].view(-1, _ROW_NUMBERS).sum(dim=1, dtype=torch.int64)
    weights = torch.arange(rows.numel(), device=bits.device, dtype=torch.int64) * 2 + 1
    return (rows * weights).sum() - bits[whole:].sum(dtype=torch.int64)


def _describe_mismatch(names: list[str], all_ranks: list[list[int]]) -> str:
    """Names the ranks outside the majority (against rank 0 where there is none) and their first tensors."""
    if any(len(theirs) != len(names) for theirs in all_ranks):
        return f"ranks hold {sorted({len(theirs) for theirs in all_ranks})} replicated tensors; expected equal counts"
    suspects: dict[int, list[str]] = {}
    for index, name in enumerate(names):
        values = [theirs[index] for theirs in all_ranks]
        common, count = Counter(values).most_common(1)[0]
        if count * 2 <= len(values):
            common = values[0]
        for rank, value in enumerate(values):
            if value != common:
                suspects.setdefault(rank, []).append(name)
    parts = [
        f"rank {rank} differs in {tensors[0]}" + (f" and {len(tensors) - 1} more" if len(tensors) > 1 else "")
        for rank, tensors in suspects.items()
    ]
    return (
        f"replicas have drifted apart: {'; '.join(parts)} (of {len(names)} tensors on {len(all_ranks)} ranks); "
        "a device computes wrongly or an update was not shared; restart from the last checkpoint without that node"
    )
