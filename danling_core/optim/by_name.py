"""Classes of torch by name, and a look at the arguments that they take."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from danling_core.errors import ConfigError


def find_class(module: Any, base: type, name: str, what: str) -> type:
    """Return the class of `module` called `name`, whatever its case.

    Raises:
        ConfigError: there is none; the nearest are named.
    """
    found = [(n, c) for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base)]
    classes = {n.lower(): c for n, c in found if c is not base}
    if name.lower() not in classes:
        near = difflib.get_close_matches(name.lower(), classes, n=3)
        known = [classes[n].__name__ for n in near] or sorted(c.__name__ for c in classes.values())
        raise ConfigError(f"{what}.name is {name!r}, which torch does not have; known: {', '.join(known)}")
    return classes[name.lower()]


def check_arguments(cls: type, arguments: Mapping[str, Any], what: str) -> None:
    """Refuse arguments that `cls` does not take, before anything starts."""
    known = [p for p in inspect.signature(cls).parameters if p not in ("self", "params", "optimizer")]
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"unknown key '{what}.{name}' for {cls.__name__}{hint}")
