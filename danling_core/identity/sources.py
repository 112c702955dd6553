"""The Python files that a runner is made of: noted when a run is prepared, compared whenever it is launched."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from danling_core.errors import CodeChanged

_INSTALLED = ("site-packages", "dist-packages")
_STANDARD = tuple({os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib")})


def loaded_sources() -> dict[str, str]:
    """Return a hash of every file that this process has imported as source, by path; without installed packages.

    What a runner imports later, inside a function, is not among them.
    """
    files = {str(getattr(module, "__file__", None)) for module in list(sys.modules.values())}
    return {path: digest for path in sorted(files) if is_own(path) and (digest := _digest_once(path))}


def check_sources(sources: Mapping[str, str]) -> None:
    """Raise CodeChanged where a file is no longer what it was when `loaded_sources` noted it.

    A session lasts hours, and each launch imports what lies there then: trained under the experiment id of the
    code that was prepared, it would be a lie. What the runner does not import may change freely.
    """
    changed = [path for path, digest in sources.items() if _digest(path) != digest]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise CodeChanged(
            f"the code changed since this run was prepared ({', '.join(changed[:3])}{more}): start again to train the "
            "new code, which is another experiment, or put the old code back to go on with this run"
        )


def is_own(path: str) -> bool:
    """Return whether a file is source of the user's: not of the standard library, and in no installed package."""
    if not path.endswith(".py") or path.startswith(_STANDARD):
        return False
    return not any(part in _INSTALLED for part in Path(path).parts)


def _digest(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


@functools.cache
def _digest_once(path: str) -> str | None:
    """Return what the first question found: one process prepares all runs of a sweep."""
    return _digest(path)
