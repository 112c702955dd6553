"""A folder of files at a URL: what the checkpoint protocol needs beyond whole reads and writes."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Sequence

from danling_core.errors import NotFound, StoreUnavailable
from danling_core.storage import operations
from danling_core.storage.hashing import Write, write_hashed
from danling_core.storage.local import LocalBackend, make_folder, sync_folder
from danling_core.storage.operations import Guard
from danling_core.storage.urls import is_local, join, local_path

Signature = tuple[int, int, int]


class Folder:
    """Files by their path in one folder. What was written is durable on return.

    On a local disk each call is one attempt, and raises OSError as the system does: whoever saves knows better what
    to do about a full disk. On a store it is an operation like any other, repeated and explained. Nothing is written
    or deleted through a link inside the folder: what it leads to may belong to somebody else.

    Args:
        url: a local path, or any URL.
        scratch: local folder for what is on its way to a store; the system's by default.
    """

    def __init__(self, url: str, scratch: str | None = None) -> None:
        self.is_local = is_local(url)
        self.url = local_path(url) if self.is_local else url
        self._scratch = scratch
        self._disk = LocalBackend()
        self._existed = False

    def names(self, folder: str = "") -> list[str]:
        """Return the names in a folder, unfinished files of a local disk included; none if there is no such folder."""
        if not self.is_local:
            return operations.list_names(self._at(folder))
        try:
            return sorted(os.listdir(self._at(folder)))
        except FileNotFoundError:
            return []

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        """Return small files, in the order of `paths`; None for those that are not there, b"" for what is no file."""
        urls = [self._at(path) for path in paths]
        return [self._read(url) for url in urls] if self.is_local else operations.read_many(urls)

    def write(self, path: str, data: bytes, guard: Guard = lambda: None) -> None:
        """Replace a file at once: a reader, or a crash, sees the old content or the new.

        Args:
            guard: called before each attempt; raises if this process may not write any more.
        """
        if self.is_local:
            guard()
            self._disk.write(self._within(path), data, is_durable=True)
        else:
            operations.write_bytes(self._at(path), data, guard=guard)

    def claim(self, folder: str) -> bool:
        """Make a new folder; return False if the name is taken.

        A store has no folders: there the run's lease makes this process the only writer.

        Raises:
            FileNotFoundError: the folder itself was there, and is gone.
        """
        above, _, name = folder.rpartition("/")
        if not self.is_local:
            return name not in self.names(above)
        if self._existed and not os.path.isdir(self.url):
            raise FileNotFoundError(
                errno.ENOENT,
                "it disappeared during the run: put it back, or start again with a fresh run",
                self.url,
            )
        self._within(folder)
        make_folder(self._at(above))
        self._existed = True
        try:
            os.mkdir(self._at(folder))
        except FileExistsError:
            return False
        try:
            sync_folder(self._at(above))
        except OSError:
            os.rmdir(self._at(folder))
            raise
        return True

    def put(self, path: str, write: Write) -> tuple[int, str]:
        """Create a file inside a claimed folder from what `write` puts into it; return its bytes and its xxh3_128."""
        if self.is_local:
            written = write_hashed(self._at(path), write)
            sync_folder(os.path.dirname(self._at(path)))
            return written
        with tempfile.TemporaryDirectory(prefix="danling-checkpoint-", dir=self._scratch) as scratch:
            local = os.path.join(scratch, "payload")
            size, digest = write_hashed(local, write)
            operations.put_file(local, self._at(path))
        found = self.size(path)
        if found != size:
            raise StoreUnavailable(f"put {size} bytes at {self._at(path)}, the store has {found}: try again")
        return size, digest

    def delete(self, path: str, recursive: bool = False, guard: Guard = lambda: None) -> None:
        """Remove a file, or with `recursive` a folder with all it holds; what is not there is no error.

        `guard` as for `write`.
        """
        target = self._at(path)
        if not self.is_local:
            return operations.delete(target, recursive, guard=guard)
        self._within(path)
        guard()
        try:
            if recursive and os.path.isdir(target) and not os.path.islink(target):
                shutil.rmtree(target)
            else:
                os.unlink(target)
        except FileNotFoundError:
            return None
        return sync_folder(os.path.dirname(target))

    def size(self, path: str) -> int:
        """Return the bytes of a file. Raises `NotFound`."""
        return self._stat(path).st_size if self.is_local else operations.size(self._at(path))

    def fetch(self, path: str, folder: str) -> str:
        """Return a local path with the content of a file; a remote one comes into `folder`. Raises `NotFound`."""
        if self.is_local:
            self._stat(path)
            return self._at(path)
        local = os.path.join(folder, path.replace("/", "."))
        operations.get_file(self._at(path), local)
        return local

    def signature(self, path: str) -> Signature | None:
        """Return a value that changes when a file is written to; None of a store. Raises `NotFound`."""
        if not self.is_local:
            return None
        found = self._stat(path)
        return found.st_ino, found.st_size, found.st_mtime_ns

    def modified(self, path: str) -> float:
        """Return the Unix time of the newest change of a file or in a folder; infinity where a store cannot tell."""
        if not self.is_local:
            found = operations.list_tree(self._at(path))
            return max((entry.mtime for entry in found), default=float("inf"))
        inside = [f"{path}/{name}" for name in self.names(path)] if os.path.isdir(self._at(path)) else []
        return max(self._stat(each).st_mtime for each in (path, *inside))

    def free_bytes(self) -> int | None:
        """Return the room that is left on a local disk; None of a store, or where the system does not say."""
        try:
            return shutil.disk_usage(self.url).free if self.is_local else None
        except OSError:
            return None

    def _read(self, path: str) -> bytes | None:
        try:
            return self._disk.read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.EISDIR, errno.EINVAL, errno.ELOOP):  # a folder, a pipe, a link to itself
                return b""
            raise

    def _at(self, path: str) -> str:
        if self.is_local:
            return os.path.join(self.url, *path.split("/")) if path else self.url
        return join(self.url, *path.split("/"))

    def _within(self, path: str) -> str:
        """Return the place of a file whose folder is no link inside this folder. Raises OSError for another one."""
        target = self._at(path)
        above = os.path.dirname(target)
        if os.path.realpath(above) != os.path.normpath(
            os.path.join(os.path.realpath(self.url), os.path.relpath(above, self.url))
        ):
            raise OSError(
                errno.ELOOP, "it is a link out of its folder: put the folder itself in its place", above
            )
        return target

    def _stat(self, path: str) -> os.stat_result:
        try:
            return os.stat(self._at(path))
        except FileNotFoundError as error:
            raise NotFound(f"there is no {self._at(path)}") from error
