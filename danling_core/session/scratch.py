"""The local folder that a run on a store is written into: private, whoever has been there before."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile

from danling_core import storage
from danling_core.errors import StorageError

_PRIVATE = 0o700


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
