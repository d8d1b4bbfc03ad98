"""Stands for the trainer where the batch script is tested: steps, the flag, a save, exit 75; no torch, no data.

    python pretrain.py DIRECTORY [exit=N]

Ranks agree through files as the real ones do through a collective. Every rank writes `step.RANK` (its saved step)
and `pid.RANK`.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from runtime.preemption import PreemptionFlag

STEP_S = 0.25


def main(directory: Path, exit_code: int) -> int:
    flag = PreemptionFlag().install()
    rank = int(os.environ["SLURM_PROCID"])
    num_steps = int(os.environ.get("STEPS", "24"))
    saved = directory / f"step.{rank}"
    step = int(saved.read_text()) if saved.exists() else 0
    (directory / f"pid.{rank}").write_text(str(os.getpid()))
    print(f"rank {rank} starts at step {step}", flush=True)
    while step < num_steps:
        time.sleep(STEP_S)
        step += 1
        if exit_code and step == 4 and rank == 1:
            return exit_code
        if any_rank_warned(directory, step, rank, flag.is_set):
            time.sleep(float(os.environ.get("SAVE_S", "0.2")))
            saved.write_text(str(step))
            print(f"rank {rank} saved step {step} after {flag.signal_name}", flush=True)
            # The main rank lingers (a tracker to close); the scheduler's SIGTERM for it arrives meanwhile.
            time.sleep(1.0 if rank == 0 else 0.0)
            return 75
    print(f"rank {rank} is done", flush=True)
    return 0


def any_rank_warned(directory: Path, step: int, rank: int, warned: bool) -> bool:
    """A collective through files; like NCCL it waits for ever for a rank that is gone."""
    start = os.environ.get("SLURM_RESTART_COUNT", "0")
    votes = [directory / f"vote.{start}.{step}.{other}" for other in range(int(os.environ["SLURM_NTASKS"]))]
    ballot = directory / f"ballot.{rank}"
    ballot.write_text(str(int(warned)))
    ballot.rename(votes[rank])
    started = time.monotonic()
    while not all(vote.exists() for vote in votes):
        time.sleep(0.01)
        if time.monotonic() > started + float(os.environ.get("PEER_TIMEOUT_S", "inf")):
            raise ConnectionError("a peer is gone")
    return any(vote.read_text() == "1" for vote in votes)


if __name__ == "__main__":
    chosen = [int(argument.removeprefix("exit=")) for argument in sys.argv[2:]]
    sys.exit(main(Path(sys.argv[1]), chosen[0] if chosen else 0))
