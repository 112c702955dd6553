"""The local folder that a run on a store is written into: private, whoever has been there before."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile

from danling_core import storage
from danling_core.errors import Fenced, StorageError

_PRIVATE = 0o700
_OWNER = ".owner"


def scratch_folder(url: str, scratch: str | None) -> str:
    """Return the folder for the run at a URL, made where it is not there: below `scratch`, or the system's.

    The same run has the same one every time, so that a resume on the same machine finds what is there.

    Raises:
        StorageError: it, or the system's one above it, belongs to somebody else, is a link, or lets others write.
    """
    if scratch is None:
        root = os.path.join(tempfile.gettempdir(), f"danling-{os.getuid()}")
        _make_private(root)
    else:
        root = os.path.abspath(os.path.expanduser(scratch))
        os.makedirs(root, _PRIVATE, exist_ok=True)
    path = os.path.join(root, _name(url))
    _make_private(path)
    return path


def sign(folder: str, generation: int) -> None:
    """Say in a scratch folder which generation of the lease writes there: one before it that wakes up finds it."""
    storage.write_bytes(os.path.join(folder, _OWNER), str(generation).encode(), is_durable=False)


def check_signature(folder: str, generation: int) -> None:
    """Raise `Fenced` where a later generation writes into this scratch folder."""
    try:
        with open(os.path.join(folder, _OWNER), "rb") as file:
            found = file.read()
    except FileNotFoundError:
        return
    if found.isdigit() and int(found) > generation:
        raise Fenced(
            f"generation {generation} of the run in {folder} was taken over by generation {int(found)} on this "
            "machine; nothing more may be written for it"
        )


def _make_private(path: str) -> None:
    try:
        os.mkdir(path, _PRIVATE)
    except FileExistsError:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode) or not stat.S_ISDIR(found.st_mode):
            problem = "is a link" if stat.S_ISLNK(found.st_mode) else "is no folder"
        elif found.st_uid != os.getuid():
            problem = "belongs to somebody else"
        elif found.st_mode & 0o022:
            problem = "lets others write into it"
        else:
            os.chmod(path, _PRIVATE)
            return
        raise StorageError(
            f"the scratch folder {path} {problem}: remove it, or give another one as `scratch`"
        ) from None


def _name(url: str) -> str:
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return f"{storage.base_name(storage.parent(url))}-{storage.base_name(url)}-{digest}"
