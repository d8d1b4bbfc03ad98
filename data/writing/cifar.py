"""CIFAR-10 and CIFAR-100 from their official archives, the Python or the binary version.

Krizhevsky 2009, "Learning multiple layers of features from tiny images": 50,000 + 10,000 colour images of 32 x 32.
The Python version is pickled. It is read by an unpickler that knows arrays of bytes and nothing else, so that no code
that a file names is ever run.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.shards import DataError
from data.writing.downloads import Archive, fetch_archive
from data.writing.sources import ArraySource

_SIDE = 32
_PIXEL_BYTES = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class CifarSet:
    """One of the two sets: where it is, and what its files are called.

    Attributes:
        url: of the Python version.
        md5: of that archive, as its makers publish it.
        files: names of the batches by split.
        meta: file of the class names in the Python version, and `text_meta` in the binary one.
        names_key: key of the class names in `meta`, and `labels_key` of the labels in a batch.
        label_bytes: label bytes before a record's pixels in the binary version; the last one is the class.
        num_classes: C.
    """

    url: str
    md5: str
    files: dict[str, tuple[str, ...]]
    meta: str
    text_meta: str
    names_key: bytes
    labels_key: bytes
    label_bytes: int
    num_classes: int


CIFAR_SETS = {
    "cifar10": CifarSet(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        files={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        meta="batches.meta",
        text_meta="batches.meta.txt",
        names_key=b"label_names",
        labels_key=b"labels",
        label_bytes=1,
        num_classes=10,
    ),
    "cifar100": CifarSet(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        files={"train": ("train",), "test": ("test",)},
        meta="meta",
        text_meta="fine_label_names.txt",
        names_key=b"fine_label_names",
        labels_key=b"fine_labels",
        label_bytes=2,
        num_classes=100,
    ),
}


def build_source(
    pixels: NDArray[np.uint8], labels: NDArray[np.int64], classes: tuple[str, ...], split: str
) -> ArraySource:
    """Returns images of rows [n, 3072], each three planes of 32 x 32 one after another."""
    return ArraySource(
        pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1),
        labels,
        classes=classes,
        split=split,
        fingerprint=f"cifar {split} {_hash_of(pixels)} {_hash_of(labels)}",
    )


def _hash_of(array: NDArray[Any]) -> str:
    """Returns a short hash of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def open_cifar(name: str, archive: str, cache_dir: str) -> dict[str, ArraySource]:
    """Returns the splits `train` and `test` of `cifar10` or `cifar100`.

    Args:
        name: of the set.
        archive: the official archive or its unpacked folder, Python or binary version; empty fetches the former.
        cache_dir: where the fetched archive is kept.

    Raises:
        DataError: the archive cannot be had, or is not of that layout.
    """
    layout = CIFAR_SETS[name]
    path = archive or str(fetch_archive(layout.url, layout.md5, cache_dir))
    try:
        files = Archive(path, layout.meta)
        binary = False
    except DataError:
        files = Archive(path, layout.text_meta)
        binary = True
    classes = _read_names(files, layout, binary)
    splits = {}
    for split, names in layout.files.items():
        parts = [_read_batch(files, f"{batch}.bin" if binary else batch, layout, binary) for batch in names]
        labels = np.concatenate([part[1] for part in parts])
        splits[split] = build_source(np.concatenate([part[0] for part in parts]), labels, classes, split)
    return splits


def _read_names(files: Archive, layout: CifarSet, binary: bool) -> tuple[str, ...]:
    if binary:
        names = tuple(files.read(layout.text_meta).decode().split())
    else:
        values = _unpickle(files.read(layout.meta), layout.meta)
        names = tuple(_text(name) for name in values.get(layout.names_key, ()))
    if len(names) != layout.num_classes:
        raise DataError(
            f"{files.path} names {len(names)} classes; expected {layout.num_classes}; fetch the archive again"
        )
    return names


def _read_batch(
    files: Archive, name: str, layout: CifarSet, binary: bool
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns pixels uint8 [n, 3072] and labels int64 [n] of one file."""
    try:
        content = files.read(name)
    except (KeyError, FileNotFoundError) as error:
        raise DataError(f"{files.path} lacks {name}; expected the whole archive; fetch it again") from error
    record = layout.label_bytes + _PIXEL_BYTES
    if binary and len(content) % record == 0:
        records = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
        pixels, labels = records[:, layout.label_bytes :], records[:, layout.label_bytes - 1].astype(np.int64)
    else:
        values = {} if binary else _unpickle(content, name)
        data, listed = values.get(b"data"), values.get(layout.labels_key)
        pixels = data.pixels if isinstance(data, _Array) else np.empty(0, dtype=np.uint8)
        whole = isinstance(listed, list) and all(type(label) is int for label in listed)
        labels = np.array(listed if whole else [-1], dtype=np.int64)
    if pixels.shape != (len(labels), _PIXEL_BYTES) or not len(labels):
        raise DataError(
            f"{name} of {files.path} is not of CIFAR's layout; expected records of {_PIXEL_BYTES} pixel bytes with "
            "their labels; fetch the archive again"
        )
    if labels.min() < 0 or labels.max() >= layout.num_classes:
        raise DataError(
            f"{name} of {files.path} holds the label {labels.max()}; expected 0 to {layout.num_classes - 1}; fetch the "
            "archive again"
        )
    return pixels, labels


def _unpickle(content: bytes, name: str) -> dict[Any, Any]:
    try:
        values = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a hostile or cut pickle raises whatever it likes
        raise DataError(
            f"{name} is no pickle of arrays, numbers and text ({' '.join(str(error).split())[:120]}); expected the "
            "official file; fetch the archive again"
        ) from error
    if not isinstance(values, dict):
        raise DataError(
            f"{name} holds a {type(values).__name__}; expected a dictionary; fetch the archive again"
        )
    return {key.encode() if isinstance(key, str) else key: value for key, value in values.items()}


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class _ArrayUnpickler(pickle.Unpickler):
    """Knows NumPy's way of pickling an array, by stand-ins; every other name is refused before anything is called."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns the stand-in for one of NumPy's three names."""
        known = {"_reconstruct": _Array.empty, "ndarray": _Array, "dtype": _Dtype}
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in known:
            return known[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Dtype:
    """Stands for a dtype; remembers its code."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = _text(code)

    def __setstate__(self, state: object) -> None:
        """Takes the byte order, which bytes have none of."""


class _Array:
    """Stands for an array of bytes."""

    pixels: NDArray[np.uint8]

    @classmethod
    def empty(cls, *_: object) -> _Array:
        """Returns an array to be filled by its state."""
        return cls()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Takes NumPy's (version, shape, dtype, in Fortran's order, bytes)."""
        _, shape, dtype, fortran, content = state
        if dtype.code != "u1" or fortran or not isinstance(content, bytes):
            raise pickle.UnpicklingError(f"an array of {dtype.code}, not of bytes in C's order")
        self.pixels = np.frombuffer(content, dtype=np.uint8).reshape(shape)
