"""The command `danling`, which refuses clearly where a module of the user's hides one of our packages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGES = ("danling_core", "tasks", "flows")
BAD_INPUT = 2


def hidden() -> str | None:
    """Which of our packages Python does not find, or finds another in its place, and what to do about it.

    Imports none of them. They lie side by side; where this file lies says nothing, as an editable install may
    have it in another folder.
    """
    files = {name: _file(name) for name in PACKAGES}
    core = files["danling_core"]
    for name, file in files.items():
        if file is None:
            return f"the package {name!r} is not installed: pip install danling-flows"
        if core is None or file.parent.parent != core.parent.parent or file.name != "__init__.py":
            return (
                f"danling needs its own package {name!r}, but Python finds {file} first. "
                "Rename that module, or take its folder off PYTHONPATH (or run from another folder)."
            )
    return None


def main() -> int:
    """Run one command; its exit code."""
    if (problem := hidden()) is not None:
        print(f"danling: {problem}", file=sys.stderr)
        return BAD_INPUT
    from flows.cli import main as run_command

    return run_command()


def _file(name: str) -> Path | None:
    """The file of a package, or the folder of one that has none: a namespace package."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    found = spec.origin or next(iter(folders), None)
    return None if found is None else Path(found).resolve()


if __name__ == "__main__":
    sys.exit(main())
