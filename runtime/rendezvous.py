"""Where the ranks of one program meet: read from what a launcher exported. Imports no torch.

An allocation is no launch: Slurm exports SLURM_NTASKS into batch scripts and interactive shells too, where nobody
starts the other tasks. Only a task of a step that `srun` started without a terminal has peers to wait for.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Mapping

logger = logging.getLogger(__name__)

_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Slurm numbers its own steps (batch script, interactive shell, extern) down from 2^32.
_FIRST_RESERVED_STEP = 2**31
# Below Linux's ephemeral ports (32768 and up), from which the system hands out others to whoever asks.
_FIRST_PORT, _LAST_PORT = 20000, 32767
_PORTS_PER_JOB = 16


def find_rendezvous(environment: Mapping[str, str], has_terminal: bool = False) -> dict[str, str]:
    """Returns the five rendezvous variables from torchrun's, SLURM's or no launcher's environment.

    Args:
        environment: variables of this process.
        has_terminal: whether a person's terminal is attached: then a Slurm step is a shell (`srun --pty`).

    Raises:
        ValueError: a launcher exported some of the variables and not the others.
    """
    present = [key for key in ("RANK", "WORLD_SIZE") if key in environment]
    if len(present) == 2:
        return _launcher_rendezvous(environment)
    if present:
        raise ValueError(
            f"{present[0]} is set without its partner; expected both RANK and WORLD_SIZE; unset or set both"
        )
    if is_slurm_launch(environment, has_terminal):
        return _slurm_rendezvous(environment)
    if _number(environment.get("SLURM_NTASKS")) > 1:
        logger.warning(
            "SLURM_NTASKS is %s, but srun did not start this process as one of them: it runs alone. "
            "Start all tasks with `srun python ...`",
            environment["SLURM_NTASKS"],
        )
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | _local_meeting_point()


def is_slurm_launch(environment: Mapping[str, str], has_terminal: bool) -> bool:
    """Whether this process is one of several tasks that `srun` started."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID")
    if has_terminal or not all(environment.get(key, "").isdecimal() for key in needed):
        return False
    return int(environment["SLURM_STEP_ID"]) < _FIRST_RESERVED_STEP and _num_tasks(environment) > 1


def first_host(node_list: str) -> str:
    """Returns the first host of a SLURM node list: 'rack1n[1-2]m[01-04],login' gives 'rack1n1m01'.

    Raises:
        ValueError: no node list.
    """
    # Commas inside brackets separate numbers, the first one outside them ends the first host.
    match = re.match(r"((?:[^\[\],\s]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+)(?:,|$)", node_list)
    if match is None:
        raise ValueError(
            f"SLURM's node list is {node_list!r}; expected one such as gpu[003-005,9]; start inside a SLURM job"
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[1])


def free_port() -> int:
    """Returns a TCP port that was free on the loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _launcher_rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    found = {key: environment[key] for key in _KEYS if key in environment}
    found.setdefault("LOCAL_RANK", environment.get("SLURM_LOCALID", "0"))
    _check_number(found, "WORLD_SIZE", 1, 2**31)
    _check_number(found, "RANK", 0, int(found["WORLD_SIZE"]) - 1)
    _check_number(found, "LOCAL_RANK", 0, 2**31)
    if "MASTER_ADDR" not in found or "MASTER_PORT" not in found:
        if int(found["WORLD_SIZE"]) > 1:
            raise ValueError(
                f"WORLD_SIZE is {found['WORLD_SIZE']} without MASTER_ADDR and MASTER_PORT; expected all "
                f"of {', '.join(_KEYS)}; start with torchrun, deepspeed, accelerate or srun"
            )
        found |= _local_meeting_point()
    _check_number(found, "MASTER_PORT", 1, 65535)
    return found


def _check_number(found: Mapping[str, str], key: str, least: int, most: int) -> None:
    text = found[key]
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and least <= int(text) <= most):
        rule = f"a number from {least} to {most}" if most < 2**31 else f"a number from {least} on"
        raise ValueError(f"{key} is {text!r:.60}; expected {rule}; unset {key}, or start with torchrun")


def _slurm_rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    node_list = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(_num_tasks(environment)),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(node_list),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_step_port(environment)),
    }
    _check_number(found, "MASTER_PORT", 1, 65535)
    return found


def _step_port(environment: Mapping[str, str]) -> int:
    """Returns the port on which all ranks of a step agree without a message.

    Where the site lets Slurm reserve ports for a step (`srun --resv-ports`), its first one; else one that no other
    step of this job and no step of the next 797 jobs has.
    """
    reserved = re.match(r"\d+", environment.get("SLURM_STEP_RESV_PORTS", ""))
    if reserved:
        return int(reserved[0])
    number = int(environment["SLURM_JOB_ID"]) * _PORTS_PER_JOB + int(environment["SLURM_STEP_ID"])
    return _FIRST_PORT + number % (_LAST_PORT - _FIRST_PORT + 1)


def _local_meeting_point() -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def _num_tasks(environment: Mapping[str, str]) -> int:
    return _number(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS"))


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 1
