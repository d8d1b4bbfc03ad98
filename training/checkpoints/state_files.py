"""Training state as safetensors and JSON: no file of ours is a pickle.

A tree is nested dicts, lists and tuples of tensors, numpy arrays and plain values. Its tensors go to
NAME.safetensors, its structure to NAME.json. Loading restores types, key types (int keys of optimizer states)
and bits.
"""

from __future__ import annotations

import errno
import json
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.files import ordinary_mode
from training.checkpoints.files import CheckpointError

logger = logging.getLogger(__name__)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors as they are (dtype, bits) to one safetensors file. Not collective.

    Args:
        path: the file; its directory must exist.
        tensors: name to tensor on any device; views are copied, so tensors that share memory are written twice.

    Raises:
        OSError: the disk is full or not writable (safetensors' own error is translated).
    """
    whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with as_os_error(path.name), ordinary_mode(path):
        save_file(whole, str(path))


@contextmanager
def as_os_error(what: str) -> Iterator[None]:
    """Turns safetensors' own error of a failed write into the OSError that it hides."""
    try:
        yield
    except SafetensorError as error:
        system = re.search(r"code: (\d+)|os error (\d+)", str(error))
        number = int(next(filter(None, system.groups()))) if system else errno.EIO
        raise OSError(number, f"{what}: {error}") from error


def load_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Returns every tensor of a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def collect_share(stream: Iterable[tuple[str, Tensor]], rank: int, world_size: int) -> dict[str, Tensor]:
    """Returns CPU copies of this rank's share of a stream of full tensors that all ranks see alike.

    Each tensor goes to the rank that has the fewest bytes so far, so that ranks write about equally much and
    hold one tensor beyond their share. Collective if drawing from `stream` is (an engine's `iterate_state`).
    """
    share: dict[str, Tensor] = {}
    loads = [0] * world_size
    for name, tensor in stream:
        owner = loads.index(min(loads))
        loads[owner] += tensor.numel() * tensor.element_size()
        if owner == rank:
            share[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return share


def share_path(directory: Path, rank: int, world_size: int) -> Path:
    """Returns the file in which rank `rank` of `world_size` writes its share of the state."""
    return directory / f"state-{rank:05d}-of-{world_size:05d}.safetensors"


class ConsolidatedState(Mapping[str, Tensor]):
    """The state in a checkpoint, whoever wrote it: name to full tensor, read from the disk when asked for.

    World sizes need not match: every rank sees every name. Reading one name copies only that tensor.

    Raises:
        CheckpointError: the directory holds no state, or not all of its parts.
    """

    def __init__(self, directory: Path) -> None:
        paths = sorted(directory.glob("state-*-of-*.safetensors"))
        if not paths or paths != [share_path(directory, rank, len(paths)) for rank in range(len(paths))]:
            raise CheckpointError(
                f"{directory} holds {len(paths)} state files; expected as many as their names say"
            )
        try:
            self._files = [safe_open(str(path), framework="pt", device="cpu") for path in paths]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{directory} holds a state file that cannot be read: {error}") from error
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def save_tree(directory: Path, name: str, tree: Any) -> None:
    """Writes a tree to `name.json` and, if it holds tensors, `name.safetensors`. Not collective.

    Raises:
        TypeError: the tree holds something other than dict, list, tuple, tensor, array or plain value.
        OSError: the disk is full or not writable.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _encode(tree, "", tensors)
    if tensors:
        save_tensors(directory / f"{name}.safetensors", tensors)
    (directory / f"{name}.json").write_text(json.dumps(skeleton))


def load_tree(directory: Path, name: str) -> Any:
    """Returns the tree that `save_tree` wrote, tensors on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged, or the two do not belong together.
    """
    tensor_path = directory / f"{name}.safetensors"
    tensors = load_tensors(tensor_path) if tensor_path.exists() else {}
    try:
        return _decode(json.loads((directory / f"{name}.json").read_text()), tensors)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{directory / name}.json cannot be read: {error!r:.200}") from error


def collect_rng_state() -> dict[str, Any]:
    """Returns the states of Python's, numpy's, torch's CPU and this device's generators as a tree."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "numbers": list(numbers), "gauss": gauss},
        "numpy": {
            "kind": kind,
            "keys": np.asarray(keys),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch_cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # not is_available(): a run on the CPU leaves the GPUs alone
        state["torch_cuda"] = torch.cuda.get_rng_state()
    return state


def check_rng_state(state: Any) -> None:
    """Returns if `restore_rng_state` can set every generator; only fresh ones are touched.

    Raises:
        CheckpointError: a state is missing or malformed: resuming would not be exact.
    """
    _set_generators(
        state, random.Random().setstate, np.random.RandomState().set_state, torch.Generator().set_state
    )


def restore_rng_state(state: dict[str, Any]) -> None:
    """Sets every generator that `collect_rng_state` saved.

    Raises:
        CheckpointError: a state is missing or malformed. Not a CUDA state: a run that moves between CPU and GPU goes
            on, which the log says, with numbers that differ in rounding anyway.
    """
    _set_generators(state, random.setstate, np.random.set_state, torch.set_rng_state)
    if torch.cuda.is_initialized() and "torch_cuda" in state:
        torch.cuda.set_rng_state(state["torch_cuda"])
    elif torch.cuda.is_initialized() != ("torch_cuda" in state):
        here, there = ("a GPU", "a CPU") if torch.cuda.is_initialized() else ("a CPU", "a GPU")
        logger.warning(
            "the checkpoint was written on %s and goes on on %s: resuming is not exact", there, here
        )


def _set_generators(
    state: Any,
    set_python: Callable[[Any], object],
    set_numpy: Callable[[Any], object],
    set_torch: Callable[[Tensor], object],
) -> None:
    try:
        python, legacy = state["python"], state["numpy"]
        set_python((python["version"], tuple(python["numbers"]), python["gauss"]))
        set_numpy((legacy["kind"], legacy["keys"], legacy["position"], legacy["has_gauss"], legacy["cached"]))
        set_torch(state["torch_cpu"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"the checkpoint's random state is missing or malformed ({error!r:.80}); it cannot be resumed"
        ) from error


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Returns JSON for `value`; containers and tensors become one-key objects, plain values stay."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, np.ndarray):
        if value.dtype == np.uint32:  # safetensors' torch side cannot hold every unsigned type
            tensors[path] = torch.from_numpy(value.astype(np.int64))
        else:
            tensors[path] = torch.from_numpy(np.ascontiguousarray(value))
        return {"array": path, "dtype": str(value.dtype)}
    if isinstance(value, dict):
        items = [[key, _encode(item, f"{path}/{key}", tensors)] for key, item in value.items()]
        if any(not isinstance(key, str | int) or isinstance(key, bool) for key in value):
            raise TypeError(f"{path or 'state'} has keys that are neither str nor int")
        return {"dict": items}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return {type(value).__name__: items} if type(value) in (list, tuple) else {"tuple": items}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(
        f"{path or 'state'} is a {type(value).__name__}; checkpoints hold tensors and plain values"
    )


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, content),) = [(kind, content) for kind, content in node.items() if kind != "dtype"]
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy().astype(node["dtype"])
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
