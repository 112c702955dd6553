"""Storage below the commit protocol: a local folder or a remote URL."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Protocol

from danling_core.checkpoints import durable
from danling_core.errors import CheckpointError, NotFound, StoreUnavailable

Signature = tuple[int, int, int]


class Backend(Protocol):
    """Paths are relative to the store and built from checked names. What was written is durable on return."""

    url: str

    def names(self, folder: str) -> list[str]:
        """List the names in a folder ("" is the store itself); empty if there is no such folder."""

    def read(self, path: str) -> bytes:
        """Raise NotFound."""

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        """Return small files, in the order of `paths`; None for those that are not there."""

    def write(self, path: str, data: bytes) -> None:
        """Atomically: a reader sees the old content or the new."""

    def claim(self, folder: str) -> bool:
        """Make a new folder; False if the name is taken."""

    def put(self, path: str, write: durable.Write) -> tuple[int, str]:
        """Write a payload file inside a claimed folder; return its size and xxh3_128."""

    def delete(self, path: str) -> None:
        """Remove a file, or a folder with all it holds; nothing there is fine."""

    def size(self, path: str) -> int:
        """Raise NotFound."""

    def fetch(self, path: str, folder: str) -> str:
        """Return a local path with the content of a file; a remote one comes into `folder`. Raises NotFound."""

    def signature(self, path: str) -> Signature | None:
        """Return a value that changes when a file is written to; None where the place cannot tell."""

    def modified(self, path: str) -> float:
        """Unix time of the newest change of a file or in a folder; infinity where the place cannot tell."""

    def free_bytes(self) -> int | None:
        """Room left for payloads; None where the place has no such limit."""


class LocalBackend:
    """A folder on a local (or mounted) disk."""

    def __init__(self, path: str) -> None:
        self.url = os.path.abspath(path)
        self._existed = False

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(self._at(folder)))
        except FileNotFoundError:
            return []

    def read(self, path: str) -> bytes:
        try:
            with open(self._at(path), "rb") as file:
                return file.read()
        except FileNotFoundError as error:
            raise NotFound(f"there is no {self._at(path)}") from error

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for path in paths:
            try:
                found.append(self.read(path))
            except NotFound:
                found.append(None)
        return found

    def write(self, path: str, data: bytes) -> None:
        target = self._at(path)
        if os.path.dirname(path):
            durable.make_folder(os.path.dirname(target))
        durable.replace_file(target, data)

    def claim(self, folder: str) -> bool:
        if self._existed and not os.path.isdir(self.url):
            raise CheckpointError(
                f"the checkpoint folder {self.url} disappeared during the run, and its checkpoints with it: "
                "put it back, or start again with a fresh run"
            )
        target = self._at(folder)
        durable.make_folder(os.path.dirname(target))
        self._existed = True
        try:
            os.mkdir(target)
        except FileExistsError:
            return False
        try:
            durable.sync_folder(os.path.dirname(target))
        except OSError:
            os.rmdir(target)
            raise
        return True

    def put(self, path: str, write: durable.Write) -> tuple[int, str]:
        written = durable.write_hashed(self._at(path), write)
        durable.sync_folder(os.path.dirname(self._at(path)))
        return written

    def delete(self, path: str) -> None:
        target = self._at(path)
        try:
            if os.path.isdir(target) and not os.path.islink(target):
                shutil.rmtree(target)
            else:
                os.unlink(target)
        except FileNotFoundError:
            return
        durable.sync_folder(os.path.dirname(target))

    def size(self, path: str) -> int:
        return self._stat(path).st_size

    def fetch(self, path: str, folder: str) -> str:
        self._stat(path)
        return self._at(path)

    def signature(self, path: str) -> Signature | None:
        found = self._stat(path)
        return found.st_ino, found.st_size, found.st_mtime_ns

    def modified(self, path: str) -> float:
        inside = [f"{path}/{name}" for name in self.names(path)] if os.path.isdir(self._at(path)) else []
        return max(self._stat(each).st_mtime for each in (path, *inside))

    def free_bytes(self) -> int | None:
        with contextlib.suppress(OSError):
            return shutil.disk_usage(self.url).free
        return None

    def _at(self, path: str) -> str:
        return os.path.join(self.url, *path.split("/")) if path else self.url

    def _stat(self, path: str) -> os.stat_result:
        try:
            return os.stat(self._at(path))
        except FileNotFoundError as error:
            raise NotFound(f"there is no {self._at(path)}") from error


class RemoteBackend:
    """A prefix in an object store; payloads pass through a local temporary file."""

    def __init__(self, url: str, scratch: str | None = None) -> None:
        from danling_core import storage

        self.url = url
        self._storage = storage
        self._scratch = scratch

    def names(self, folder: str) -> list[str]:
        return self._storage.list_names(self._at(folder))

    def read(self, path: str) -> bytes:
        return self._storage.read_bytes(self._at(path))

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        return self._storage.read_many([self._at(path) for path in paths])

    def write(self, path: str, data: bytes) -> None:
        self._storage.write_bytes(self._at(path), data)

    def claim(self, folder: str) -> bool:
        # An object store has no folders: the run's lease makes this process the only writer.
        parent, _, name = folder.rpartition("/")
        return name not in self.names(parent)

    def put(self, path: str, write: durable.Write) -> tuple[int, str]:
        with tempfile.TemporaryDirectory(prefix="danling-checkpoint-", dir=self._scratch) as folder:
            local = os.path.join(folder, "payload")
            size, digest = durable.write_hashed(local, write)
            self._storage.put_file(local, self._at(path))
        found = self.size(path)
        if found != size:
            raise StoreUnavailable(f"put {size} bytes at {self._at(path)}, the store has {found}: try again")
        return size, digest

    def delete(self, path: str) -> None:
        self._storage.delete(self._at(path), recursive=path.startswith("data/"))

    def size(self, path: str) -> int:
        return self._storage.size(self._at(path))

    def fetch(self, path: str, folder: str) -> str:
        local = os.path.join(folder, path.replace("/", "."))
        self._storage.get_file(self._at(path), local)
        return local

    def signature(self, path: str) -> Signature | None:
        return None

    def modified(self, path: str) -> float:
        found = self._storage.list_tree(self._at(path))
        return max((modified for _, _, modified in found), default=float("inf"))

    def free_bytes(self) -> int | None:
        return None

    def _at(self, path: str) -> str:
        return self._storage.join(self.url, *path.split("/")) if path else self.url
