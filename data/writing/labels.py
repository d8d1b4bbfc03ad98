"""Labels of samples: class indices or class names, told apart and validated before they size anything."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.members import label_member
from data.shards import DataError

# More than any published set has; a label beyond is a mistake (an image id, a hash), and would size every table.
MAX_CLASSES = 1_000_000
CLASS_FILES = ("classes.txt", "classnames.txt")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # several labels in several lines, or a number in binary
_NUM_SHOWN = 16
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}(\.0*)?")

Label = int | str | None


class LabelError(DataError):
    """A label that is neither a class index nor a name; the message is one line.

    Attributes:
        shown: the label, shortened.
        rule: what was expected of it.
    """

    def __init__(self, key: str, shown: str, rule: str) -> None:
        self.shown, self.rule = shown[:80], rule
        super().__init__(f"the label of {key} is {self.shown}; expected {rule}; write the shards again")


def read_label(key: str, members: Mapping[str, bytes]) -> Label:
    """Returns a sample's class index or class name from its `.cls`, else `label` or `class_id` in its `.json`.

    None without either. Whole numbers are indices, however they are written (`1`, `"1"`, `1.0`).

    Raises:
        LabelError: there is a label, and it is neither; or the `.json` is none.
    """
    suffix = label_member(key, members)
    if suffix:
        try:
            return parse_label(key, members[suffix].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise LabelError(key, repr(members[suffix][:_NUM_SHOWN]), "UTF-8 text") from error
    if "json" not in members:
        return None
    try:
        values = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise LabelError(key, "in a .json that is no JSON", "a JSON object") from error
    value = values.get("label", values.get("class_id")) if isinstance(values, dict) else None
    return None if value is None else parse_label(key, value)


def parse_label(key: str, value: object) -> int | str:
    """Returns a label's class index or class name.

    Raises:
        LabelError: it is neither.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise LabelError(key, repr(value), "a class index or a class name")
    text = str(value).strip()
    if not text:
        raise LabelError(key, "empty", "a class index or a class name")
    if _CONTROL.search(text):
        raise LabelError(key, repr(text), "one class index or one class name, in one line of text")
    if isinstance(value, str) and not _INTEGER.fullmatch(text) and not re.fullmatch(r"[+-]?[0-9]+", text):
        return text
    if not _INTEGER.fullmatch(text) or not 0 <= int(text.split(".")[0]) < MAX_CLASSES:
        raise LabelError(key, text, f"a class index from 0 to {MAX_CLASSES - 1:,}, or no label")
    return int(text.split(".")[0])


def number_classes(classes: Sequence[str]) -> dict[str, int]:
    """Returns the index of every class name."""
    return {name: number for number, name in enumerate(classes)}


def number_label(key: str, label: Label, numbers: Mapping[str, int]) -> int:
    """Returns a label's class index; -1 without label.

    Args:
        key: of the sample.
        label: from `read_label`.
        numbers: from `number_classes`; empty where the manifest knows no classes.

    Raises:
        LabelError: a class that the manifest does not list.
    """
    if label is None:
        return -1
    number = numbers.get(label, -1) if isinstance(label, str) else label
    if number < 0 or (numbers and number >= len(numbers)):
        raise LabelError(key, repr(label), f"one of the {len(numbers)} classes of the manifest")
    return number


def read_class_names(directory: str) -> tuple[str, tuple[str, ...]]:
    """Returns the path and the class names of a folder's file of classes, one a line; ("", ()) without one.

    Raises:
        DataError: the file names a class twice, or is no text.
    """
    for name in CLASS_FILES:
        path = Path(directory) / name
        if not path.is_file():
            continue
        classes = tuple(filter(None, (line.strip() for line in read_text(str(path)).splitlines())))
        if len(set(classes)) != len(classes):
            twice = next(name for name in classes if classes.count(name) > 1)
            raise DataError(
                f"{path} names the class {twice!r} twice; expected each once, in index order; mend it"
            )
        return str(path), classes
    return "", ()


def read_text(path: str) -> str:
    """Returns a text file's content without a byte-order mark.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); expected UTF-8 text; save "
            "it as UTF-8"
        ) from error
