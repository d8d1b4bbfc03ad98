"""The run directory: made once, claimed by one configuration."""

from __future__ import annotations

from pathlib import Path

from runtime.config import config_to_dict, config_to_yaml, read_yaml
from runtime.distributed import Process
from runtime.files import write_atomically
from training.checkpoint_files import list_committed
from training.config import PretrainConfig
from training.config_difference import describe_difference


def prepare_run_directory(config: PretrainConfig, run_dir: Path, process: Process) -> None:
    """Makes the run directory and writes `config.yaml`, or checks that it is this configuration's. Collective.

    Raises:
        ValueError: the directory belongs to another configuration, or cannot be written; on all ranks.
    """
    problem = _prepare(config, run_dir) if process.is_main else None
    problem = process.broadcast_object(problem)
    if problem is not None:
        raise ValueError(problem)


def _prepare(config: PretrainConfig, run_dir: Path) -> str | None:
    path = run_dir / "config.yaml"
    if not config.run.resume and (saved := list_committed(run_dir / "checkpoints")):
        # A good checkpoint is never overwritten: the old run's would stay and be taken for the new run's.
        return (
            f"run.resume is False, but run directory {run_dir} holds checkpoints up to {saved[0].name}; expected a "
            f"run directory without checkpoints; set run.name to a new name, or remove {run_dir}"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            problem = describe_difference(run_dir, read_yaml(str(path)), config_to_dict(config))
            if problem is not None:
                return problem
        write_atomically(path, config_to_yaml(config))
    except OSError as error:
        return f"run directory {run_dir} cannot be written ({error.strerror}); set run.output_dir"
    return None
