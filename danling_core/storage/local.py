"""The local disk as a store: whole writes are atomic and durable."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from danling_core.storage.backend import TEMPORARY_MARK, Entry, Unreadable


class LocalBackend:
    """Implements `Backend` by the operating system alone: paths are absolute."""

    def read(self, path: str) -> bytes:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "wanted a file, found a pipe or a device", path)
            return file.read()

    def write(self, path: str, data: bytes, is_durable: bool) -> None:
        with _temporary_beside(path) as temporary:
            _write_file(temporary, data, is_durable)
            os.replace(temporary, path)
        if is_durable:
            sync_folder(os.path.dirname(path))

    def create(self, path: str, data: bytes) -> None:
        with _temporary_beside(path) as temporary:
            _write_file(temporary, data, is_durable=True)
            _link_or_write(temporary, path, data)
        sync_folder(os.path.dirname(path))

    def put(self, local: str, path: str) -> None:
        with _temporary_beside(path) as temporary:
            shutil.copyfile(local, temporary)
            sync_file(temporary)
            os.replace(temporary, path)
        sync_folder(os.path.dirname(path))

    def get(self, path: str, local: str) -> None:
        shutil.copyfile(path, local)

    def size(self, path: str) -> int:
        return os.stat(path).st_size

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def delete(self, path: str) -> None:
        if os.path.isdir(path) and not os.path.islink(path):
            raise IsADirectoryError(f"{path} is a folder; delete it with recursive=True")
        os.remove(path)

    def delete_tree(self, path: str) -> None:
        shutil.rmtree(path)

    def names(self, path: str) -> list[str]:
        return sorted(name for name in os.listdir(path) if not is_unfinished(name))

    def tree(self, path: str, unreadable: Unreadable | None = None) -> list[Entry]:
        return sorted(_walk(path, "", unreadable))


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its writer


@contextmanager
def _temporary_beside(path: str) -> Iterator[str]:
    folder, name = os.path.split(path)
    make_folder(folder)
    temporary = os.path.join(folder, f".{name}{TEMPORARY_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.remove(temporary)


def _write_file(path: str, data: bytes, is_durable: bool) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        if is_durable:
            os.fsync(file.fileno())


def _link_or_write(temporary: str, path: str, data: bytes) -> None:
    """Create by a link, which never shows an empty file to a reader; some mounted file systems have none."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        _write_file(path, data, is_durable=True)


def sync_file(path: str) -> None:
    """Make the content of a file survive a crash."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def is_unfinished(name: str) -> bool:
    """Return whether a write that was cut short left the file of this name."""
    return TEMPORARY_MARK in name


def make_folder(path: str) -> None:
    """Create `path` and its missing parents, and sync the folders that got a new entry."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    make_folder(parent)
    with suppress(FileExistsError):
        os.mkdir(path)
    if not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, "wanted a folder, found a file", path)
    sync_folder(parent)


def sync_folder(path: str) -> None:
    """Make the entries of a folder survive a crash."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems refuse to sync a folder, and need none
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _walk(folder: str, prefix: str, unreadable: Unreadable | None) -> Iterator[Entry]:
    try:
        children = list(os.scandir(folder))
    except FileNotFoundError:  # removed by a prune since it was listed
        if not prefix:
            raise
        return
    except PermissionError as error:
        if not prefix or unreadable is None:
            raise
        unreadable(prefix.rstrip("/"), error)
        return
    for child in children:
        if is_unfinished(child.name):
            continue
        if child.is_dir(follow_symlinks=False):
            yield from _walk(child.path, f"{prefix}{child.name}/", unreadable)
        elif (found := _stat(child)) is not None:
            yield Entry(f"{prefix}{child.name}", found.st_size, found.st_mtime)


def _stat(child: os.DirEntry[str]) -> os.stat_result | None:
    """Return the status of a regular file; None for anything else: a pipe would block, a link may lead out of here."""
    try:
        found = child.stat(follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):  # gone, or a link that leads nowhere
            return None
        raise
    return found if stat.S_ISREG(found.st_mode) else None
