"""Text on the terminal: what a run's files say is shown, and never obeyed."""

from __future__ import annotations

import re
from typing import TextIO

# Control characters (those that begin an escape sequence among them), and those that turn the direction of text.
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""Return text in which every character that a terminal would obey is written out, as `\u001b`."""
    return _ACTIVE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def say(text: object, file: TextIO | None = None) -> None:
    """Print a line of text that may come from a file of a run."""
    print(visible(str(text)), file=file)
