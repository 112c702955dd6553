"""Refuse clearly when another module called `tasks` or `flows` stands in front of ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from danling_core.errors import DanLingError

PACKAGES = ("danling_core", "tasks", "flows")


class NamesShadowed(DanLingError, ImportError):
    """A module of the user's has the name of one of our top-level packages and is found first."""


def check_names(home: Path | None = None) -> None:
    """Raise `NamesShadowed` unless each of our packages is the one that lies beside this file.

    Args:
        home: the folder that holds our packages; by default the parent of this package's folder.
    """
    home = Path(__file__).resolve().parent.parent if home is None else home
    for name in PACKAGES:
        found = _location(name)
        if found is None or found.parent.parent != home:
            raise NamesShadowed(
                f"danling needs its package {name!r} in {home}, but Python finds {found or 'none'} first. "
                f"Rename that module, or take its folder off PYTHONPATH (or run from another folder)."
            )


def _location(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).resolve()
