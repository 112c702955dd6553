"""The seam between operations on URLs and the stores that carry them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

TEMPORARY_MARK = ".tmp-"
"""Part of the name of every unfinished local file: listings leave such files out."""


class Entry(NamedTuple):
    """A file below a folder.

    Args:
        path: relative to the folder, with `/`.
        size: in bytes.
        mtime: seconds since the epoch, by the store's clock; 0 where the store does not say.
    """

    path: str
    size: int
    mtime: float


Unreadable = Callable[[str, OSError], None]
"""Called with the path, relative to what is listed, of an unreadable folder, and its error."""


class Backend(Protocol):
    """A store. Each method is one attempt, raising what its library raises; callers retry and translate.

    `names` and `tree` of a missing folder raise `FileNotFoundError` or return nothing, as the store has it.
    """

    def read(self, path: str) -> bytes: ...

    def write(self, path: str, data: bytes, is_durable: bool) -> None:
        """Replace the whole object at once: a reader sees the old bytes or the new ones."""

    def create(self, path: str, data: bytes) -> None:
        """Create the object, or raise an error for which `already_exists` is true."""

    def put(self, local: str, path: str) -> None:
        """Stream a local file into an object; nothing is visible before all of it is."""

    def get(self, path: str, local: str) -> None:
        """Stream an object into a local file."""

    def size(self, path: str) -> int: ...

    def exists(self, path: str) -> bool: ...

    def delete(self, path: str) -> None: ...

    def delete_tree(self, path: str) -> None: ...

    def names(self, path: str) -> list[str]: ...

    def tree(self, path: str, unreadable: Unreadable | None = None) -> list[Entry]:
        """List every file below. An unreadable folder is given to `unreadable`; without one it is an error."""


mounted: dict[str, Backend] = {}
"""Stores of this process by their scheme, in place of those that fsspec knows."""


@contextmanager
def mount(scheme: str, store: Backend) -> Iterator[None]:
    """Have a store answer for the URLs of a scheme inside the block: the shipped way to put a simulated one there."""
    mounted[scheme] = store
    try:
        yield
    finally:
        del mounted[scheme]
