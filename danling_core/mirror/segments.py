"""A growing local file as numbered segments in a store that cannot append."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import BinaryIO

from danling_core import storage
from danling_core.runs.segments import Segment, is_segment, segment_name, segments_url

SEGMENT_BYTES = 1 << 20


class SegmentedFile:
    """Carries one growing file to `<stem>/000001.<suffix>`, `000002`, ...

    A segment holds whole lines. Once it is half full it is never touched again; the last one is replaced
    whole as the file grows. So the segments are at every moment a prefix of the file, in few objects.

    Every owner of a run writes under names of its own: it begins with the last segment that it finds, and
    readers pass over what an earlier owner's request, held up on the way, brings after that.

    Args:
        local: the growing file.
        folder_url: the remote run folder.
        name: path of the file in the run folder.
        segments: that are remote already.
        guard: called before every request that writes; raises if this process may not.
        generation: of the writer's lease.
        segment_bytes: the most that a segment holds, and that is kept in memory.
    """

    def __init__(
        self,
        local: str,
        folder_url: str,
        name: str,
        segments: Sequence[Segment],
        guard: Callable[[], None],
        generation: int = 1,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self._local = local
        self._url = segments_url(folder_url, name)
        self._name = name
        self._sizes = [segment.size for segment in segments]
        self._guard = guard
        self._generation = generation
        self._is_own = not segments or segments[-1].generation == generation
        self._segment_bytes = segment_bytes

    @property
    def uploaded_bytes(self) -> int:
        """Number of the file's bytes that are remote."""
        return sum(self._sizes)

    def upload(self, is_final: bool = False) -> None:
        """Bring up all whole lines that the file has now; with `is_final` also an unfinished last line."""
        size = os.path.getsize(self._local)
        if size < self.uploaded_bytes:  # the file was replaced by a shorter one: what is local is the truth
            self.remove()
        with open(self._local, "rb") as file:
            while (self.uploaded_bytes < size or not self._is_own) and self._upload_next(
                file, size, is_final
            ):
                pass

    def _upload_next(self, file: BinaryIO, size: int, is_final: bool) -> bool:
        """Extend the last segment, or add one; return False if there is nothing whole to write."""
        is_growing = bool(self._sizes) and 2 * self._sizes[-1] < self._segment_bytes
        index = len(self._sizes) - (is_growing or not self._is_own)
        known = self._sizes[index] if is_growing and self._is_own else 0
        start = sum(self._sizes[:index])
        file.seek(start)
        data = file.read(min(self._segment_bytes, size - start))
        if not is_final or start + len(data) < size:
            data = self._whole_lines(data, known)
        if len(data) <= known:
            return False
        name = segment_name(self._name, index + 1, self._generation)
        storage.write_bytes(storage.join(self._url, name), data, guard=self._guard)
        self._sizes[index:] = [len(data)]
        self._is_own = True
        return True

    def _whole_lines(self, data: bytes, known: int) -> bytes:
        end = data.rfind(b"\n") + 1
        is_one_long_line = end <= known and len(data) == self._segment_bytes
        return data if is_one_long_line else data[:end]

    def consists_of(self, segments: Sequence[Segment]) -> bool:
        """Return whether these, of a fresh listing, have the sizes that were written."""
        return [segment.size for segment in segments] == self._sizes

    def remove(self) -> None:
        """Delete all segments, whoever wrote them: the next upload begins anew."""
        stem, suffix = self._name.rsplit(".", 1)
        for name in reversed(storage.list_names(self._url)):
            if is_segment(f"{stem}/{name}") and name.endswith(f".{suffix}"):
                storage.delete(storage.join(self._url, name), guard=self._guard)
        self._sizes, self._is_own = [], True
