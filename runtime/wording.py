"""The words of a configuration's errors: values, causes and options as one line shows them."""

from __future__ import annotations

import re
from typing import Any


def shown(value: Any) -> str:
    """Returns a value as messages show it: a line of bounded length."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def one_line(error: BaseException) -> str:
    """Returns an error's message without its line breaks."""
    return " ".join(str(error).split())


def name_in_place(message: str, prefix: str) -> str:
    """Returns a section's message with its options named where it stands.

    The rules of `prototypes` hold for `patch_prototypes` too, and name the options of the first.

    Args:
        message: begins with an option's key.
        prefix: of the section that was built, with its dot.
    """
    usual, own = message.partition(".")[0], prefix.partition(".")[0]
    return re.sub(rf"\b{re.escape(usual)}\.", f"{own}.", message) if own.endswith(f"_{usual}") else message
