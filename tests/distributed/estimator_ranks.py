"""Runs on each gloo rank: one recorded stream through an estimator; rank 0 and every rank save their state.

python -m tests.distributed.estimator_ranks STREAM OUT: STREAM holds a list of cases, each with a configuration,
the rows of every step and how ranks split them.
"""

import sys
from pathlib import Path

import torch

from prototypes.build import build_estimator
from runtime.distributed import start, stop
from training.engines.synchronization import Synchronization


def main(stream_path: str, out_dir: str) -> None:
    torch.set_num_threads(1)
    process = start("cpu", timeout_s=60.0)
    synchronization = Synchronization(process.world_size)
    cases = torch.load(stream_path, weights_only=False)
    states = {}
    for name, case in cases.items():
        estimator = build_estimator(
            case["config"],
            seed=0,
            num_observations_per_epoch=1000,
            total_steps=100,
            rank=process.rank,
            world_size=process.world_size,
            reduce_sum=synchronization.reduce_sum,
            gather=synchronization.gather if case["gather"] else None,
        )
        used = {"hits": torch.zeros(estimator.num_prototypes), "mass": torch.zeros(estimator.num_prototypes)}
        for rows, splits in zip(case["steps"], case["splits"], strict=True):
            own = rows.split(splits)[process.rank]
            estimator.commit(estimator.observe(own))
            estimator.accept()
            assignment = estimator.assignment()
            if assignment is not None:
                used["hits"] += assignment.hits
                used["mass"] += assignment.mass
            estimator.reseed(estimator.step)
        states[name] = estimator.state_dict() | {"used": used}
    torch.save(states, Path(out_dir) / f"state-{process.rank}.pt")
    stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
