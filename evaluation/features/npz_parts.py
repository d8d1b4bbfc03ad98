"""One `.npz` file out of parts that were written one by one: what was there when a job was killed is not done again.

Parts lie beside the file, in `FILE.npz.parts/`, each whole or absent and with a checksum. The file itself is put
together at the end, part after part, so that memory holds one part whatever the number of images.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.tensor_files import DamagedFileError, load_tensors, save_tensors
from runtime.files import fsync_directory, write_atomically
from runtime.program import UserError

_ABOUT_NAME = "about.json"
_TEXT = "text"  # the tensor of a part that holds its names and its bad images as JSON
_NAMES_AT_ONCE = 4096


@dataclass
class Part:
    """What one part of the images came to.

    Attributes:
        arrays: one row for each image that could be decoded, in order.
        names: of those.
        bad: name and reason of the others.
    """

    arrays: dict[str, Tensor] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)


class PartFiles:
    """The parts of one `.npz` file on the disk.

    Args:
        out: the file that they will become.
        num_parts: how many.
        about: plain facts that decide what the parts hold.
    """

    def __init__(self, out: Path, num_parts: int, about: Mapping[str, Any]) -> None:
        self.out = out
        self.directory = out.with_name(out.name + ".parts")
        self.num_parts = num_parts
        self._about = json.dumps(dict(about), sort_keys=True)

    def is_done(self) -> bool:
        """Returns whether the file is there already, made of the same.

        Raises:
            UserError: another file of this name is there.
        """
        if not self.out.exists():
            return False
        try:
            with np.load(self.out) as found:
                if str(found["about"]) == self._about:
                    return True
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            pass
        raise UserError(
            f"--out is {str(self.out)!r}, which exists and holds something else than this encoder's features of these "
            "images; expected a new name; set --out"
        )

    def open(self) -> None:
        """Makes the folder of parts, or finds that of an earlier start of the same command.

        Raises:
            UserError: it holds parts of something else, or cannot be written.
        """
        about = self.directory / _ABOUT_NAME
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            known = about.read_text() if about.is_file() else None
            if known is None and any(self.directory.iterdir()):
                known = ""
            if known is None:
                write_atomically(about, self._about)
        except OSError as error:
            raise unwritable(self.directory, error) from error
        if known not in (None, self._about):
            raise UserError(
                f"{self.directory} holds parts of another embedding{self._difference(known or '')}; expected the "
                "command that made them; set --out, or delete that folder"
            )

    def _difference(self, known: str) -> str:
        try:
            former, now = json.loads(known), json.loads(self._about)
            keys = [key for key in now if former.get(key) != now[key]]
            return f" ({', '.join(keys)} differ)" if keys else ""
        except (ValueError, AttributeError):
            return ""

    def missing(self) -> list[int]:
        """Returns the numbers of the parts that are not there whole."""
        return [number for number in range(self.num_parts) if not self._is_whole(number)]

    def _is_whole(self, number: int) -> bool:
        try:
            return self._path(number).is_file() and bool(load_tensors(self._path(number)))
        except DamagedFileError:
            return False

    def save(self, number: int, part: Part) -> None:
        """Writes a part.

        Raises:
            UserError: the disk does not take it.
        """
        text = json.dumps({"names": part.names, "bad": part.bad}).encode()
        tensors = {**part.arrays, _TEXT: torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        try:
            save_tensors(tensors, self._path(number), {"part": number})
        except OSError as error:
            raise unwritable(self.directory, error) from error

    def load(self, number: int) -> Part:
        """Returns a part.

        Raises:
            DamagedFileError: it is not what was written.
        """
        tensors, _ = load_tensors(self._path(number))
        text = json.loads(tensors.pop(_TEXT).numpy().tobytes())
        return Part(tensors, text["names"], [(name, reason) for name, reason in text["bad"]])

    def _path(self, number: int) -> Path:
        return self.directory / f"part-{number:06d}.safetensors"

    def assemble(self) -> tuple[dict[str, tuple[int, ...]], list[tuple[str, str]]]:
        """Writes the file and removes the parts; returns shapes by array, and the bad images.

        The file holds each array of the parts, `paths`, `bad_paths`, `bad_reasons` and `about` (JSON); `np.load` needs
        no pickle for it.

        Raises:
            UserError: no image could be decoded, or the disk does not take the file.
        """
        names: list[str] = []
        bad: list[tuple[str, str]] = []
        shapes: dict[str, tuple[int, ...]] = {}
        for number in range(self.num_parts):
            part = self.load(number)
            names += part.names
            bad += part.bad
            for name, tensor in part.arrays.items():
                shapes[name] = tuple(tensor.shape[1:])
        if not names:
            name, reason = bad[0]
            raise UserError(
                f"none of {len(bad)} images can be decoded as the encoder wants them; the first, {name}: {reason}; "
                "pass others, or see --channels and --pixels"
            )
        shapes = {name: (len(names), *shape) for name, shape in shapes.items()}
        temporary = self.out.with_name(f".{self.out.name}.{os.getpid()}.tmp")
        try:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                _write_texts(archive, "paths", names)
                for name, shape in shapes.items():
                    _write_member(archive, name, np.dtype("<f4"), shape, self._rows(name))
                _write_texts(archive, "bad_paths", [name for name, _ in bad])
                _write_texts(archive, "bad_reasons", [reason for _, reason in bad])
                text = np.array(self._about)
                _write_member(archive, "about", text.dtype, (), iter([text.tobytes()]))
            temporary.replace(self.out)
            fsync_directory(self.out.parent)
        except OSError as error:
            raise unwritable(self.out, error) from error
        finally:
            temporary.unlink(missing_ok=True)
        self._remove()
        return shapes, bad

    def _rows(self, name: str) -> Iterator[bytes]:
        for number in range(self.num_parts):
            tensor = self.load(number).arrays.get(name)
            if tensor is not None:
                yield tensor.numpy().astype("<f4", copy=False).tobytes()

    def _remove(self) -> None:
        """Removes what was written here and nothing else."""
        for number in range(self.num_parts):
            self._path(number).unlink(missing_ok=True)
        (self.directory / _ABOUT_NAME).unlink(missing_ok=True)
        if not any(self.directory.iterdir()):
            self.directory.rmdir()


def unwritable(path: Path, error: OSError) -> UserError:
    """Returns what to tell the user of a disk that does not take what is written; finished parts stay."""
    return UserError(
        f"{path} cannot be written ({error.strerror or error}); expected room on a disk that this user may write; "
        "finished parts stay: the same command goes on with them; set --out"
    )


def _write_member(
    archive: zipfile.ZipFile,
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    content: Iterator[bytes],
) -> None:
    """Writes one array of an `.npz`, of which only a piece at a time is in memory."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in content:
            file.write(piece)


def _write_texts(archive: zipfile.ZipFile, name: str, texts: list[str]) -> None:
    dtype = np.dtype(f"<U{max(map(len, texts), default=1)}")
    pieces = (
        np.array(texts[start : start + _NAMES_AT_ONCE], dtype=dtype).tobytes()
        for start in range(0, len(texts), _NAMES_AT_ONCE)
    )
    _write_member(archive, name, dtype, (len(texts),), pieces)
