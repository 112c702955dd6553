"""A wish, left beside a run's lease, that its owner saves and stops."""

from __future__ import annotations

from dataclasses import dataclass

from danling_core.errors import StorageError
from danling_core.storage import parse_json_object


@dataclass(frozen=True)
class StopRequest:
    """Somebody's wish that the owner of a run saves and stops.

    Args:
        by: who wants it, for people.
        session: stop everything that the owner has in work or would begin, as the other runs of a group.
    """

    by: str
    session: bool = False

    @classmethod
    def parse(cls, data: bytes, url: str) -> StopRequest:
        """Return the request in bytes that were read at `url`; where they are damaged, one of somebody's."""
        try:
            known = parse_json_object(data, url)
            return cls(str(known.get("by", "somebody")), known.get("session") is True)
        except StorageError:
            return cls("somebody")


def stop_name(generation: int) -> str:
    """Return the name of the file that asks the owner of this generation to stop."""
    return f"{generation:06d}.stop"
