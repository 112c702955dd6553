"""The flows under a name that no project has for itself: `entrypoint: danling_flows.run` in a `prefect.yaml`.

Our packages are called `flows` and `tasks`, and so may be packages of the user's. In the process of a flow ours are
meant; in the ranks, which import neither, theirs are.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent


def _ours(module: str, name: str) -> Any:
    """Import one of our flows, whatever else is called as its package and is found first."""
    found = sys.modules.get("flows")
    if found is not None and Path(getattr(found, "__file__", None) or "").resolve().parent.parent != _HERE:
        raise ImportError(
            f"the package 'flows' of {getattr(found, '__path__', found)} is loaded in this process, where danling "
            "needs its own: deploy the two by a prefect.yaml each"
        )
    before = list(sys.path)
    sys.path.insert(0, str(_HERE))
    try:
        importlib.import_module("tasks")
        return getattr(importlib.import_module(module), name)
    finally:
        sys.path[:] = before


run = _ours("flows.run", "run")
experiment = _ours("flows.experiment", "experiment")
group = _ours("flows.group", "group")
