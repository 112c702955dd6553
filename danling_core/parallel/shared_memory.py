"""Shared memory of the machine: `/dev/shm`, through which processes exchange locks and batches."""

from __future__ import annotations

import errno

_TROUBLE = {
    errno.ENOSPC: "full",
    errno.EROFS: "read-only",
    errno.EACCES: "closed to this user",
    errno.ENOENT: "missing",
    errno.ENOSYS: "missing",
}


def why_unusable(error: BaseException) -> str | None:
    """Return what to do about shared memory that cannot be used; None where the error is another one.

    The system names no file where it cannot make a lock or a segment there, so this is told by that.
    """
    if not isinstance(error, OSError) or error.filename is not None or error.errno not in _TROUBLE:
        return None
    return (
        f"the shared memory /dev/shm is {_TROUBLE[error.errno]} ({error}): mount one that is large enough and may be "
        "written to (docker run --shm-size=1g, or in Kubernetes an emptyDir of medium Memory)"
    )
