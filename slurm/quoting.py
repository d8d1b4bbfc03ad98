"""Text of ours inside other languages: words of a shell line and of an `#SBATCH` line.

sbatch splits a directive much as a shell does: quotes keep blanks and `#` together, and adjoining pieces are one word.
Two things differ: a backslash escapes inside single quotes too, and nothing continues on the next line.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from runtime.program import UserError

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def quote(word: str) -> str:
    """Returns one word for a line of bash.

    Raises:
        UserError: a control character, which would break the line.
    """
    if _CONTROL.search(word):
        raise UserError(f"{word!r} holds a control character; expected one line of text; change it")
    return shlex.quote(word)


def quote_all(words: Iterable[str]) -> str:
    """Returns several words for a line of bash."""
    return " ".join(quote(word) for word in words)


def directive(option: str) -> str:
    """Returns the `#SBATCH` line of one option such as `--job-name=a b`.

    Raises:
        UserError: a control character, or a backslash, which no quoting carries through every version of sbatch.
    """
    if "\\" in option:
        raise UserError(f"{option!r} holds a backslash; expected none in what sbatch reads; change it")
    return f"#SBATCH {quote(option)}"


def log_pattern(folder: Path, name: str) -> str:
    """Returns sbatch's file name pattern `folder/name`; per cent signs of the folder stay what they are."""
    return f"{str(folder).replace('%', '%%')}/{name}"
