"""The encoder as a folder that timm, transformers and this project load alike.

`python -m training.export RUN OUT [--which teacher|student]` exports from the newest whole checkpoint of a run
directory, or from the checkpoint that RUN names.

The folder holds what `timm.models.save_for_hf(..., safe_serialization=True)` writes (`config.json` with
`model_args`, `model.safetensors`), `prototypes.safetensors` and a model card. `timm.create_model(
"local-dir:OUT", pretrained=True)` and `transformers.AutoModel.from_pretrained(OUT)` give the same features.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from runtime.program import UserError, run_program
from runtime.usage import HelpFormatter


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.export", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory, or one of its checkpoints")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument(
        "--which", choices=("teacher", "student"), default="teacher", help="the network to export"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":  # usage and mistakes are answered before the slow imports
    parse(sys.argv[1:])

import torch

from runtime.config import load_config
from runtime.distributed import Process
from runtime.files import fsync_directory
from training.checkpoints.exported_encoder import (
    EXPORTED_NAMES,
    PROTOTYPES_NAME,
    assemble_backbone,
    export_encoder,
)
from training.checkpoints.files import load_manifest
from training.checkpoints.state_files import ConsolidatedState, load_tensors
from training.checkpoints.store import check_checkpoint, find_latest_checkpoint
from training.config import PretrainConfig


def export_from_run(run: Path, out_dir: Path, which: str) -> Path:
    """Exports one role of a run's newest whole checkpoint (or of the checkpoint `run`); returns the checkpoint.

    Raises:
        UserError: no run, no whole checkpoint, or `out_dir` holds something else than an export.
        CheckpointError: the named checkpoint is damaged.
    """
    process = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    if run.name.startswith("step-"):
        checkpoint, run_dir = run, run.parent.parent
        check_checkpoint(checkpoint, process)
    else:
        run_dir = run
        latest = find_latest_checkpoint(run / "checkpoints", process)
        if latest is None:
            raise UserError(
                f"{run} has no whole checkpoint; expected a run directory or a checkpoint; set RUN"
            )
        checkpoint = latest
    held = {path.name for path in out_dir.iterdir()} if out_dir.is_dir() else set()
    if foreign := sorted(held - EXPORTED_NAMES):
        raise UserError(f"OUT is {out_dir}, which holds {foreign[0]}; expected an empty folder; set OUT")
    config = load_config(PretrainConfig, str(run_dir / "config.yaml"))
    backbone = assemble_backbone(config.model, ConsolidatedState(checkpoint), which)
    exported = checkpoint / "teacher"
    temporary = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.tmp")
    export_encoder(
        backbone,
        temporary,
        model=config.model,
        mean=config.data.mean,
        std=config.data.std,
        interpolation=config.data.interpolation,
        prototypes=load_tensors(exported / PROTOTYPES_NAME),
        provenance=load_manifest(checkpoint)["facts"]
        | {"role": which, "step": load_manifest(checkpoint)["step"]},
    )
    shutil.rmtree(out_dir, ignore_errors=True)
    temporary.rename(out_dir)
    fsync_directory(out_dir.parent)
    return checkpoint


def main(arguments: list[str]) -> int:
    """Runs the command line and returns its exit code."""
    options = parse(arguments)
    checkpoint = export_from_run(options.run, options.out, options.which)
    print(f"exported the {options.which} of {checkpoint} to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
