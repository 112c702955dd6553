"""Object stores in memory, with the rules of S3 and of Google Cloud Storage, request by request.

S3: reads and listings are strongly consistent, a PUT is atomic and the last one wins ("Amazon S3 data consistency
model", User Guide); `If-None-Match: *` creates ("Conditional writes"); a DELETE of nothing succeeds; an upload in parts
is visible once it is completed, and its parts stay behind where it is not ("Multipart upload"). There is no rename.

Google Cloud Storage: strongly consistent ("Consistency"); `ifGenerationMatch=0` creates ("Request preconditions"); a
DELETE of nothing is a 404; a resumable upload is visible after its last chunk ("Resumable uploads").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from danling_core.storage.backend import Entry, Unreadable

Kind = Literal["s3", "gcs"]
PART_BYTES = 8192
"""So small that the payload of a checkpoint goes up in three parts."""


@dataclass(frozen=True)
class Object:
    """An object of a store, and when it was written, by the store's clock."""

    data: bytes
    written: float


class SimulatedStore:
    """Implements `Backend` in memory; every request can be stopped before, and its answer be lost after.

    Args:
        kind: whose rules.
        before: called before each request with its method and path.
        after: called after each request was carried out.
        clock: Unix time of the store.
    """

    def __init__(
        self,
        kind: Kind,
        before: Callable[[str, str], None] = lambda kind, path: None,
        after: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = lambda: 1_800_000_000.0,
    ) -> None:
        self.kind = kind
        self.objects: dict[str, Object] = {}
        self.unfinished: dict[int, list[bytes]] = {}
        """Uploads that were begun and not completed: parts that cost money, and that no listing shows."""
        self.before = before
        self.after = after
        self.clock = clock
        self.changed: Callable[[str], None] = lambda change: None
        """Called with `PUT PATH` or `DELETE PATH` where what a reader sees has changed."""
        self._uploads = 0

    def read(self, path: str) -> bytes:
        self.before("GET", path)
        found = self._object(path).data
        self.after()
        return found

    def write(self, path: str, data: bytes, is_durable: bool) -> None:
        self.before("PUT", path)
        self._put(path, data)
        self.after()

    def create(self, path: str, data: bytes) -> None:
        self.before("PUT if none", path)
        if path in self.objects:
            raise FileExistsError(path)
        self._put(path, data)
        self.after()

    def put(self, local: str, path: str) -> None:
        with open(local, "rb") as file:
            data = file.read()
        if len(data) <= PART_BYTES:
            return self.write(path, data, True)
        self._uploads += 1
        upload, parts = self._uploads, [data[i : i + PART_BYTES] for i in range(0, len(data), PART_BYTES)]
        self.before("POST upload", path)
        self.unfinished[upload] = []
        self.after()
        for number, part in enumerate(parts, start=1):
            self.before(f"PUT part {number}", path)
            self.unfinished[upload].append(part)
            if self.kind == "gcs" and number == len(parts):
                self._put(path, b"".join(self.unfinished.pop(upload)))
            self.after()
        if self.kind == "s3":
            self.before("POST complete", path)
            self._put(path, b"".join(self.unfinished.pop(upload)))
            self.after()
        return None

    def get(self, path: str, local: str) -> None:
        data = self.read(path)
        with open(local, "wb") as file:
            file.write(data)

    def size(self, path: str) -> int:
        self.before("HEAD", path)
        found = len(self._object(path).data)
        self.after()
        return found

    def exists(self, path: str) -> bool:
        self.before("HEAD", path)
        found = path in self.objects or any(name.startswith(f"{path}/") for name in self.objects)
        self.after()
        return found

    def delete(self, path: str) -> None:
        self.before("DELETE", path)
        if path in self.objects:
            del self.objects[path]
            self.changed(f"DELETE {path}")
        elif self.kind == "gcs":
            raise FileNotFoundError(path)
        self.after()

    def delete_tree(self, path: str) -> None:
        for entry in self.tree(path):
            self._delete_if_there(f"{path}/{entry.path}")

    def names(self, path: str) -> list[str]:
        self.before("LIST", path)
        below = [name[len(path) + 1 :] for name in self.objects if name.startswith(f"{path}/")]
        if not below:
            raise FileNotFoundError(path)
        self.after()
        return sorted({name.partition("/")[0] for name in below})

    def tree(self, path: str, unreadable: Unreadable | None = None) -> list[Entry]:
        self.before("LIST", path)
        found = sorted(
            Entry(name[len(path) + 1 :], len(each.data), each.written)
            for name, each in self.objects.items()
            if name.startswith(f"{path}/")
        )
        self.after()
        return found

    def _object(self, path: str) -> Object:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]

    def _put(self, path: str, data: bytes) -> None:
        self.objects[path] = Object(bytes(data), self.clock())
        self.changed(f"PUT {path}")

    def _delete_if_there(self, path: str) -> None:
        try:
            self.delete(path)
        except FileNotFoundError:
            return
