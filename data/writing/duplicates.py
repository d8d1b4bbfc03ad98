"""Images whose bytes occur twice: which are left out, and what to do when two classes claim the same image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from data.shards import DataError

LabelConflicts = Literal["error", "first", "drop"]
DUPLICATE = "duplicate"
CONFLICT_KINDS = {
    "first": "of two classes, the first is kept",
    "drop": "of two classes, all are left out",
}


@dataclass(frozen=True)
class Content:
    """An image of a source: its number, the hash of its bytes, its class index or -1."""

    index: int
    digest: str
    label: int


def find_duplicates(
    contents: Iterable[Content],
    policy: LabelConflicts,
    name: Callable[[int], str],
    class_name: Callable[[int], str],
) -> dict[int, tuple[str, str]]:
    """Returns (kind, detail) of the images to leave out, by their number: all but the first of equal bytes.

    Args:
        contents: in any order.
        policy: when equal bytes have different labels: refuse, keep the first, or leave out all of them.
        name: of an image in the source.
        class_name: of a class index.

    Raises:
        DataError: an image occurs under two classes and the policy is `error`.
    """
    by_digest: dict[str, list[Content]] = defaultdict(list)
    for content in sorted(contents, key=lambda content: content.index):
        by_digest[content.digest].append(content)
    left_out: dict[int, tuple[str, str]] = {}
    conflicts = []
    for group in by_digest.values():
        first, *others = group
        kind = DUPLICATE
        if len({content.label for content in group}) > 1:
            conflicts.append((first, next(other for other in others if other.label != first.label)))
            kind = CONFLICT_KINDS.get(policy, "")
        detail = f"same bytes as {name(first.index)}"
        left_out.update({other.index: (kind, detail) for other in others})
        if kind == CONFLICT_KINDS["drop"]:
            left_out[first.index] = (kind, f"same bytes as {name(others[0].index)}")
    if conflicts and policy == "error":
        first, other = conflicts[0]
        raise DataError(
            f"{len(conflicts)} images occur under two classes, the first: {name(first.index)} "
            f"({class_name(first.label)}) and {name(other.index)} ({class_name(other.label)}); expected one class an "
            "image; mend the input, or pass --label-conflicts first (keep the first) or drop (leave all out)"
        )
    return left_out
