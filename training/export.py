"""The encoder as a folder that timm, transformers and this project load alike.

`python -m training.export RUN OUT [--which teacher|student] [--format folder|onnx]` exports from the newest whole
checkpoint of a run directory, or from the checkpoint that RUN names.

The folder holds what `timm.models.save_for_hf(..., safe_serialization=True)` writes (`config.json` with
`model_args`, `model.safetensors`), a model card and, for whoever asks which prototype an image or a patch is nearest
to, `prototypes.safetensors` and the same role's `projection_head.safetensors`; of a run whose patches have their own,
also `patch_prototypes.safetensors` and `patch_head.safetensors`. `timm.create_model("local-dir:OUT", pretrained=True)`
and `transformers.AutoModel.from_pretrained(OUT)` give the same features, and read neither heads nor prototypes.
With `--format onnx` OUT is one file: `images` to `embedding` [B, D] and, of a ViT, `patch_tokens` [B, N, D]; any batch,
and any size that the network allows; its metadata say how images are prepared. It holds neither heads nor prototypes.
onnxruntime's outputs are compared with the encoder's before the file is kept. It needs
`pip install onnx onnxruntime onnxscript`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from runtime.program import UserError, run_program
from runtime.requirements import ENCODER_PACKAGES, exit_without_packages
from runtime.usage import HelpFormatter


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.export", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory, or one of its checkpoints")
    parser.add_argument("out", type=Path, help="the folder, or file, to write")
    parser.add_argument(
        "--which", choices=("teacher", "student"), default="teacher", help="the network to export"
    )
    parser.add_argument(
        "--format",
        choices=("folder", "onnx"),
        default="folder",
        help="a folder for timm and transformers, or ONNX",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":  # usage and mistakes are answered before the slow imports
    parse(sys.argv[1:])
    exit_without_packages(*ENCODER_PACKAGES)

import torch

from runtime.config import load_config
from runtime.distributed import Process
from runtime.files import fsync_directory
from training.checkpoints.exported_encoder import (
    CARD_NAME,
    EXPORTED_NAMES,
    PROTOTYPES_NAME,
    assemble_backbone,
    assemble_heads,
    export_encoder,
    is_export,
    load_exported,
)
from training.checkpoints.files import MANIFEST_NAME, load_manifest
from training.checkpoints.state_files import ConsolidatedState, load_tensors
from training.checkpoints.store import check_checkpoint, find_latest_checkpoint
from training.config import PretrainConfig
from training.onnx_file import require_onnx, write_onnx

_RUN_CONFIG, _RUN_FOLDERS = "config.yaml", ("checkpoints", "in_training")
_STEP = re.compile(r"step-\d{8,}")


def export_from_run(run: Path, out_dir: Path, which: str, named: Path | None = None) -> Path:
    """Exports one role of a run's newest whole checkpoint (or of the checkpoint `run`); returns the checkpoint.

    Args:
        run: the run, or a checkpoint.
        out_dir: the folder to write.
        which: the role.
        named: what the user called OUT, where that is another place.

    Raises:
        UserError: no run, no whole checkpoint, `out_dir` holds something else than an export, lies in a checkpoint or
            cannot be written.
        CheckpointError: the named checkpoint is damaged.
    """
    target = _check_place(out_dir)
    if target.exists() and not target.is_dir():
        raise UserError(f"OUT is {out_dir}, which is a file; expected an empty folder or a new name; set OUT")
    held = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if held and not is_export(target):
        other = min(held - EXPORTED_NAMES or held)
        raise UserError(
            f"OUT is {out_dir}, which holds {other} and is no export; expected an empty folder, a new name or a former "
            "export; set OUT"
        )
    checkpoint, run_dir = _find_checkpoint(run)
    config = load_config(PretrainConfig, str(run_dir / "config.yaml"))
    state, exported = ConsolidatedState(checkpoint), checkpoint / "teacher"
    backbone = assemble_backbone(config.model, state, which)
    beside = assemble_heads(config.model, state, which)
    own = exported / "patch_prototypes.safetensors"
    if own.is_file():
        beside["patch_prototypes"] = load_tensors(own)
    prototypes, manifest = load_tensors(exported / PROTOTYPES_NAME), load_manifest(checkpoint)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with _writing(named or out_dir, temporary):
        export_encoder(
            backbone,
            temporary,
            model=config.model,
            mean=config.data.mean,
            std=config.data.std,
            interpolation=config.data.interpolation,
            pixels=config.data.pixels,
            prototypes=prototypes,
            beside=beside,
            levels=config.levels,
            provenance=manifest["facts"] | {"role": which, "step": manifest["step"]},
        )
        _put(temporary, target)
    return checkpoint


@contextlib.contextmanager
def _writing(out: Path, temporary: Path | None = None) -> Iterator[None]:
    """Says of a place that cannot be written what it is, and leaves nothing of a temporary folder."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"OUT is {out}, which cannot be written ({reason}); expected a place with room for it; set OUT"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _check_place(out: Path) -> Path:
    """Returns OUT without links and dots; what lies in a checkpoint, its `teacher/` say, is part of it.

    Raises:
        UserError: it lies among the checkpoints of a run.
    """
    target = out.resolve()
    for folder in (target, *target.parents):
        of_run = folder.name in _RUN_FOLDERS and (folder.parent / _RUN_CONFIG).is_file()
        if of_run or (folder / MANIFEST_NAME).is_file():
            raise UserError(
                f"OUT is {out}, which lies in {folder}, a run's own; expected a place outside of checkpoints; set OUT"
            )
    return target


def _find_checkpoint(run: Path) -> tuple[Path, Path]:
    """Returns the checkpoint that RUN is, or the newest whole one of the run, and the run."""
    process = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    is_run = (run / _RUN_CONFIG).is_file()  # which may be called as it likes
    if not is_run and (_STEP.fullmatch(run.name) or (run / MANIFEST_NAME).is_file()):
        check_checkpoint(run, process)
        return run, run.parent.parent
    latest = find_latest_checkpoint(run / "checkpoints", process)
    if latest is None:
        raise UserError(f"{run} has no whole checkpoint; expected a run directory or a checkpoint; set RUN")
    return latest, run


def _put(temporary: Path, target: Path) -> None:
    """Moves an export to its place; a folder that is there stays itself, as a shell may stand in it."""
    if target.is_dir():
        for path in target.iterdir():
            if path.name != CARD_NAME:  # by which a later start knows an interrupted one's remains
                path.unlink()
        for path in sorted(temporary.iterdir(), key=lambda path: path.name != CARD_NAME):
            shutil.move(path, target / path.name)  # a disk may be mounted there
    else:
        temporary.rename(target)
        target = target.parent
    fsync_directory(target)


def export_onnx(run: Path, out: Path, which: str) -> tuple[Path, str]:
    """Exports as `export_from_run` does, but into one ONNX file; returns the checkpoint and what the file takes.

    Raises:
        UserError: see `export_from_run` and `write_onnx`.
    """
    require_onnx()
    target = _check_place(out)
    if not target.parent.is_dir():
        raise UserError(f"OUT is {out}; expected a file in an existing folder; set OUT")
    with (
        _writing(out),
        tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary,
    ):
        folder = Path(temporary) / "encoder"
        checkpoint = export_from_run(run, folder, which, out)
        backbone, _ = load_exported(folder)
        facts = load_manifest(checkpoint)["facts"] | {
            "role": which,
            "step": load_manifest(checkpoint)["step"],
        }
        pixels = json.loads((folder / "config.json").read_bytes()).get("pixels", "uint8")
        return checkpoint, write_onnx(backbone, target, pixels=pixels, facts=facts)


def main(arguments: list[str]) -> int:
    """Runs the command line and returns its exit code."""
    options = parse(arguments)
    if options.format == "onnx":
        checkpoint, takes = export_onnx(options.run, options.out, options.which)
        print(f"exported the {options.which} of {checkpoint} to {options.out}: {takes}")
        return 0
    if options.out.suffix == ".onnx":
        raise UserError(
            f"OUT is {options.out}; expected the name of a folder; set --format onnx for one file"
        )
    checkpoint = export_from_run(options.run, options.out, options.which)
    print(f"exported the {options.which} of {checkpoint} to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
