"""Importing this raises an ImportError where another `tasks` hides ours: flows import it before any task.

`danling` itself has looked already (`danling_entry`); a worker of Prefect has not.
"""

import importlib.util
from pathlib import Path

_found = importlib.util.find_spec("tasks")
_ours = Path(__file__).resolve().parent.parent / "tasks" / "__init__.py"
if _found is None or _found.origin is None or Path(_found.origin).resolve() != _ours:
    raise ImportError(
        f"danling needs its package 'tasks' in {_ours.parent}, but Python finds "
        f"{_found.origin if _found else 'none'} first. Rename that module, or take its folder off PYTHONPATH."
    )
