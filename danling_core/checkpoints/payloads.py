"""The payloads of a store: written once, checked against what was committed, fetched for reading."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref

from danling_core.checkpoints.record import DataFile, Record
from danling_core.errors import CheckpointCorrupt, NotFound
from danling_core.storage.folder import Folder, Signature
from danling_core.storage.hashing import Write, hash_file

PAYLOAD = "state.pt"


class Payloads:
    """`data/<name>/state.pt`, one folder per checkpoint."""

    def __init__(self, folder: Folder, scratch: str | None) -> None:
        self._folder = folder
        self._scratch = scratch
        self._verified: dict[str, list[Signature | None]] = {}
        self._opened: dict[str, str] = {}
        self._downloads: str | None = None

    def put(self, name: str, write: Write) -> DataFile:
        """Write the payload of the claimed folder `name`, durably."""
        size, digest = self._folder.put(f"data/{name}/{PAYLOAD}", write)
        return DataFile(PAYLOAD, size, digest)

    def remove(self, name: str) -> None:
        self._folder.delete(f"data/{name}", recursive=True)
        self._verified.pop(name, None)

    def verify(self, record: Record) -> None:
        """Read everything and compare; raises CheckpointCorrupt on any difference."""
        try:
            before = self._signatures(record)  # so that a change while it is read is not trusted
        except NotFound as error:
            raise CheckpointCorrupt(f"checkpoint {record.name}: its payload is missing") from error
        with tempfile.TemporaryDirectory(prefix="danling-verify-", dir=self._scratch) as folder:
            for file in record.files:
                self._check(record, file, folder)
        self._verified[record.name] = before

    def trust(self, record: Record) -> None:
        """Take the files, as they are now, for those that were committed."""
        self._verified[record.name] = self._signatures(record)

    def verify_once(self, record: Record) -> None:
        """Call `verify`, unless it passed before, or was put here, and the files have not been touched since.

        A store cannot tell that, and its payloads are never rewritten: to ask again would download it.
        """
        known = self._verified.get(record.name)
        if known is None or known != self._signatures(record):
            self.verify(record)

    def is_good(self, record: Record) -> bool:
        """Return whether `verify_once` passes."""
        try:
            self.verify_once(record)
        except (CheckpointCorrupt, NotFound):
            return False
        return True

    def open_local(self, record: Record) -> str:
        """Return the verified payload where it lies."""
        try:
            self.verify_once(record)
            return self._folder.fetch(_path(record, record.files[0]), "")
        except NotFound as error:
            raise CheckpointCorrupt(f"checkpoint {record.name}: its payload is missing") from error

    def open_remote(self, record: Record) -> str:
        """Return a verified local copy, which stays until `release`."""
        if record.name not in self._opened:
            folder = tempfile.mkdtemp(dir=self._download_folder())
            try:
                self._opened[record.name] = self._check(record, record.files[0], folder)
            except BaseException:
                shutil.rmtree(folder)
                raise
        return self._opened[record.name]

    def release(self, record: Record) -> None:
        path = self._opened.pop(record.name, None)
        if path is not None:
            shutil.rmtree(os.path.dirname(path))

    def _check(self, record: Record, file: DataFile, folder: str) -> str:
        """Return the local path of a payload file whose size and hash are as committed."""
        what = f"checkpoint {record.name}: {file.name}"
        try:
            size = self._folder.size(_path(record, file))
            if size != file.size:
                raise CheckpointCorrupt(f"{what} has {size} bytes, committed were {file.size}")
            local = self._folder.fetch(_path(record, file), folder)
            found = hash_file(local)
        except (NotFound, FileNotFoundError) as error:
            raise CheckpointCorrupt(f"{what} is missing") from error
        if found != file.xxh3:
            raise CheckpointCorrupt(
                f"{what} has changed bits: its xxh3 is {found}, committed was {file.xxh3}"
            )
        return local

    def _signatures(self, record: Record) -> list[Signature | None]:
        return [self._folder.signature(_path(record, file)) for file in record.files]

    def _download_folder(self) -> str:
        if self._downloads is None:
            self._downloads = tempfile.mkdtemp(prefix="danling-checkpoints-", dir=self._scratch)
            weakref.finalize(self, shutil.rmtree, self._downloads, ignore_errors=True)
        return self._downloads


def _path(record: Record, file: DataFile) -> str:
    return f"data/{record.name}/{file.name}"
