"""What is wrong with a set of shards: each kind once, with its count and its first place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_LINES = 10


@dataclass
class Finding:
    """One kind of thing that is wrong with a shard.

    Attributes:
        shard: in which shard, split or file.
        sample: the first sample that has it; empty for the shard as a whole.
        message: what is wrong; the same words for the same kind.
        detail: of that first sample.
        count: how many samples of the shard have it.
    """

    shard: str
    sample: str
    message: str
    detail: str = ""
    count: int = 1

    def __str__(self) -> str:
        where = f"{self.shard}: {self.sample}" if self.sample else self.shard
        detail = f" ({self.detail})" if self.detail else ""
        more = f"; and {self.count - 1:,} more like it" if self.count > 1 else ""
        return f"{where}: {self.message}{detail}{more}"


def summarise(findings: Sequence[Finding], max_lines: int = MAX_LINES) -> list[str]:
    """Returns at most `max_lines` lines about any number of findings: one for each kind, the first ones of it named."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.message, []).append(finding)
    if len(findings) <= max_lines:
        return [str(finding) for finding in findings]
    lines = [_describe_kind(group) for group in kinds.values()]
    if len(lines) > max_lines:
        rest = list(kinds.values())[max_lines - 1 :]
        lines[max_lines - 1 :] = [
            f"and {count(finding for group in rest for finding in group):,} findings of {len(rest)} other kinds"
        ]
    return lines


def count(findings: Iterable[Finding]) -> int:
    """Returns how many things are wrong altogether."""
    return sum(finding.count for finding in findings)


def _describe_kind(group: Sequence[Finding]) -> str:
    if len(group) == 1:
        return str(group[0])
    first = group[0]
    text = str(Finding(first.shard, first.sample, first.message, first.detail))
    return f"{text}; and {count(group) - 1:,} more like it, in {len({finding.shard for finding in group}):,} shards"
