"""The processes of one evaluation, started by accelerate: who we are, how work is split, how it is collected."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

# The others wait while the first process fits what one process fits: on ImageNet that is hours, and the default of
# ten minutes would end the job.
_LONGEST_PROBE = timedelta(hours=12)


def _alone(item: Any) -> list[Any]:
    return [item]


def _nobody_to_wait_for() -> None:
    return None


@dataclass(frozen=True)
class Processes:
    """This process among those that evaluate together.

    Attributes:
        rank: of this process.
        world_size: number of processes.
        device: where this process computes.
        gather: collective: one picklable object per process, in rank order, to every process.
        wait: collective: returns once every process has called it.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gather: Callable[[Any], list[Any]] = _alone
    wait: Callable[[], None] = _nobody_to_wait_for

    def do_on_first(self, act: Callable[[], Any]) -> Any:
        """Returns what `act` returns on rank 0, or raises its ValueError, on every process. Collective."""
        answer: Any = None
        if self.rank == 0:
            try:
                answer = act()
            except ValueError as error:
                answer = error
        answer = self.gather(answer)[0]
        if isinstance(answer, ValueError):
            raise answer
        return answer

    def mine(self, parts: int) -> range:
        """Returns which of `parts` equal pieces of work this process does: every world_size-th, from its rank."""
        return range(self.rank, parts, self.world_size)


def require_writable(directory: Path, key: str, processes: Processes) -> None:
    """Makes a folder and raises ValueError on every process unless each can write into it. Collective.

    Asked before the work whose outcome goes there.

    Args:
        directory: the folder.
        key: the option that names it.
        processes: who writes.
    """
    said = ""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        said = error.strerror or type(error).__name__
    said = next(filter(None, processes.gather(said)), "")
    if said:
        raise ValueError(
            f"{key} is {str(directory)!r}; expected a folder that can be written ({said}); set {key}"
        )


def start_processes(device: str = "auto") -> Processes:
    """Returns the processes that `accelerate launch`, `torchrun` or nothing started. Collective.

    Args:
        device: `auto` (CUDA where there is one), `cpu` or `cuda`.

    Raises:
        ValueError: CUDA was asked for and is not there.
    """
    # Imported here: it takes a second, and a probe inside training never needs it.
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from runtime.distributed import set_tf32

    set_tf32(False)  # fp32 features are fp32 on a GPU too
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda'; expected a CUDA device, none is visible; set device=cpu")
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=_LONGEST_PROBE)
    if state.num_processes == 1:
        return Processes(device=state.device)
    return Processes(
        rank=state.process_index,
        world_size=state.num_processes,
        device=state.device,
        gather=lambda item: list(gather_object([item])),
        wait=state.wait_for_everyone,
    )
