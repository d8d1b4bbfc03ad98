"""The two collectives that enter the prototypes' maths as callables, and a group of their own for them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.distributed import DEFAULT_TIMEOUT_S


@dataclass
class Handle:
    """A reduction under way; `wait` returns the reduced tensor."""

    tensor: Tensor
    work: Any = None

    def wait(self) -> Tensor:
        """Returns the reduced tensor once it is there."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


class Synchronization:
    """Collectives over all ranks for the estimator and for the loss.

    The estimator's reductions have a process group (and so a communicator) of their own: they never queue behind
    the engine's gradient buckets. On GPUs they run on a stream of high priority, because the M-step waits for them
    while the student's kernels fill the device. Every rank must issue them in the same order.

    Args:
        world_size: number of ranks; with one rank nothing is sent.
        timeout_s: seconds after which a collective that a rank never joined fails.
        device: where the tensors are.
    """

    def __init__(
        self,
        world_size: int,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        device: torch.device | str = "cpu",
    ) -> None:
        self.world_size = world_size
        # Collective: every rank makes the group at the same point of its program. A new group takes the backend's
        # timeout and not the first group's.
        timeout = timedelta(seconds=timeout_s)
        options: dict[str, Any] = {}
        if torch.device(device).type == "cuda":
            options = {
                "backend": "nccl",
                "pg_options": dist.ProcessGroupNCCL.Options(is_high_priority_stream=True),
            }
        self._statistics_group: Any = dist.new_group(timeout=timeout, **options) if world_size > 1 else None

    def reduce_sum(self, tensor: Tensor) -> Handle:
        """Starts an in-place sum over ranks and returns its handle. Asynchronous collective, no gradient."""
        if self.world_size == 1:
            return Handle(tensor)
        return Handle(tensor, dist.all_reduce(tensor, group=self._statistics_group, async_op=True))

    def gather(self, tensor: Tensor) -> Handle:
        """Starts gathering the ranks' equally shaped tensors to [world_size, ...]. Asynchronous collective."""
        gathered = tensor.new_empty((self.world_size, *tensor.shape))
        if self.world_size == 1:
            gathered.copy_(tensor.unsqueeze(0))
            return Handle(gathered)
        parts = list(gathered.unbind(0))
        work = dist.all_gather(parts, tensor.contiguous(), group=self._statistics_group, async_op=True)
        return Handle(gathered, work)

    def mean_over_ranks(self, tensor: Tensor) -> Tensor:
        """Returns the mean over ranks; the backward pass is the identity. Collective.

        For a loss f(mean_r x_r) that every rank computes alike, df/dx_r = f'(mean) / W. The identity hands f'
        on undivided, and the engine's averaging of gradients over W ranks divides it: the sum is exact.
        """
        if self.world_size == 1:
            return tensor
        return _MeanOverRanks.apply(tensor, self.world_size)


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world_size: int) -> Tensor:
        mean = tensor.detach().clone()
        dist.all_reduce(mean)
        return mean.div_(world_size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
