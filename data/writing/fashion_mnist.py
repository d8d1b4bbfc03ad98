"""Fashion-MNIST, 60,000 + 10,000 grey 28 x 28 images: found, fetched without root, checked.

Xiao, Rasul & Vollgraf 2017, "Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms".
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path

import numpy as np

from data.shards import DataError
from data.writing.sources import ArraySource

logger = logging.getLogger(__name__)

CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SPLITS = {"train": "train", "test": "t10k"}
_PACKAGE = "dataset-fashion-mnist"
_INSTALLED = "usr/share/datasets/fashion-mnist"
_UPSTREAM = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_TIMEOUT_S = 120
# Of the compressed files, which are the same in the Debian package and upstream.
_SHA256 = {
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
}
_IMAGE_HEADER_BYTES, _LABEL_HEADER_BYTES = 16, 8


def fetch(cache_dir: str, *, installed_root: str = "/") -> Path:
    """Returns a folder that holds the four archives, whole and of the right SHA-256.

    Looks in turn at `cache_dir`, at the installed Debian package, at the package fetched and unpacked without root,
    and at the upstream archives. Files enter `cache_dir` by a rename after their hash was checked, so an interrupted
    fetch leaves nothing that a later run would use.

    Args:
        cache_dir: where fetched files are kept.
        installed_root: root of the file system in which the installed package is looked for.

    Raises:
        DataError: none of the ways worked; names the three remedies.
    """
    cache = Path(cache_dir)
    if _is_complete(cache):
        return cache
    installed = Path(installed_root) / _INSTALLED
    if _is_complete(installed):
        return installed
    reasons = []
    for fetch_into in (_fetch_package, _fetch_upstream):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
            try:
                folder = fetch_into(Path(scratch))
                _require_complete(folder)
            except (OSError, subprocess.SubprocessError, DataError) as error:
                reasons.append(" ".join(str(error).split())[:160])
                logger.info("%s: %s", fetch_into.__name__, error)
                continue
            for name in _SHA256:
                (folder / name).replace(cache / name)
            return cache
    raise DataError(
        f"Fashion-MNIST cannot be fetched ({' | '.join(reasons)}); install the Debian package {_PACKAGE}, or give this "
        f"machine a network on which apt-get download {_PACKAGE} or {_UPSTREAM} works, or copy the four "
        f"*-ubyte.gz files into {cache_dir}"
    )


def open_fashion_mnist(folder: Path, split: str) -> ArraySource:
    """Returns the images of the split `train` or `test`; `folder` is what `fetch` returned."""
    names = [f"{SPLITS[split]}-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1")]
    pixels, labels = (gzip.decompress((folder / name).read_bytes()) for name in names)
    return ArraySource(
        np.frombuffer(pixels, np.uint8, offset=_IMAGE_HEADER_BYTES).reshape(-1, 28, 28),
        np.frombuffer(labels, np.uint8, offset=_LABEL_HEADER_BYTES),
        classes=CLASSES,
        split=split,
        fingerprint=_SHA256[names[0]],
    )


def _fetch_package(scratch: Path) -> Path:
    scratch = scratch.resolve()  # the tools run inside it
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise DataError(f"{tool} is not installed")
    _run(["apt-get", "download", _PACKAGE], scratch)
    packages = sorted(scratch.glob(f"{_PACKAGE}_*.deb"))
    if not packages:
        raise DataError(f"apt-get download {_PACKAGE} left no package")
    _run(["dpkg", "-x", str(packages[0]), str(scratch / "unpacked")], scratch)
    return scratch / "unpacked" / _INSTALLED


def _fetch_upstream(scratch: Path) -> Path:
    for name in _SHA256:
        with urllib.request.urlopen(f"{_UPSTREAM}/{name}", timeout=_TIMEOUT_S) as answer:
            (scratch / name).write_bytes(answer.read())
    return scratch


def _run(command: list[str], directory: Path) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise DataError(f"{' '.join(command[:2])} failed: {said[-1] if said else done.returncode}")


def _is_complete(folder: Path) -> bool:
    try:
        _require_complete(folder)
    except (DataError, OSError):
        return False
    return True


def _require_complete(folder: Path) -> None:
    for name, expected in _SHA256.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise DataError(f"{name} has SHA-256 {found[:12]}..., expected {expected[:12]}...")
