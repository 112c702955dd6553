"""Path on which a child process finds this package, without its working folder (`python -P`)."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path


def python_path(env: Mapping[str, str]) -> str:
    """Return the PYTHONPATH of `env`, with the folder that holds our packages in front where they are not installed.

    A folder named `queue.py` or `flows/` of the user's must not be found by `python -m`, which puts the working
    folder first: children are started with `-P` and this.
    """
    root = str(Path(__file__).resolve().parent.parent)
    entries = [entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        entries.insert(0, root)
    return os.pathsep.join(entries)
