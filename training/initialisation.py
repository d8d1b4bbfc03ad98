"""Where a new run starts: released weights, or another run's teacher, head and prototypes; and what crops it may take.

Used by the build and by the dry run alike, which tries all of it on a network without numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.config import INIT_KINDS, ModelConfig, parse_weights_spec
from models.released_weights import LoadedWeights, initialise_from
from models.vit import ImageSizeError, build_backbone, measure_embed_dim
from prototypes.estimator import PrototypeEstimator
from runtime.distributed import Process
from training.checkpoints.files import MANIFEST_NAME, list_committed
from training.checkpoints.state_files import ConsolidatedState, load_tree
from training.checkpoints.store import find_problems
from training.config import PretrainConfig
from training.engines.interface import TrainedNetwork

logger = logging.getLogger(__name__)

_SHOWN = 5


def check_crop_sizes(config: PretrainConfig) -> None:
    """Tries the network on every crop size, without numbers. Not collective.

    Raises:
        ValueError: the network cannot take one of them, cannot be built, or gives no embedding.
    """
    data = config.data
    sizes = {"data.global_crop_size": data.global_size}
    if data.num_local_crops:
        sizes["data.local_crop_size"] = data.local_size
    for option, size in sizes.items():
        try:
            measure_embed_dim(config.model, size)
        except ImageSizeError as error:
            raise ValueError(
                f"{option} is {_shown(size)}, which {config.model.name} cannot take ({error}); "
                f"{_advise_on_size(config.model, option, size)}"
            ) from error


def _shown(size: tuple[int, int]) -> str:
    return str(size[0] if size[0] == size[1] else list(size))


def _advise_on_size(model: ModelConfig, option: str, size: tuple[int, int]) -> str:
    with torch.device("meta"):
        backbone = build_backbone(model, drop_path_rate=0.0)
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, tuple) else patch
    also = " and model.image_size" if option == "data.global_crop_size" else ""
    if isinstance(side, int) and any(length % side for length in size):
        height, width = (max(1, round(length / side)) * side for length in size)
        near = _shown((height, width))
        return f"expected a multiple of its patch size {side}, such as {near}; set {option}{also}"
    if also:
        own = backbone.pretrained_cfg["input_size"][-1]  # type: ignore[index]
        return f"expected a size that it is made for, such as {own}; set {option}{also}"
    return (
        "expected a network that takes crops of several sizes, or no local crops; set model.name or "
        "data.num_local_crops=0"
    )


def find_source_checkpoint(model: ModelConfig, process: Process) -> Path | None:
    """Returns the newest whole checkpoint of the run that `model.init` names, or None where it names no run.

    Collective. Only reads: nothing is marked in the other run's directory.

    Raises:
        ValueError: the run has no whole checkpoint, or `model.init_head` is set and there is no run.
    """
    candidates: list[Path] | None = process.broadcast_object(
        _list_checkpoints(model.init) if process.is_main else None
    )
    if candidates is None:
        if model.init_head:
            raise ValueError(
                f"model.init_head is True, but model.init {model.init!r} is no run; expected a run directory or one "
                "of its checkpoints; set model.init or model.init_head=false"
            )
        return None
    for candidate in candidates:
        problems = find_problems(candidate, process)
        if not problems:
            return candidate
        if process.is_main:
            logger.warning("model.init: passing over checkpoint %s: %s", candidate, "; ".join(problems))
    raise ValueError(
        f"model.init is {model.init!r}, where none of {len(candidates)} checkpoints is whole; expected a run that "
        "has saved one; set model.init"
    )


def _list_checkpoints(source: str) -> list[Path] | None:
    spec = parse_weights_spec(source, "model.init", INIT_KINDS)
    if spec.kind != "folder":
        return None
    path = spec.path
    if path.name.startswith("step-") and (path / MANIFEST_NAME).is_file():
        return [path]
    if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        return list_committed(path / "checkpoints")
    return None


def initialise_network(model: ModelConfig, checkpoint: Path | None, student: TrainedNetwork) -> None:
    """Writes the start that `model.init` names into the student, in place, and says what was done. Not collective.

    Args:
        model: `init` and `init_head`.
        checkpoint: from `find_source_checkpoint`: the run's teacher is taken, with `init_head` also its projection
            head and, where the encoder's loss trains them, its prototypes.
        student: on any device; on the meta device everything is tried and nothing written.

    Raises:
        ValueError: something does not fit; one line.
    """
    if model.init == "random":
        return
    source = model.init if checkpoint is None else str(checkpoint / "teacher")
    _report(source, initialise_from(student.network.backbone, source))
    if checkpoint is None or not model.init_head:
        return
    state = ConsolidatedState(checkpoint)
    parts = {
        "network.projection_head": student.network.projection_head,
        "network.patch_head": student.network.patch_head,
        "learned_prototypes": student.learned_prototypes,
        "learned_patch_prototypes": student.learned_patch_prototypes,
    }
    for name, part in parts.items():
        if part is not None:
            what = name.removeprefix("network.").replace("_", " ")
            _copy_part(part, state, f"teacher/{name}.", what)
    logger.info("initialised from %s: projection head and prototypes as well", checkpoint)


def initialise_estimator(
    model: ModelConfig, checkpoint: Path | None, estimator: PrototypeEstimator, place: str = "estimator"
) -> None:
    """Takes over a run's prototypes where `model.init_head` asks for them, in place. Not collective.

    The whole state goes over, as in a resume: of a mixture means, variances, weights, counts, the moments of its
    inputs, its beta and its own step, so that it goes on and does not start from features again.

    Args:
        model: `init_head`.
        checkpoint: from `find_source_checkpoint`.
        estimator: changed.
        place: the name that the checkpoint knows it by.

    Raises:
        ValueError: the run has other prototypes.
    """
    if checkpoint is None or not model.init_head:
        return
    if not (checkpoint / f"{place}.json").exists():
        raise ValueError(
            f"model.init_head is True, but {checkpoint} holds no {place}; expected a run with the same terms of the "
            "objective; set model.init_head=false"
        )
    state = load_tree(checkpoint, place)
    extra = state.get("_extra_state", {})
    if extra.get("is_initialised"):
        # Means that are known are not collected once more, whatever `gmm.init` says of a start without them.
        extra |= dict.fromkeys(("num_seen", "num_placed"), estimator.num_prototypes)
    try:
        estimator.load_state_dict(state)
    except ValueError as error:
        raise ValueError(
            f"model.init_head is True, but {str(error).partition(';')[0]} ({checkpoint}); expected the prototypes "
            "of this configuration; set prototypes or model.init_head=false"
        ) from error


def _copy_part(module: nn.Module, state: Mapping[str, Tensor], prefix: str, what: str) -> None:
    own = module.state_dict()
    given = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
    for name in sorted(set(own) | set(given)):
        shapes = [tuple(t[name].shape) if name in t else None for t in (given, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"model.init_head is True, but the run's tensors of the {what} do not fit: {name} is "
                f"{shapes[0] or 'missing'}, expected {shapes[1] or 'none'}; set model.head or prototypes as "
                "the run has them, or model.init_head=false"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])


def _report(source: str, weights: LoadedWeights) -> None:
    """Says what was loaded and changed, and names the first of what did not find its like."""
    counts = {"loaded": weights.loaded, "missing": weights.missing, "unexpected": weights.unexpected}
    logger.info(
        "initialised from %s: %s", source, ", ".join(f"{len(keys)} {kind}" for kind, keys in counts.items())
    )
    for sentence in weights.adapted:
        logger.info("initialised from %s: %s", source, sentence)
    for kind in ("missing", "unexpected"):
        keys = counts[kind]
        if keys:
            shown = ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
            logger.warning("initialised from %s: %d %s keys: %s", source, len(keys), kind, shown)
