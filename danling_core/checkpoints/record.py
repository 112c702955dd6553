"""The commit record: the small JSON file whose presence means that a checkpoint exists."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import xxhash
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from danling_core.errors import CheckpointCorrupt, CheckpointError, StorageError
from danling_core.storage.documents import parse_json_object
from danling_core.storage.json_safe import NON_FINITE, to_json_safe

VERSION = 1
_SIMPLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")


@dataclass(frozen=True)
class DataFile:
    """One payload file: its name inside the data folder, its size in bytes, its xxh3_128 in hex."""

    name: str
    size: int
    xxh3: str


@dataclass(frozen=True)
class Record:
    """One committed checkpoint.

    Attributes:
        name: `<step>-<attempt>`, unique in its store: the stem of the record file and the name of the data
            folder.
        step: optimizer updates completed when the state was taken.
        attempt: who wrote it, `<generation>.<restart>`.
        sequence: 1 for the first commit of a store, rising by one: the order of commits, whatever the clocks
            say.
        names: the pointers (`latest`, `best`, `epoch-3`) that moved to this record by the same commit.
        files: the payload.
        created_at: ISO 8601, UTC.
        info: plain JSON given by the writer: `progress`, `score`, `world_size`, `run_id` and what else it
            likes. A number that is not finite is kept as text ("NaN").
    """

    name: str
    step: int
    attempt: str
    sequence: int
    names: tuple[str, ...]
    files: tuple[DataFile, ...]
    created_at: str
    info: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @property
    def progress(self) -> dict[str, Any]:
        """Return the counters of completed work, as the writer gave them."""
        return dict(self.info.get("progress") or {})

    @property
    def score(self) -> float | None:
        """Return the score of the latest result when the state was taken; None where there was none."""
        score = self.info.get("score")
        return NON_FINITE[score] if isinstance(score, str) else score

    @property
    def world_size(self) -> int | None:
        return self.info.get("world_size")

    @property
    def size(self) -> int:
        """Return bytes of the whole payload."""
        return sum(file.size for file in self.files)

    def to_bytes(self) -> bytes:
        """Return the record file: readable JSON with the checksum of the rest inside."""
        try:
            body = to_json_safe(asdict(self))
        except TypeError as error:
            raise CheckpointError(
                f"checkpoint {self.name}: its record holds plain JSON only: {error}"
            ) from error
        return (json.dumps(body | {"checksum": _checksum(body)}, indent=1, allow_nan=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Record:
        """Parse the record file called `name`.json.

        Raises:
            CheckpointCorrupt: it is not whole, not what was written, or names something outside its folder.
            CheckpointError: a newer version of danling wrote it.
        """
        try:
            body = parse_json_object(data, f"{name}.json")
            claimed = body.pop("checksum")
        except (StorageError, KeyError) as error:
            raise CheckpointCorrupt(f"record {name!r} is not a whole commit record: {error}") from error
        if claimed != _checksum(body):
            raise CheckpointCorrupt(
                f"record {name!r} does not match its own checksum: it was altered or damaged"
            )
        if body.get("version") != VERSION:
            raise CheckpointError(
                f"record {name!r} has version {body.get('version')!r}, this danling reads {VERSION}: update"
            )
        try:
            return _RECORD.validate_python(body)._checked(name)
        except ValidationError as error:
            found = error.errors()[0]
            where = ".".join(map(str, found["loc"]))
            raise CheckpointCorrupt(
                f"record {name!r} has not the fields of a commit record: {where}: {found['msg']}"
            ) from error

    def _checked(self, name: str) -> Record:
        if self.name != name:
            raise CheckpointCorrupt(f"record {name!r} calls itself {self.name!r}: it was renamed or copied")
        try:
            for text in (self.name, *self.names, *(file.name for file in self.files)):
                check_name(text)
            datetime.fromisoformat(self.created_at)
            _INFO.validate_python(self.info)
        except (CheckpointError, ValueError) as error:
            raise CheckpointCorrupt(f"record {name!r}: {error}") from error
        return self


class _Info(TypedDict, total=False):
    """Parts of `Record.info` that this package reads itself."""

    progress: dict[str, int | float] | None
    score: float | str | None
    world_size: int | None


_RECORD, _INFO = TypeAdapter(Record), TypeAdapter(_Info)


def check_name(name: object) -> str:
    """Return `name` itself if it is one plain file name, so that no path built from it can leave its folder.

    Raises:
        CheckpointError: it has a separator, `..`, a leading dot, or is not text.
    """
    if not isinstance(name, str) or not is_simple_name(name):
        raise CheckpointError(
            f"{name!r} is not a name for a checkpoint or its files: wanted letters, digits and '.-_+', a "
            "letter or digit first, without '..' or separators"
        )
    return name


def is_simple_name(name: str) -> bool:
    """Return whether `check_name` accepts it."""
    return _SIMPLE_NAME.fullmatch(name) is not None and ".." not in name


def record_name(step: int, attempt: str) -> str:
    """Return `<step>-<attempt>` with the step in ten digits, so that a plain listing is in order of steps."""
    if step < 0:
        raise CheckpointError(f"a checkpoint's step is the number of completed updates, found {step}")
    return check_name(f"{step:010d}-{attempt}")


def pointer_to_bytes(name: str, record: Record, as_of: int) -> bytes:
    """Return the pointer file `name`.json: the record it means, and the newest sequence of when it was set."""
    body = {"pointer": name, "record": record.name, "as_of": as_of}
    return (json.dumps(body | {"checksum": _checksum(body)}) + "\n").encode()


def pointer_from_bytes(data: bytes, name: str) -> tuple[str, int]:
    """Return the record that the pointer file `name`.json names, and its `as_of`; CheckpointCorrupt if damaged."""
    try:
        body = parse_json_object(data, f"{name}.json")
        claimed = body.pop("checksum", None)  # older versions wrote neither this nor the pointer's name
        if claimed not in (None, _checksum(body)) or not body.keys() <= {"pointer", "record", "as_of"}:
            raise CheckpointError("it does not match its own checksum")
        if body.get("pointer", name) != name:
            raise CheckpointError(f"it is a copy of that of {body['pointer']!r}")
        return check_name(body["record"]), int(body["as_of"])
    except (ValueError, KeyError, TypeError, CheckpointError, StorageError) as error:
        raise CheckpointCorrupt(f"pointer {name!r} is damaged: {error}") from error


def _checksum(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(canonical.encode())
