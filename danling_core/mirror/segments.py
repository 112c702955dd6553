"""A growing local file as numbered segments in a store that cannot append."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

from .. import storage
from ..run_folder import segment_name, segments_url

SEGMENT_BYTES = 1 << 20
_SEGMENT = re.compile(r"(?P<stem>.+)/(?P<number>\d{6})\.(?P<suffix>log|jsonl)")


def is_segment(path: str) -> bool:
    """Whether a remote path is a segment of a growing file."""
    return bool(_SEGMENT.fullmatch(path))


def sizes_by_file(remote_sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Sizes of the segments, in order, by the name of their growing file, out of a remote listing."""
    found: dict[str, list[int]] = {}
    for path in sorted(remote_sizes):
        if match := _SEGMENT.fullmatch(path):
            found.setdefault(f"{match['stem']}.{match['suffix']}", []).append(remote_sizes[path])
    return found


class SegmentedFile:
    """Carries one growing file to `<stem>/000001.<suffix>`, `000002`, ...

    A segment holds whole lines. Once it is half full it is never touched again; the last one is replaced
    whole as the file grows. So the segments are at every moment a prefix of the file, in few objects.

    Args:
        local: the growing file.
        folder_url: the remote run folder.
        name: path of the file in the run folder.
        sizes: of the segments that are remote already.
        guard: called before every write; raises if this process may not write.
        segment_bytes: the most that a segment holds, and that is kept in memory.
    """

    def __init__(
        self,
        local: str,
        folder_url: str,
        name: str,
        sizes: Sequence[int],
        guard: Callable[[], None],
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self._local = local
        self._url = segments_url(folder_url, name)
        self._name = name
        self._sizes = list(sizes)
        self._guard = guard
        self._segment_bytes = segment_bytes

    @property
    def uploaded_bytes(self) -> int:
        """How much of the file is remote."""
        return sum(self._sizes)

    def upload(self, is_final: bool = False) -> None:
        """Brings up all whole lines that the file has now; with `is_final` also an unfinished last line."""
        size = os.path.getsize(self._local)
        if size < self.uploaded_bytes:  # the file was replaced by a shorter one: what is local is the truth
            self._remove_all()
        with open(self._local, "rb") as file:
            while self.uploaded_bytes < size and self._upload_next(file, size, is_final):
                pass

    def _upload_next(self, file: BinaryIO, size: int, is_final: bool) -> bool:
        """Extends the last segment, or adds one; False if there is nothing whole to write."""
        is_growing = bool(self._sizes) and 2 * self._sizes[-1] < self._segment_bytes
        index = len(self._sizes) - is_growing
        known = self._sizes[index] if is_growing else 0
        start = sum(self._sizes[:index])
        file.seek(start)
        data = file.read(min(self._segment_bytes, size - start))
        if not is_final or start + len(data) < size:
            data = self._whole_lines(data, known)
        if len(data) <= known:
            return False
        self._guard()
        storage.write_bytes(storage.join(self._url, segment_name(self._name, index + 1)), data)
        self._sizes[index:] = [len(data)]
        return True

    def _whole_lines(self, data: bytes, known: int) -> bytes:
        end = data.rfind(b"\n") + 1
        is_one_long_line = end <= known and len(data) == self._segment_bytes
        return data if is_one_long_line else data[:end]

    def _remove_all(self) -> None:
        self._guard()
        for number in range(len(self._sizes), 0, -1):
            storage.delete(storage.join(self._url, segment_name(self._name, number)))
            self._sizes.pop()
