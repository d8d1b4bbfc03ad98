"""Faults on demand, for the fault tests: `FAULT=name@rank:step:point` in the environment.

Production code calls `reach(point, step, rank)` where a fault can strike. Without FAULT the call is one
dictionary lookup. Faults: `kill` (SIGKILL to itself), `stop` (SIGSTOP), `enospc` (OSError as from a full
disk), `raise` (RuntimeError); `spike`, `nan` and `inf` multiply a value (`planned_factor`), `flip` is carried out
by the caller (`is_planned`). Several faults are separated by commas; rank and step may be `*`.
"""

from __future__ import annotations

import errno
import math
import os
import signal
from dataclasses import dataclass

FACTORS = {"nan": math.nan, "inf": math.inf, "spike": 100.0}


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


_struck: set[Fault] = set()


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


def is_planned(name: str, point: str, step: int, rank: int | None = None) -> bool:
    """Returns whether the fault `name`, which the caller carries out, strikes here (rank: this process's)."""
    if "FAULT" not in os.environ:
        return False
    rank = _own_rank() if rank is None else rank
    return any(fault.name == name and fault.strikes(point, step, rank) for fault in planned_faults())


def planned_factor(point: str, step: int, rank: int | None = None) -> float:
    """Returns what a value at this point is multiplied with: 1 unless a `nan`, `inf` or `spike` is planned.

    A fault at a numbered step strikes once: a skipped step is tried again under the same number.
    """
    if "FAULT" not in os.environ:
        return 1.0
    rank = _own_rank() if rank is None else rank
    for fault in planned_faults():
        if fault.name in FACTORS and fault.strikes(point, step, rank) and fault not in _struck:
            if fault.step != "*":
                _struck.add(fault)
            return FACTORS[fault.name]
    return 1.0


def reach(point: str, step: int, rank: int | None = None) -> None:
    """Carries out a fault planned for this point; returns at once where there is none."""
    if "FAULT" not in os.environ:
        return
    rank = _own_rank() if rank is None else rank
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


def _own_rank() -> int:
    return int(os.environ.get("RANK", "0"))
