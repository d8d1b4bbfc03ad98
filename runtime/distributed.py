"""The process we are in: rank, device, rendezvous, and the small collectives that agree on plain values.

Tensor collectives of training live in `training/synchronization.py`; here are only those that any program
needs. Every object collective uses a gloo group of its own, so that it works beside NCCL and never queues
behind gradients.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

_RENDEZVOUS_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Process:
    """This process among its peers.

    Attributes:
        rank: 0 .. world_size - 1 over all nodes.
        world_size: number of processes.
        local_rank: rank on this node; the index of this process's GPU.
        device: the torch device of this process.
        control_group: gloo group of all ranks for plain values.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control_group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes logs and results."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all ranks. Collective: every rank must call."""
        if self.world_size > 1:
            dist.barrier(group=self.control_group)

    def broadcast_object(self, value: Any) -> Any:
        """Returns rank 0's `value` on every rank. Collective."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control_group)
        return box[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Returns every rank's `value`, in rank order. Collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def agree_any(self, flag: bool) -> bool:
        """Returns whether any rank raised its flag: one all-reduced int32. Collective."""
        if self.world_size == 1:
            return flag
        raised = torch.tensor([int(flag)], dtype=torch.int32)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self.control_group)
        return bool(raised.item())


def start(device: str = "auto", timeout_s: float = 600.0) -> Process:
    """Joins the process group and returns this process. Collective.

    Rendezvous comes from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (torchrun, deepspeed and
    accelerate export them), else from SLURM_*, else this is a single process on a free local port. All five
    are exported afterwards: DeepSpeed would otherwise look for MPI.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        timeout_s: seconds after which a collective that a rank never joined fails.

    Raises:
        ValueError: `device` is "cuda" where there is none, or the rendezvous is incomplete.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is 'cuda'; expected a visible CUDA device; set run.device=cpu or auto")
    rendezvous = find_rendezvous(dict(os.environ))
    os.environ.update(rendezvous)
    use_cuda = device != "cpu" and torch.cuda.is_available()
    local_rank = int(rendezvous["LOCAL_RANK"])
    if use_cuda:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        torch_device = torch.device("cuda", torch.cuda.current_device())
    else:
        torch_device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=timeout)
    return Process(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        device=torch_device,
        control_group=dist.new_group(backend="gloo", timeout=timeout),
    )


def stop() -> None:
    """Leaves the process group; safe to call twice. With NCCL this can wait for peers: call it when all is well."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined(device: str = "auto", timeout_s: float = 600.0) -> Iterator[Process]:
    """Joins the process group and leaves it at the block's end. See `start` for arguments and errors.

    A rank of several that fails leaves nothing in order: it must end (`runtime.program.run_program`), so that its
    peers notice, and must not wait for them here.
    """
    process = start(device, timeout_s)
    try:
        yield process
    except BaseException:
        if process.world_size == 1:
            stop()
        raise
    stop()


def find_rendezvous(environment: dict[str, str]) -> dict[str, str]:
    """Returns the five rendezvous variables from torchrun's, SLURM's or no launcher's environment.

    Raises:
        ValueError: a launcher exported some of the variables and not the others.
    """
    present = [key for key in ("RANK", "WORLD_SIZE") if key in environment]
    if len(present) == 2:
        found = {key: environment[key] for key in _RENDEZVOUS_KEYS if key in environment}
        found.setdefault("LOCAL_RANK", environment.get("SLURM_LOCALID", "0"))
        if "MASTER_ADDR" not in found or "MASTER_PORT" not in found:
            if int(found["WORLD_SIZE"]) > 1:
                raise ValueError(
                    f"WORLD_SIZE is {found['WORLD_SIZE']} without MASTER_ADDR and MASTER_PORT; expected all "
                    f"of {', '.join(_RENDEZVOUS_KEYS)}; start with torchrun, deepspeed, accelerate or srun"
                )
            found["MASTER_ADDR"], found["MASTER_PORT"] = "127.0.0.1", str(free_port())
        return found
    if present:
        raise ValueError(
            f"{present[0]} is set without its partner; expected both RANK and WORLD_SIZE; unset or set both"
        )
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return _slurm_rendezvous(environment)
    port = str(free_port())
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def first_host(node_list: str) -> str:
    """Returns the first host of a SLURM node list: 'gpu[003-005,9],login' gives 'gpu003'."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", node_list)
    if match is None:
        raise ValueError(
            f"SLURM_JOB_NODELIST is {node_list!r}; expected a node list; start inside a SLURM job"
        )
    prefix, first_index, suffix = match.groups()
    return prefix + (first_index or "") + (suffix or "")


def free_port() -> int:
    """Returns a TCP port that was free on the loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _slurm_rendezvous(environment: dict[str, str]) -> dict[str, str]:
    node_list = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    # Same port on all ranks without a message: derived from the job, in a range above the registered ports.
    port = 20000 + int(environment["SLURM_JOB_ID"]) % 20000
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_host(node_list)),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }
