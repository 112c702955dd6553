"""The status that counts where a former owner, paused before its last write, has overwritten that of a newer one."""

from __future__ import annotations

import logging
import re

from pydantic import ValidationError

from danling_core import storage
from danling_core.errors import DanLingError, StorageError
from danling_core.runs.folder import EVENTS, RunFolder, Status, read_log

logger = logging.getLogger("danling")

_GENERATION = re.compile(r"(\d{6,})\.json")


def last_word(folder: RunFolder, status: Status | None) -> Status | None:
    """Return the status, or the end that a newer owner has told in the event log.

    The right to write is checked before each write, and a process may be paused between the two for as long as it
    takes another one to complete the run. No store undoes that one write; the next start of the run does. For lists
    and tables: whoever opens a run goes by the file.

    Args:
        folder: of the run.
        status: as its file says.
    """
    if status is None or status.is_complete:
        return status
    try:
        names = storage.list_names(folder.lease_url)
        newest = max((int(match[1]) for name in names if (match := _GENERATION.fullmatch(name))), default=0)
        if newest <= _generation(status.attempt):
            return status
        return _completed(folder, _generation(status.attempt)) or status
    except DanLingError as error:
        logger.debug("the status of %s is taken as it is: %s", folder.url, error)
        return status


def _completed(folder: RunFolder, after: int) -> Status | None:
    """Return the end told by an owner of a later generation than `after`."""
    for line in reversed(read_log(folder, EVENTS).splitlines()):
        if b'"completed"' not in line:
            continue
        try:
            event = storage.parse_json_object(line, EVENTS)
            if event["event"] == "completed" and _generation(event["attempt"]) > after:
                return Status.model_validate(event["status"])
        except (StorageError, TypeError, KeyError, AttributeError, ValidationError):
            continue
    return None


def _generation(attempt: str) -> int:
    number = attempt.partition(".")[0]
    return int(number) if number.isdigit() else 0
