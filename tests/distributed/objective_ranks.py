"""Runs on each gloo rank: the losses on this rank's part of the recorded inputs; every rank saves what it found.

python -m tests.distributed.objective_ranks OUT
"""

import sys
from pathlib import Path

import torch

from prototypes.statistics import Collectives
from runtime.distributed import start, stop
from tests.helpers.references import CASES, Rank
from training.engines.synchronization import Synchronization


def main(out_dir: str) -> None:
    torch.set_num_threads(1)
    process = start("cpu", timeout_s=60.0)
    synchronization = Synchronization(process.world_size)
    collectives = Collectives(
        process.rank, process.world_size, synchronization.reduce_sum, synchronization.gather
    )
    rank = Rank(collectives, synchronization.mean_over_ranks)
    # KoLeo's neighbours are a rank's own.
    found = {name: compute(rank) for name, compute in CASES.items() if name != "koleo"}
    torch.save(found, Path(out_dir) / f"found-{process.rank}.pt")
    stop()


if __name__ == "__main__":
    main(sys.argv[1])
