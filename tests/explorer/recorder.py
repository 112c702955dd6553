"""Records what this process does to a folder, at the boundary to the operating system: nothing can go around it."""

from __future__ import annotations

import builtins
import functools
import io
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tests.explorer.disk import Operation

_real_open = io.open


class Recorder:
    """The operations on a folder, in the order of their effects. Threads may act; those of C libraries may not.

    Args:
        root: an absolute path; what is there already is what `crashes` calls the beginning.
        before: called before each change with its kind and path: an explorer stops a thread there.
    """

    def __init__(self, root: str, before: Callable[[str, str], None] = lambda kind, path: None) -> None:
        self.operations: list[Operation] = []
        self._root = os.path.realpath(root)
        self.before = before
        self.after: Callable[[Operation], None] = lambda operation: None
        """Called after each operation, in the thread that made it."""
        self._lock = threading.RLock()
        self._new = itertools.count(1)
        self._numbers: dict[tuple[int, int], int] = {}  # of each file by its device and inode
        self._open_files: dict[int, str] = {}
        self._known_from: dict[str, int] = {"": 0}

    def tell(self, word: str) -> None:
        """Record that the program has said something to the outside, which must stay true."""
        with self._lock:
            self._note(Operation("told", word))

    def _note(self, operation: Operation) -> None:
        self.operations.append(operation)
        self.after(operation)

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Record inside the block, in every thread."""
        self._know_what_is_there()
        replaced = {
            "open": self._os_open, "close": self._os_close, "write": self._os_write, "fsync": self._os_fsync,
            "fdatasync": self._os_fsync, "ftruncate": self._os_ftruncate, "truncate": self._os_truncate,
            "rename": self._os_rename, "replace": self._os_rename, "link": self._os_link,
            "unlink": self._os_remove, "remove": self._os_remove, "rmdir": self._os_rmdir, "mkdir": self._os_mkdir,
        }  # fmt: skip
        self._real: dict[str, Any] = {name: getattr(os, name) for name in replaced}
        patches: list[Any] = [mock.patch.object(os, name, call) for name, call in replaced.items()]
        patches += [mock.patch.object(module, "open", self._open) for module in (builtins, io)]
        # copies by the kernel would pass unseen
        fast = ("_USE_CP_SENDFILE", "_USE_CP_COPY_FILE_RANGE")
        patches += [mock.patch.object(shutil, name, False) for name in fast if hasattr(shutil, name)]
        try:
            for patch in patches:
                patch.start()
            yield self
        finally:
            mock.patch.stopall()

    # files -----------------------------------------------------------------------------------------------------
    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
        path = self._inside(file) if isinstance(file, str | bytes | os.PathLike) else None
        if path is None or set(mode) <= set("rbt"):
            return _real_open(file, mode, buffering, *rest, **named)
        raw = _RecordedFile(self, path, os.fspath(file), mode.replace("b", "").replace("t", ""))
        if "b" in mode and buffering == 0:
            return raw
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **named)

    def _os_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        found = self._inside(path, dir_fd)
        if found is None:
            return int(self._real["open"](path, flags, mode, dir_fd=dir_fd))
        if flags & (os.O_WRONLY | os.O_RDWR):
            self.before("open", found)
        with self._lock:
            is_new = bool(flags & os.O_CREAT) and not os.path.lexists(os.path.join(self._root, found))
            descriptor = int(self._real["open"](path, flags, mode, dir_fd=dir_fd))
            self.opened(descriptor, found, is_new, bool(flags & os.O_TRUNC))
            return descriptor

    def opened(self, descriptor: int, path: str, is_new: bool, is_truncated: bool) -> None:
        """Take note of an open file."""
        self._open_files[descriptor] = path
        if is_new:
            self._note(Operation("file", path, self._number(descriptor)))
        elif is_truncated:
            self._note(Operation("truncate", path, self._number(descriptor)))

    def closed(self, descriptor: int) -> None:
        """Take note that a descriptor means nothing any more."""
        self._open_files.pop(descriptor, None)

    def write(self, descriptor: int, write: Callable[[], int], data: Any) -> int:
        """Carry out a write and record the bytes that it took."""
        path = self._open_files[descriptor]
        self.before("write", path)
        with self._lock:
            begin = os.lseek(descriptor, 0, os.SEEK_CUR)
            count = write()
            end = os.lseek(descriptor, 0, os.SEEK_CUR)
            if end - count != begin:  # appended
                begin = end - count
            taken = bytes(memoryview(data).cast("B")[:count])
            self._note(Operation("write", path, self._number(descriptor), at=begin, data=taken))
            return count

    def truncated(self, descriptor: int, size: int) -> None:
        """Record the new size of an open file."""
        path = self._open_files[descriptor]
        self._note(Operation("truncate", path, self._number(descriptor), at=size))

    def _os_write(self, descriptor: int, data: Any) -> int:
        if descriptor not in self._open_files:
            return int(self._real["write"](descriptor, data))
        return self.write(descriptor, lambda: int(self._real["write"](descriptor, data)), data)

    def _os_close(self, descriptor: int) -> None:
        self.closed(descriptor)
        self._real["close"](descriptor)

    def _os_fsync(self, descriptor: Any) -> None:
        descriptor = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = self._inside(os.readlink(f"/proc/self/fd/{descriptor}"))  # it may be open for reading
        if path is None:
            return self._real["fsync"](descriptor)
        self.before("sync", path)
        with self._lock:  # not really synced: the model knows, and the machine need not
            self._note(Operation("sync", path, self._number(descriptor)))

    def _os_ftruncate(self, descriptor: int, size: int) -> None:
        with self._lock:
            self._real["ftruncate"](descriptor, size)
            if descriptor in self._open_files:
                self.truncated(descriptor, size)

    def _os_truncate(self, path: Any, size: int) -> None:
        with _real_open(path, "r+b") as file:
            self._os_ftruncate(file.fileno(), size)
        if (found := self._inside(path)) is not None:
            with self._lock:
                self._note(Operation("truncate", found, self._number(path), at=size))

    # names -----------------------------------------------------------------------------------------------------
    def _os_rename(self, source: Any, target: Any, *, src_dir_fd: Any = None, dst_dir_fd: Any = None) -> None:
        old, new = self._inside(source, src_dir_fd), self._inside(target, dst_dir_fd)
        if old is None and new is None:
            return self._real["rename"](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        assert old is not None and new is not None, (
            f"a file moves in or out of what is recorded: {source} {target}"
        )
        self.before("rename", new)
        with self._lock:
            number = self._number(os.path.join(self._root, old))
            self._real["replace"](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            self._note(Operation("rename", old, number, new))

    def _os_link(self, source: Any, target: Any, **named: Any) -> None:
        old, new = self._inside(source), self._inside(target)
        if old is None and new is None:
            return self._real["link"](source, target, **named)
        assert old is not None and new is not None, f"a link leads out of what is recorded: {source} {target}"
        self.before("link", new)
        with self._lock:
            self._real["link"](source, target, **named)
            self._note(Operation("link", old, self._number(source), new))

    def _os_remove(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("remove", path, dir_fd)

    def _os_rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("rmdir", path, dir_fd)

    def _remove(self, name: str, path: Any, dir_fd: int | None) -> None:
        found = self._inside(path, dir_fd)
        if found is None:
            return self._real[name](path, dir_fd=dir_fd)
        self.before("remove", found)
        with self._lock:
            number = self._number(os.path.join(self._root, found))
            self._real[name](path, dir_fd=dir_fd)
            self._note(Operation("remove", found, number))
            if name == "rmdir" or not self._is_linked(number):
                self._numbers = {key: each for key, each in self._numbers.items() if each != number}

    def _os_mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        found = self._inside(path, dir_fd)
        if found is None:
            return self._real["mkdir"](path, mode, dir_fd=dir_fd)
        self.before("folder", found)
        with self._lock:
            self._real["mkdir"](path, mode, dir_fd=dir_fd)
            number = self._number(os.path.join(self._root, found))
            self._note(Operation("folder", found, number))

    # numbers ---------------------------------------------------------------------------------------------------
    def _know_what_is_there(self) -> None:
        """Give what is there the numbers that `Disk` gives it."""
        folders, files = [], []
        for above, inner, names in os.walk(self._root):
            folders += [os.path.relpath(os.path.join(above, name), self._root) for name in inner]
            files += [os.path.relpath(os.path.join(above, name), self._root) for name in names]
        self._numbers[self._key(self._root)] = 0
        for number, path in enumerate([*sorted(folders), *sorted(files)], start=-1_000_000):
            self._numbers[self._key(os.path.join(self._root, path))] = number

    def _number(self, file: Any) -> int:
        key = self._key(file)
        if key not in self._numbers:
            self._numbers[key] = next(self._new)
        return self._numbers[key]

    def _key(self, file: Any) -> tuple[int, int]:
        found = os.fstat(file) if isinstance(file, int) else os.lstat(file)
        return found.st_dev, found.st_ino

    def _is_linked(self, number: int) -> bool:
        """Return whether a file that lost a name has another, or is open: its inode is not free."""
        [key] = [key for key, found in self._numbers.items() if found == number]
        for above, _, names in os.walk(self._root):
            for name in names:
                if self._key(os.path.join(above, name)) == key:
                    return True
        return any(self._is_open_as(descriptor, key) for descriptor in self._open_files)

    def _is_open_as(self, descriptor: int, key: tuple[int, int]) -> bool:
        try:
            return self._key(descriptor) == key
        except OSError:  # closed by the file object that is gone
            return False

    def _inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Return a path relative to the root; None for one elsewhere, or a descriptor."""
        if isinstance(path, int):
            return None
        text = os.fsdecode(path)
        if dir_fd is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        text = os.path.join(_real_folder(os.path.dirname(os.path.abspath(text))), os.path.basename(text))
        if text == self._root:
            return ""
        return text[len(self._root) + 1 :] if text.startswith(f"{self._root}/") else None


@functools.cache
def _real_folder(path: str) -> str:
    return os.path.realpath(path)


class _RecordedFile(io.FileIO):
    """A raw file whose writes are recorded."""

    def __init__(self, recorder: Recorder, path: str, file: Any, mode: str) -> None:
        self._recorder = recorder
        recorder.before("open", path)
        with recorder._lock:
            is_new = not os.path.lexists(file)
            super().__init__(file, mode)
            recorder.opened(self.fileno(), path, is_new, "w" in mode)

    def write(self, data: Any) -> int:
        return self._recorder.write(self.fileno(), lambda: int(super(_RecordedFile, self).write(data)), data)

    def truncate(self, size: int | None = None) -> int:
        with self._recorder._lock:
            found = super().truncate(size)
            self._recorder.truncated(self.fileno(), found)
            return found

    def close(self) -> None:
        if not self.closed:
            self._recorder.closed(self.fileno())
        super().close()
