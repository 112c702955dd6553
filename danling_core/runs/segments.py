"""The names of an append-only file's segments on an object store, and which of them count."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from danling_core import storage

_SEGMENT = re.compile(
    r"(?P<stem>.+)/(?P<number>\d{6})(?:-(?P<generation>\d{6,}))?\.(?P<suffix>log|jsonl)", re.DOTALL
)


class Segment(NamedTuple):
    """A part of a growing file.

    Args:
        path: in the run folder.
        number: 1 for the first.
        generation: of the lease of whoever wrote it.
        size: in bytes.
    """

    path: str
    number: int
    generation: int
    size: int


def segments_url(folder_url: str, name: str) -> str:
    """Return the URL of an append-only file's segments: `events/` for `events.jsonl`."""
    return storage.join(folder_url, name.rpartition(".")[0] or f"{name}.segments")


def segment_name(name: str, number: int, generation: int = 1) -> str:
    """Return `000001.jsonl` for segment 1 of `events.jsonl`; `000001-000002.jsonl` where the second owner wrote it."""
    writer = f"-{generation:06d}" if generation > 1 else ""
    return f"{number:06d}{writer}.{name.rpartition('.')[2]}"


def is_segment(path: str) -> bool:
    """Return whether a remote path is a segment of a growing file."""
    return bool(_SEGMENT.fullmatch(path))


def segments_by_file(remote_sizes: Mapping[str, int]) -> dict[str, list[Segment]]:
    """Return the segments that count, in order, by the name of their growing file, out of a remote listing."""
    found: dict[str, list[Segment]] = {}
    for path, size in remote_sizes.items():
        if match := _SEGMENT.fullmatch(path):
            segment = Segment(path, int(match["number"]), int(match["generation"] or 1), size)
            found.setdefault(f"{match['stem']}.{match['suffix']}", []).append(segment)
    return {name: _that_count(segments) for name, segments in found.items()}


def _that_count(segments: Iterable[Segment]) -> list[Segment]:
    """Keep the newest owner's segment of each number. An older owner's after a newer one's is void."""
    newest = {segment.number: segment for segment in sorted(segments, key=lambda each: each.generation)}
    counted: list[Segment] = []
    for _, segment in sorted(newest.items()):
        if counted and segment.generation < counted[-1].generation:
            break
        counted.append(segment)
    return counted
