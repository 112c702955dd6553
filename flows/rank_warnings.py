"""Warnings of a run's ranks: said where the command was given, as soon as an event comes after them."""

from __future__ import annotations

import logging
import os
import re

from flows.cli_text import visible

logger = logging.getLogger("danling.flows")

_LINE = re.compile(r"\S+Z WARNING (?!interrupted: )(?P<text>.*)")  # how a run ended, its outcome says


class RankWarnings:
    """Passes on what the text log of a run warns of, from now on.

    Args:
        key: name and id of the run.
        path: its local text log, which need not exist yet.
    """

    def __init__(self, key: str, path: str) -> None:
        self._key = key
        self._path = path
        self._offset = os.path.getsize(path) if os.path.exists(path) else 0

    def pass_on(self) -> None:
        """Log the warnings that were added since the last call. A log that cannot be read has none."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                added = file.read()
        except OSError:
            return
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            if match := _LINE.match(line):
                logger.warning("%s: %s", self._key, visible(match["text"]))
