"""The process we are in: rank, device, rendezvous, and the small collectives that agree on plain values.

Tensor collectives of training live in `training/engines/synchronization.py`; here are only those that any program
needs. Every object collective uses a gloo group of its own, so that it works beside NCCL and never queues
behind gradients.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from runtime.program import Fault
from runtime.rendezvous import find_rendezvous, is_slurm_launch

DEFAULT_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Process:
    """This process among its peers.

    Attributes:
        rank: 0 .. world_size - 1 over all nodes.
        world_size: number of processes.
        local_rank: rank on this node.
        device: the torch device of this process.
        control_group: gloo group of all ranks for plain values.
        timeout_s: seconds after which a collective that a rank never joined fails.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control_group: Any = None
    timeout_s: float = DEFAULT_TIMEOUT_S

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

    def do_on_main(self, act: Callable[[], Any], what: str, timeout_s: float, key: str) -> Any:
        """Returns what `act` returns on rank 0, or raises its ValueError, on every rank. Collective.

        For what one rank does while the others wait longer than a collective may take.

        Args:
            act: called on rank 0 alone; its value can be pickled.
            what: what it does, for the message of a rank that waited in vain.
            timeout_s: how long the others wait.
            key: the option that says so.

        Raises:
            Fault: on the others, where rank 0 took longer or ended.
        """
        if self.world_size == 1:
            return act()
        group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        box: list[Any] = [None]
        if self.is_main:
            try:
                box = [act()]
            except ValueError as error:
                box = [error]
        try:
            dist.broadcast_object_list(box, src=0, group=group)
        except RuntimeError as error:
            raise Fault(
                f"rank {self.rank} waited for rank 0 to {what} ({type(error).__name__}: {str(error)[:120]}); expected "
                f"it within {timeout_s:g} s; look at rank 0's output, or set {key}"
            ) from error
        dist.destroy_process_group(group)
        if isinstance(box[0], ValueError):
            raise box[0]
        return box[0]

    def limit_collectives(self) -> None:
        """Gives every process group that exists this process's timeout; not collective.

        Engines make groups of their own (DeepSpeed clones the world's, a device mesh may), which get the backend's
        default instead: 10 minutes with NCCL, 30 with gloo. Call it when all parts are built.
        """
        if self.world_size > 1:
            # torch.distributed.set_timeout under its older name where there is no newer one.
            set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
            for group in list(dist.distributed_c10d._world.pg_map):
                set_timeout(timedelta(seconds=self.timeout_s), group)


def start(device: str = "auto", timeout_s: float = DEFAULT_TIMEOUT_S, *, tf32: bool = False) -> Process:
    """Joins the process group and returns this process. Collective.

    Rendezvous comes from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (torchrun, deepspeed and
    accelerate export them), else from SLURM_* inside a step of srun, else this is a single process on a free local
    port. All five are exported afterwards, because DeepSpeed would otherwise look for MPI; LOCAL_RANK and
    DS_ACCELERATOR as this function decided them, whatever they were: DeepSpeed takes the one for the index of the GPU
    and the other for the kind of device.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        timeout_s: seconds after which a collective that a rank never joined fails, this first one included.
        tf32: see `set_tf32`.

    Raises:
        ValueError: `device` is "cuda" where there is none, the rendezvous is incomplete, or two ranks share a GPU.
        Fault: the peers did not come.
    """
    rendezvous = find_rendezvous(os.environ, has_terminal())
    by_slurm = "RANK" not in os.environ and is_slurm_launch(os.environ, has_terminal())
    local_rank = int(rendezvous["LOCAL_RANK"])
    # Asked only where a GPU may be used: the question alone takes the driver's time.
    torch_device = choose_device(device, local_rank, 0 if device == "cpu" else torch.cuda.device_count())
    use_cuda = torch_device.type == "cuda"
    os.environ.update(rendezvous)
    os.environ["DS_ACCELERATOR"] = torch_device.type
    set_tf32(tf32)
    if use_cuda:
        os.environ["LOCAL_RANK"] = str(torch_device.index)
        torch.cuda.set_device(torch_device)
    timeout = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=timeout)
        control_group = dist.new_group(backend="gloo", timeout=timeout)
    except dist.DistError as error:
        raise Fault(_describe_failed_meeting(rendezvous, timeout_s, by_slurm, error)) from error
    process = Process(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        device=torch_device,
        control_group=control_group,
        timeout_s=timeout_s,
    )
    if use_cuda:
        uuid = torch.cuda.get_device_properties(torch_device).uuid
        check_own_gpus(process.all_gather_object(f"{socket.gethostname()} {uuid}"))
    return process


def unjoined() -> Process:
    """Returns this process as its launcher numbers it, on the CPU and without a group: nobody is waited for."""
    rendezvous = find_rendezvous(os.environ, has_terminal())
    rank, world_size, local_rank = (int(rendezvous[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Process(rank=rank, world_size=world_size, local_rank=local_rank, device=torch.device("cpu"))


def choose_device(device: str, local_rank: int, num_visible: int) -> torch.device:
    """Returns this process's device.

    Args:
        device: "auto", "cpu" or "cuda".
        local_rank: rank on this node.
        num_visible: GPUs that this process sees. All of its node's: then it takes the one of its local rank. Only its
            own (`srun --gpus-per-task=1`): then that one, whose index is 0 in every process.

    Raises:
        ValueError: "cuda" where no GPU is visible.
    """
    if device == "cuda" and not num_visible:
        raise ValueError("run.device is 'cuda'; expected a visible CUDA device; set run.device=cpu or auto")
    if device == "cpu" or not num_visible:
        return torch.device("cpu")
    return torch.device("cuda", local_rank % num_visible)


def check_own_gpus(owners: list[str]) -> None:
    """Refuses two ranks on one GPU, which NCCL answers with an error of its own that names neither.

    Args:
        owners: host and GPU of every rank, in rank order.

    Raises:
        ValueError: with the two ranks.
    """
    for rank, owner in enumerate(owners):
        if (first := owners.index(owner)) < rank:
            raise ValueError(
                f"ranks {first} and {rank} share one GPU ({owner}); expected a GPU for each; start fewer processes a "
                "node, or make more GPUs visible"
            )


def set_tf32(allowed: bool) -> None:
    """Chooses how fp32 convolutions and matrix products are computed on CUDA: in fp32, or in TF32 (10-bit mantissa).

    torch's own default is fp32 for products and TF32 for convolutions.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def has_terminal() -> bool:
    """Whether a person's terminal is attached to this process, also where its input is redirected."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _describe_failed_meeting(
    rendezvous: dict[str, str], timeout_s: float, by_slurm: bool, error: Exception
) -> str:
    place = f"{rendezvous['MASTER_ADDR']}:{rendezvous['MASTER_PORT']}"
    if "EADDRINUSE" in str(error):
        return f"port of {place} is in use; expected a free one; set MASTER_PORT on all ranks"
    remedy = (
        "start all tasks of the Slurm step with `srun python ...`, or one alone with `srun --ntasks=1`"
        if by_slurm
        else "start all ranks, or unset RANK and WORLD_SIZE for one process"
    )
    return (
        f"rank {rendezvous['RANK']} of {rendezvous['WORLD_SIZE']} waited {timeout_s:g} s for its peers at {place} "
        f"({type(error).__name__}); expected all to come within run.collective_timeout_s; {remedy}"
    )


def stop() -> None:
    """Leaves the process group; safe to call twice. With NCCL this can wait for peers: call it when all is well."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined(
    device: str = "auto", timeout_s: float = DEFAULT_TIMEOUT_S, *, tf32: bool = False
) -> Iterator[Process]:
    """Joins the process group and leaves it at the block's end. See `start` for arguments and errors.

    A rank of several that fails leaves nothing in order: it must end (`runtime.program.run_program`), so that its
    peers notice, and must not wait for them here.
    """
    process = start(device, timeout_s, tf32=tf32)
    try:
        yield process
    except BaseException:
        if process.world_size == 1:
            stop()
        raise
    stop()
