"""A local disk as a loss of power leaves it: what is done to a folder, recorded, and cut anywhere.

Sources of the rules: POSIX on `fsync`, `rename` and `link`; "All File Systems Are Not Created Equal" (ALICE, OSDI 2014)
on what file systems keep and reorder; "CrashMonkey and ACE" (OSDI 2018) on building the states.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Kind = Literal["folder", "file", "write", "truncate", "sync", "rename", "link", "remove", "told"]
Model = Literal["killed", "unsynced lost", "torn", "names behind", "folders behind"]

MODELS: dict[Model, str] = {
    "killed": "the process is killed: the system keeps all that was done",
    "unsynced lost": "power is lost: names are kept in order, and content that was not synced is lost",
    "torn": "power is lost: of content that was not synced, the first half is kept",
    "names behind": "power is lost: content is kept, and names only up to the last sync of anything",
    "folders behind": "power is lost: each folder has the names of its own last sync, and only synced content is kept",
}


class Operation(NamedTuple):
    """A change of the disk, or a word of the program that the outside has heard (`told`).

    Args:
        kind: what was done.
        path: in the recorded folder; for `told`, what was said.
        number: of the file or folder; names may move, and it stays.
        other: the new name, for `rename` and `link`.
        at: where `write` begins, and the size after `truncate`.
        data: what `write` wrote.
    """

    kind: Kind
    path: str
    number: int = 0
    other: str = ""
    at: int = 0
    data: bytes = b""


@dataclass(frozen=True)
class Image:
    """What a disk holds: the content of each file by its path, and its folders."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    folders: frozenset[str] = frozenset()

    @property
    def digest(self) -> str:
        found = hashlib.sha256(repr((sorted(self.files.items()), sorted(self.folders))).encode())
        return found.hexdigest()

    def write_to(self, root: str) -> None:
        """Replace a folder of the machine by this one."""
        shutil.rmtree(root, ignore_errors=True)
        os.makedirs(root)
        for folder in sorted(self.folders):
            os.makedirs(os.path.join(root, folder), exist_ok=True)
        for path, data in self.files.items():
            with open(os.path.join(root, path), "wb") as file:
                file.write(data)

    @classmethod
    def read_from(cls, root: str) -> Image:
        """Return what a folder of the machine holds."""
        files, folders = {}, set()
        for above, inner, names in os.walk(root):
            folders |= {os.path.relpath(os.path.join(above, name), root) for name in inner}
            for name in names:
                path = os.path.join(above, name)
                with open(path, "rb") as file:
                    files[os.path.relpath(path, root)] = file.read()
        return cls(files, frozenset(folders))


@dataclass
class _Node:
    is_folder: bool
    content: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    pending: list[Operation] = field(default_factory=list)

    def apply(self, operation: Operation) -> None:
        _change(self.content, operation)
        self.pending.append(operation)

    def sync(self) -> None:
        self.synced = bytes(self.content)
        self.pending.clear()

    def torn(self) -> bytes:
        """Return the content with the first half of the bytes that are not synced."""
        found, left = bytearray(self.synced), sum(len(each.data) for each in self.pending) // 2
        for each in self.pending:
            _change(found, each._replace(data=each.data[:left]))
            left = max(0, left - len(each.data))
        return bytes(found)


def _change(content: bytearray, operation: Operation) -> None:
    if operation.kind == "truncate":
        del content[operation.at :]
        content.extend(bytes(operation.at - len(content)))
        return
    content.extend(bytes(max(0, operation.at - len(content))))
    content[operation.at : operation.at + len(operation.data)] = operation.data


class Disk:
    """A disk that takes operations one by one, and can be cut in every model after each.

    Args:
        image: what is there at the beginning, all of it synced.
    """

    def __init__(self, image: Image = Image()) -> None:
        self._nodes: dict[int, _Node] = {0: _Node(True)}
        self.names: dict[str, int] = {"": 0}
        for number, path in enumerate([*sorted(image.folders), *sorted(image.files)], start=-1_000_000):
            data = image.files.get(path)
            self._nodes[number] = _Node(data is None, bytearray(data or b""), data or b"")
            self.names[path] = number
        self._names_at_sync = dict(self.names)
        self._folder_at_sync: dict[int, dict[str, int]] = {
            number: self._entries(path)
            for path, number in self.names.items()
            if self._nodes[number].is_folder
        }

    def apply(self, operation: Operation) -> None:
        """Carry out an operation. Raises KeyError where its name is not there."""
        kind, path, number, other = operation.kind, operation.path, operation.number, operation.other
        if kind in ("folder", "file"):
            self._nodes[number] = _Node(kind == "folder")
            self.names[path] = number
            if kind == "folder":
                self._folder_at_sync[number] = {}
        elif kind in ("write", "truncate"):
            self._nodes[number].apply(operation)
        elif kind == "sync":
            self._sync(number)
        elif (
            kind == "rename" and self.names.get(other) != self.names[path]
        ):  # of two links to a file it is nothing
            moved = {name: found for name, found in self.names.items() if _is_at_or_below(name, path)}
            for name in moved:
                del self.names[name]
            self.names |= {other + name[len(path) :]: found for name, found in moved.items()}
        elif kind == "link":
            self.names[other] = self.names[path]
        elif kind == "remove":
            del self.names[path]

    def _sync(self, number: int) -> None:
        node = self._nodes[number]
        node.sync()
        self._names_at_sync = dict(self.names)
        if node.is_folder:
            for path, found in self.names.items():
                if found == number:
                    self._folder_at_sync[number] = self._entries(path)

    def _entries(self, folder: str) -> dict[str, int]:
        return {
            name.rpartition("/")[2]: number
            for name, number in self.names.items()
            if name and name.rpartition("/")[0] == folder
        }

    def image(self, model: Model) -> Image:
        """Return what a crash now leaves."""
        if model == "killed":
            return self._image(self.names, lambda node: bytes(node.content))
        if model == "unsynced lost":
            return self._image(self.names, lambda node: node.synced)
        if model == "torn":
            return self._image(self.names, _Node.torn)
        if model == "names behind":
            return self._image(self._names_at_sync, lambda node: bytes(node.content))
        return self._image(self._names_by_folder(0, ""), lambda node: node.synced)

    def _names_by_folder(self, number: int, path: str) -> dict[str, int]:
        found = {path: number}
        for name, inner in self._folder_at_sync[number].items():
            below = f"{path}/{name}" if path else name
            found |= self._names_by_folder(inner, below) if self._nodes[inner].is_folder else {below: inner}
        return found

    def _image(self, names: Mapping[str, int], content: object) -> Image:
        assert callable(content)
        nodes = {path: self._nodes[number] for path, number in names.items() if path}
        files = {path: content(node) for path, node in nodes.items() if not node.is_folder}
        return Image(files, frozenset(path for path, node in nodes.items() if node.is_folder))


def _is_at_or_below(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}/")


class Crash(NamedTuple):
    """A state in which a crash left a disk.

    Args:
        after: how many operations were done.
        model: of the crash.
        image: what is there.
        told: what the program had said by then.
    """

    after: int
    model: Model
    image: Image
    told: tuple[str, ...]


def crashes(
    operations: Sequence[Operation],
    begin: Image = Image(),
    models: Iterable[Model] = tuple(MODELS),
) -> list[Crash]:
    """Return every state that a crash after each operation leaves, in each model; of equal ones the last."""
    disk, told = Disk(begin), []
    found: dict[tuple[str, int], Crash] = {}
    for after, operation in enumerate([None, *operations]):
        if operation is not None:
            if operation.kind == "told":
                told.append(operation.path)
                continue
            disk.apply(operation)
        for model in models:
            image = disk.image(model)
            found[image.digest, len(told)] = Crash(after, model, image, tuple(told))
    return sorted(found.values(), key=lambda crash: (crash.after, list(MODELS).index(crash.model)))


def replayed(operations: Iterable[Operation], begin: Image = Image()) -> Image:
    """Return what is there after all operations, without a crash."""
    disk = Disk(begin)
    for operation in operations:
        if operation.kind != "told":
            disk.apply(operation)
    return disk.image("killed")
