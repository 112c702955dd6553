"""What disks and interrupted copies do to a file."""

from __future__ import annotations

import json
import os
from pathlib import Path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(path: Path) -> None:
    path.unlink()


def deep(path: Path) -> None:
    path.write_bytes(b"[" * 100_000 + b"]" * 100_000)


def bomb(path: Path) -> None:
    """A few hundred bytes of YAML that are 10^9 values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    path.write_text("\n".join(lines) + "\n")


def huge(path: Path) -> None:
    """More than any document has; none of it on the disk."""
    with path.open("r+b") as file:
        file.truncate(100 << 20)


def not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


def other_types(path: Path) -> None:
    """Valid, and nothing in it is what it should be."""
    try:
        body = json.loads(path.read_bytes())
        text = json.dumps({key: [{"x": None}] for key in body})
    except ValueError:
        text = "- 1\n- [2]\n"
    path.write_text(text)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def swap(path: Path) -> None:
    """The content of the file beside it."""
    others = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    path.write_bytes(others[0].read_bytes() if others else b"{}")


EVERY = (
    truncate,
    flip,
    empty,
    cut,
    delete,
    deep,
    bomb,
    huge,
    not_utf8,
    other_types,
    link,
    pipe,
    folder,
    swap,
)
