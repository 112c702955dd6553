"""Files of a working folder, sorted for the mirror: which are uploaded, how, and in which order."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from danling_core.runs.folder import LEASE, STATUS, TENSORBOARD
from danling_core.storage import Entry

STATE_FILE = "mirror.json"
STAGING = ".mirror"
_APPENDED = re.compile(r"(.*\.log|events\.jsonl)")


@dataclass(frozen=True)
class Layout:
    """The files of one scan, by kind. Paths are relative to the working folder.

    Args:
        records: commit records by their name (`<step>-<attempt>`).
        data: payload files by the name of their record.
        pointers: `latest.json` and the like, in the checkpoints' folder.
        appended: files that only grow; they go up in segments.
        events: TensorBoard's files, which are uploaded whole but seldom.
        small: everything else, replaced whole when it changes; `status.json` is not among them.
        status: the status, which goes up last.
    """

    records: dict[str, Entry] = field(default_factory=dict)
    data: dict[str, list[Entry]] = field(default_factory=dict)
    pointers: list[Entry] = field(default_factory=list)
    appended: list[Entry] = field(default_factory=list)
    events: list[Entry] = field(default_factory=list)
    small: list[Entry] = field(default_factory=list)
    status: Entry | None = None

    @classmethod
    def of(cls, entries: Iterable[Entry], checkpoints: str) -> Layout:
        """Sort the entries of a listing; `checkpoints` is the name of the checkpoints' folder."""
        found = cls()
        status = None
        for entry in entries:
            if entry.path == STATUS:
                status = entry
            elif not _stays_here(entry.path):
                found._add(entry, checkpoints)
        return cls(**{**vars(found), "status": status})

    def _add(self, entry: Entry, checkpoints: str) -> None:
        first, _, rest = entry.path.partition("/")
        if first == checkpoints and rest:
            self._add_checkpoint(entry, rest.split("/"))
        elif _APPENDED.fullmatch(entry.path):
            self.appended.append(entry)
        elif first == TENSORBOARD:
            self.events.append(entry)
        else:
            self.small.append(entry)

    def _add_checkpoint(self, entry: Entry, parts: list[str]) -> None:
        if len(parts) == 2 and parts[0] == "records" and parts[1].endswith(".json"):
            self.records[parts[1].removesuffix(".json")] = entry
        elif len(parts) >= 3 and parts[0] == "data":
            self.data.setdefault(parts[1], []).append(entry)
        elif len(parts) == 1 and parts[0].endswith(".json"):
            self.pointers.append(entry)


def _stays_here(path: str) -> bool:
    """Return files of this machine only: leases, the mirror's state, hidden and temporary files."""
    parts = path.split("/")
    is_hidden = any(part.startswith(".") or part.endswith(".tmp") for part in parts)
    return is_hidden or parts[0] in (STATE_FILE, LEASE)
