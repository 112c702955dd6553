"""A home for Prefect, and a way to this machine's own servers, whatever the environment lacks or states."""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import tempfile
from collections.abc import Iterator

logger = logging.getLogger("danling.flows")

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def never_through_a_proxy() -> None:
    """Have this process and its children reach servers on loopback directly, whatever `http_proxy` says."""
    for name in ("NO_PROXY", "no_proxy"):
        known = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join([*known, *(host for host in _LOOPBACK if host not in known)])


@contextlib.contextmanager
def a_home() -> Iterator[None]:
    """Give Prefect a temporary home inside the block where none can be written; enter it before its import.

    A user without a name is called by the uid, for libraries that ask.
    """
    if "LOGNAME" not in os.environ and "USER" not in os.environ and not _has_name():
        os.environ["LOGNAME"] = str(os.getuid())
    home = os.environ.get("PREFECT_HOME") or os.path.join(_home(), ".prefect")
    if _is_writable(home):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="danling-prefect-") as folder:
        logger.warning(
            "Prefect's home %s cannot be written: this command uses a temporary one, and what it shows there is gone "
            "afterwards; set PREFECT_HOME or HOME",
            home,
        )
        os.environ["PREFECT_HOME"] = folder
        if not _is_writable(_home()):
            os.environ["HOME"] = folder
        yield


def _home() -> str:
    found = os.path.expanduser("~")
    return os.sep if found == "~" else found


def _has_name() -> bool:
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def _is_writable(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
