"""Pretrains a student and its EMA teacher with prototypes.

    python pretrain.py CONFIG.yaml [key.sub=value ...]
    torchrun --nproc_per_node 2 pretrain.py CONFIG.yaml [key.sub=value ...]

The same under `deepspeed`, `accelerate launch` and `srun`. A run lives in `outputs/RUN/`; the same command again
continues it. Exit codes: 0 done, 1 a fault, 2 the user's mistake (one line), 75 preempted with the state saved,
130 Ctrl-C.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.program import UserError, faults_unless, run_program

if TYPE_CHECKING:
    from runtime.distributed import Process
    from runtime.preemption import PreemptionFlag
    from training.config import PretrainConfig


def main(arguments: list[str]) -> int:
    """Returns the exit code of one pretraining job."""
    # Inside `run_program`, so that Ctrl-C is one line from here on.
    from runtime.requirements import ENCODER_PACKAGES, require_packages

    require_packages(*ENCODER_PACKAGES, "webdataset")
    from runtime.config import load_config
    from runtime.preemption import PreemptionFlag
    from runtime.usage import asks_for_help, describe_usage
    from training.config import PretrainConfig

    arguments = [
        argument for argument in arguments if not argument.startswith(("--local_rank", "--local-rank"))
    ]
    if asks_for_help(arguments):
        print(describe_usage(__doc__, PretrainConfig), end="")
        return 0
    if not arguments:
        raise UserError(
            "no configuration given; expected CONFIG.yaml [key.sub=value ...]; see configs/, or --help"
        )
    config = load_config(PretrainConfig, arguments[0], arguments[1:])
    if config.engine.name == "deepspeed":
        require_packages("deepspeed")
    # Before the slow imports, because until then the signals kill; and for the whole process, because a rank that
    # is still tearing down when srun passes a signal on must not die of it.
    return pretrain(config, PreemptionFlag().install())


def pretrain(config: PretrainConfig, preemption: PreemptionFlag) -> int:
    """Starts the runtime, builds and trains; returns the exit code."""
    from runtime import distributed
    from runtime.logging_setup import add_log_file, set_up_logging
    from training.run_directory import held_run_directory

    if config.run.dry_run:
        from evaluation.probes.knn import build_knn_probe
        from training.dry_run import describe_run

        process = distributed.unjoined()
        set_up_logging(process.rank)
        print(describe_run(config, process, build_knn_probe) if process.is_main else "", end="")
        return 0
    settings = config.run
    with distributed.joined(
        settings.device, settings.collective_timeout_s, tf32=config.engine.tf32
    ) as process:
        set_up_logging(process.rank)
        config = with_shards(config, process)
        run_dir = Path(config.run.output_dir) / config.run.name
        with held_run_directory(config, run_dir, process) as directory:
            add_log_file(run_dir / "console.log", process.rank)
            from data.shards import DataError
            from evaluation.probes.knn import build_knn_probe
            from training.build import build_trainer

            trainer = build_trainer(config, process, directory, preemption, build_knn_probe)
            process.limit_collectives()
            with faults_unless(DataError):
                return trainer.fit()


def with_shards(config: PretrainConfig, process: Process) -> PretrainConfig:
    """Returns the configuration with shards in the place of `data.images`, written by rank 0. Collective."""
    data = config.data
    if data.images is None:
        return config
    from data.writing.folder_shards import make_folder_shards
    from training.build import check_before_images

    check_before_images(config, process)
    images = data.images
    shards = process.do_on_main(
        lambda: make_folder_shards(images, data.cache_dir),
        "write the shards of data.images",
        data.images_timeout_s,
        "data.images_timeout_s",
    )
    return replace(config, data=replace(data, images=None, shards=shards))


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
