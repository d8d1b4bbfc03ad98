"""Folders that a COMMIT closes: MANIFEST.json has every file's SHA-256, and COMMIT the manifest's own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from runtime.files import sha256_of

_MANIFEST, _COMMIT = "MANIFEST.json", "COMMIT"


def find_damage(folder: Path, part: str) -> str | None:
    """Returns what is wrong with the files in one folder of a committed one; None where every byte is as written."""
    try:
        manifest = (folder / _MANIFEST).read_bytes()
        if hashlib.sha256(manifest).hexdigest() != (folder / _COMMIT).read_text(errors="replace").strip():
            return f"{_MANIFEST} does not match {_COMMIT}"
        listed = {entry["path"]: entry["sha256"] for entry in json.loads(manifest)["files"]}
        for name in listed:
            if name.startswith(f"{part}/") and sha256_of(folder / name) != listed[name]:
                return f"{name} does not match its SHA-256"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} lists no files"
    return None


def is_committed(folder: Path) -> bool:
    """Returns whether a folder has both files that close it: of a copy without them nothing can be compared."""
    return (folder / _MANIFEST).is_file() and (folder / _COMMIT).is_file()
