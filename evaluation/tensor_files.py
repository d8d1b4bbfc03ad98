"""Tensors on the disk that are whole or known to be damaged: a checksum inside, a name of one's own while writing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import uint8 as torch_uint8

from runtime.files import ordinary_mode


class DamagedFileError(ValueError):
    """A tensor file that is cut, changed or not ours; the message is one line."""


def checksum(tensors: dict[str, Tensor]) -> str:
    """Returns the SHA-256 over every tensor: name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch_uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(tensors: dict[str, Tensor], path: Path, about: dict[str, Any]) -> str:
    """Writes tensors, a word about them and their checksum, which is returned; a reader sees the whole file or none.

    Two processes that write the same path do not meet: each has a temporary name of its own, and the last rename wins.

    Raises:
        OSError: the disk is full or not writable; it names `path`, and the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    digest = checksum(tensors)
    try:
        with ordinary_mode(temporary):
            save_file(tensors, temporary, metadata={"about": json.dumps(about), "sha256": digest})
        temporary.replace(path)
    except SafetensorError as error:
        system = re.search(r"code: (\d+)|os error (\d+)", str(error))
        number = int(system[1] or system[2]) if system else errno.EIO
        said = os.strerror(number) if system else " ".join(str(error).split())[:200]
        raise OSError(number, said, str(path)) from error
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def load_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Returns the tensors of a file of `save_tensors` and their checksum.

    Raises:
        DamagedFileError: the file is cut, no tensor file, without checksum, or its content is not what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stated = (file.metadata() or {}).get("sha256")
            # Copies: the originals are the file's own pages, and a file that is cut later would end this process.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{path} cannot be read ({' '.join(str(error).split())[:200]})") from error
    if stated != checksum(tensors):
        raise DamagedFileError(f"{path} does not hold what was written: its checksum differs")
    return tensors, stated


def read_exported(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file in an exported folder.

    Raises:
        DamagedFileError: the file is cut, or no tensor file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise DamagedFileError(
            f"{path} cannot be read as safetensors ({said}); expected what was exported; export the encoder again"
        ) from error
