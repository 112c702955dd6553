"""Files hashed (xxh3_128) while they are written, and files hashed again."""

from __future__ import annotations

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
