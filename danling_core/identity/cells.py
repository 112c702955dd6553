"""The code of a class that lies in no file: defined in a notebook or at a prompt."""

from __future__ import annotations

import hashlib
import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from danling_core.identity.imports import imported_files
from danling_core.identity.sources import is_own

_PLAIN = (int, float, complex, str, bytes, bool, type(None))


def code_id(cls: type) -> str:
    """Return 40 hex digits that change with the code of a class in no file, and of what it uses from there.

    That are its methods, its bases, the functions, classes and plain constants that they name, and the own files of
    modules that they name: as text where it is known, as in a notebook, else as Python compiled it.
    """
    seen: dict[int, Any] = {}
    parts = sorted(_parts(cls, cls.__module__, seen))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


def _parts(value: Any, module: str, seen: dict[int, Any]) -> Iterator[str]:
    if id(value) in seen:
        return
    seen[id(value)] = value  # kept, so that its id stays its own
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        for function in (value.fget, value.fset, value.fdel):
            yield from _parts(function, module, seen)
    elif isinstance(value, type):
        if value.__module__ == module:
            yield f"class {value.__qualname__} {[base.__qualname__ for base in value.__bases__]}"
            for name, inner in vars(value).items():
                if _is_plain(inner) and name not in ("__doc__", "__firstlineno__"):
                    yield f"{value.__qualname__}.{name} = {inner!r}"
                yield from _parts(inner, module, seen)
            for base in value.__bases__:
                yield from _parts(base, module, seen)
    elif isinstance(value, types.FunctionType):
        if value.__module__ == module:
            yield f"{value.__qualname__}{value.__defaults__!r}: {_text(value)}"
            for name in sorted(_names(value.__code__)):
                yield from _global(name, value.__globals__, module, seen)
    elif isinstance(value, types.ModuleType):
        file = getattr(value, "__file__", None)
        if file is not None and is_own(file):
            for path in imported_files(Path(file).resolve()):
                yield f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _global(name: str, values: dict[str, Any], module: str, seen: dict[int, Any]) -> Iterator[str]:
    if name not in values:
        return
    value = values[name]
    if _is_plain(value):
        yield f"{name} = {value!r}"
    elif isinstance(value, type | types.FunctionType) and value.__module__ != module:
        yield from _parts(inspect.getmodule(value), module, seen)
    else:
        yield from _parts(value, module, seen)


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Return whether `repr` says all about a value, and is short enough."""
    if isinstance(value, tuple | list | dict):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return depth < 4 and len(inner) < 1000 and all(_is_plain(each, depth + 1) for each in inner)
    return isinstance(value, _PLAIN)


def _text(function: types.FunctionType) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return _compiled(function.__code__)


def _compiled(code: types.CodeType) -> str:
    inner = [_compiled(each) if isinstance(each, types.CodeType) else repr(each) for each in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {inner}"


def _names(code: types.CodeType) -> set[str]:
    found = set(code.co_names)
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            found |= _names(each)
    return found
