"""Faults on demand, for the fault tests: `FAULT=name@rank:step:point` in the environment.

Production code calls `reach(point, step, rank)` where a fault can strike. Without FAULT the call is one
dictionary lookup. Faults: `kill` (SIGKILL to itself), `stop` (SIGSTOP), `enospc` (OSError as from a full
disk), `raise` (RuntimeError); `spike`, `nan`, `inf` and `flip` change a value, where the caller asks with
`is_planned`. Several faults are separated by commas; rank and step may be `*`.
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One planned fault: what happens, on which rank, at which step and point (`*` = any)."""

    name: str
    rank: str
    step: str
    point: str

    def strikes(self, point: str, step: int, rank: int) -> bool:
        """Returns whether this fault belongs here and now."""
        return self.point == point and self.step in ("*", str(step)) and self.rank in ("*", str(rank))


def planned_faults() -> list[Fault]:
    """Returns the faults that the environment asks for.

    Raises:
        ValueError: FAULT is not `name@rank:step:point[,...]`.
    """
    text = os.environ.get("FAULT", "")
    faults = []
    for item in filter(None, text.split(",")):
        try:
            name, place = item.split("@")
            rank, step, point = place.split(":")
        except ValueError:
            raise ValueError(f"FAULT is {text!r}; expected name@rank:step:point; set FAULT") from None
        faults.append(Fault(name, rank, step, point))
    return faults


def is_planned(name: str, point: str, step: int, rank: int) -> bool:
    """Returns whether the fault `name`, which the caller carries out, strikes here."""
    if "FAULT" not in os.environ:
        return False
    return any(fault.name == name and fault.strikes(point, step, rank) for fault in planned_faults())


def reach(point: str, step: int, rank: int) -> None:
    """Carries out a fault planned for this point; returns at once where there is none."""
    if "FAULT" not in os.environ:
        return
    for fault in planned_faults():
        if not fault.strikes(point, step, rank):
            continue
        if fault.name == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.name == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.name == "enospc":
            raise OSError(errno.ENOSPC, f"No space left on device (planned at {point})")
        elif fault.name == "raise":
            raise RuntimeError(f"planned fault at {point}, step {step}, rank {rank}")
