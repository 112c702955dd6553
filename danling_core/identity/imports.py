"""The files that a runner imports, found in their text: its own code, without installed packages."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from danling_core.identity.sources import is_own

_DANLING = tuple(Path(__file__).parents[2] / name for name in ("danling_core", "flows", "tasks"))


def imported_files(source: Path) -> list[Path]:
    """Return the runner's file and every own file that it imports, directly or not, sorted.

    An import inside a function counts too, and `importlib.import_module("name")`. One whose name is made at run time is
    not seen: see `hidden_imports`. Not entered are the standard library, installed packages and danling itself.

    Args:
        source: absolute, without symbolic links.
    """
    found, waiting = {source}, [source]
    while waiting:
        path = waiting.pop()
        new = {file for file in _imports_of(path, source.parent) if _counts(file)} - found
        found |= new
        waiting += new
    return sorted(found)


def hidden_imports(source: Path) -> list[str]:
    """Return where the runner's own files import by a name that is made at run time, as `file:line`."""
    return [
        f"{path}:{node.lineno}"
        for path in imported_files(source)
        for node in _nodes(path)
        if isinstance(node, ast.Call) and _is_dynamic(node) and _constant_name(node) is None
    ]


def _is_dynamic(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", None)
    return name in ("import_module", "__import__", "spec_from_file_location", "run_path")


def _constant_name(call: ast.Call) -> str | None:
    """Return the dotted name that a call imports; None where it is made at run time, or is a file's."""
    is_by_name = getattr(call.func, "attr", None) in (None, "import_module")
    first = call.args[0] if call.args and is_by_name else None
    is_text = isinstance(first, ast.Constant) and isinstance(first.value, str)
    return first.value if is_text and not first.value.startswith(".") else None  # type: ignore[union-attr]


def _counts(path: Path) -> bool:
    return is_own(str(path)) and not any(path.is_relative_to(folder) for folder in _DANLING)


def _imports_of(path: Path, beside: Path) -> Iterator[Path]:
    for node in _nodes(path):
        if isinstance(node, ast.Call) and _is_dynamic(node):
            name = _constant_name(node)
            yield from _absolute(name.split("."), beside) if name else ()
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield from _absolute(alias.name.split("."), beside)
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            folder = path.parents[node.level - 1] if 0 < node.level <= len(path.parents) else None
            for alias in node.names:
                wanted = [*parts, alias.name]
                yield from _absolute(wanted, beside) if folder is None else _below([folder], wanted)
                if folder is not None:
                    yield from _files(folder, "__init__")


def _nodes(path: Path) -> Iterator[ast.AST]:
    try:
        yield from ast.walk(ast.parse(path.read_bytes()))
    except (OSError, SyntaxError, ValueError, RecursionError):  # importing it says so
        return


def _absolute(parts: Sequence[str], beside: Path) -> Iterator[Path]:
    """Yield the files of a dotted name, from its package on. What this process has imported under it goes first."""
    module = sys.modules.get(parts[0])
    spec = getattr(module, "__spec__", None) or PathFinder.find_spec(parts[0], [*sys.path, str(beside)])
    if spec is None:
        return
    if spec.origin is not None and spec.origin.endswith(".py"):
        if not is_own(spec.origin):
            return
        yield Path(spec.origin).resolve()
    yield from _below([Path(folder) for folder in spec.submodule_search_locations or ()], parts[1:])


def _below(folders: Sequence[Path], parts: Sequence[str]) -> Iterator[Path]:
    """Yield the files of a dotted name inside a package, as far as it names modules."""
    for part in parts:
        for folder in folders:
            yield from _files(folder, part)
            yield from _files(folder / part, "__init__")
        folders = [folder / part for folder in folders]


def _files(folder: Path, name: str) -> Iterator[Path]:
    path = folder / f"{name}.py"
    if path.is_file():
        yield path.resolve()
