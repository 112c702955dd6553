"""Standard output and error that outlive their reader: a closed pipe or a full disk only silences them."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO


class _Survivor:
    """A text stream that goes silent, for good, once it cannot be written to."""

    def __init__(self, inner: TextIO) -> None:
        self._inner = inner

    def write(self, text: str) -> int:
        self._try(lambda: self._inner.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._inner.flush)

    def _try(self, call: Any) -> None:
        try:
            call()
        except UnicodeEncodeError:  # a terminal whose encoding lacks a letter of a name
            raise
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(
                    null, self._inner.fileno()
                )  # for whoever else writes there, at the interpreter's exit too
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def survive_a_closed_console() -> None:
    """Let training go on where nobody reads what it prints any more. Call it once, when a process starts to train.

    Characters that the console's encoding lacks are printed as escapes.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, _Survivor):
            continue
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Survivor(stream))
