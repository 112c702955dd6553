"""Bytes that survive a crash on a local disk: hashed while written, synced, replaced atomically."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import BinaryIO, cast

import xxhash

CHUNK_BYTES = 8 << 20
Write = Callable[[BinaryIO], object]


class HashingWriter:
    """An append-only binary file that hashes (xxh3_128) and counts what passes through it.

    It remembers the first OSError, because writers in between (torch's, for one) wrap it into something
    vaguer.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        self.error: OSError | None = None
        self._file = file
        self._hash = xxhash.xxh3_128()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        # In chunks: what was just hashed is still in the processor's cache when it is written.
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), CHUNK_BYTES):
            chunk = view[begin : begin + CHUNK_BYTES]
            self._hash.update(chunk)
            try:
                self._file.write(chunk)
            except OSError as error:
                self.error = self.error or error
                raise
            self.size += len(chunk)
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def write_hashed(path: str, write: Write) -> tuple[int, str]:
    """Create the file `path` from what `write` puts into it, and sync it. Returns bytes and xxh3_128."""
    with open(path, "xb") as file:
        writer = HashingWriter(file)
        try:
            write(cast(BinaryIO, writer))
        except Exception as error:
            if writer.error is not None and error is not writer.error:
                raise writer.error from error
            raise
        file.flush()
        os.fsync(file.fileno())
        found = os.fstat(file.fileno()).st_size
    if found != writer.size:
        raise OSError(errno.EIO, f"wrote {writer.size} bytes, the file has {found}", path)
    return writer.size, writer.hexdigest()


def hash_file(path: str) -> str:
    """Return the xxh3_128 of a file's bytes, in hex."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def replace_file(path: str, data: bytes) -> None:
    """Make `data` the content of `path`: a reader, or a crash, sees the old content or the new."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(temporary)
        raise
    sync_folder(folder)


def make_folder(path: str) -> None:
    """Create `path` and its missing parents, and sync the folders that got a new entry."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    make_folder(parent)
    with contextlib.suppress(FileExistsError):
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
        # Some network file systems refuse to sync a folder, and need none.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
