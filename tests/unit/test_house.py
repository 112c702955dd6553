"""The shape of the code: which way imports point, no circles, a runner of few names, docstrings in plain English."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import danling_core as dl
from tests.small_runner import SmallRunner, config

ROOT = Path(__file__).parents[2]
TOPS = ("danling_core", "tasks", "flows")

# A package of the core may import what stands in its row, also for types. `errors`, `secrets`, `suggest`,
# `process_tree` and `python_path` are for all.
FOR_ALL = {"errors", "secrets", "suggest", "process_tree", "python_path"}
MAY_IMPORT = {
    "errors": set(),
    "secrets": set(),
    "suggest": set(),
    "process_tree": set(),
    "python_path": set(),
    "storage": set(),
    "config": {"storage"},
    "identity": {"config"},
    "callbacks": set(),
    "results": {"storage"},
    "metrics": {"results"},
    "optim": set(),
    "parallel": {"config"},
    "data": {"config", "parallel"},
    "train": {"config", "data", "metrics", "optim", "parallel", "results"},
    "writers": {"results", "storage"},
    "checkpoints": {"storage"},
    "runs": {"config", "identity", "storage"},
    "mirror": {"checkpoints", "runs", "storage"},
    "session": {
        *("checkpoints", "config", "identity", "mirror", "parallel", "results", "runs", "storage"),
        *("train", "writers"),
    },
    "runner": {
        *(
            "callbacks",
            "checkpoints",
            "config",
            "data",
            "identity",
            "metrics",
            "optim",
            "parallel",
            "results",
        ),
        *("runs", "session", "storage", "train"),
    },
    "launch": {
        *("config", "identity", "mirror", "optim", "parallel", "runner", "runs", "session", "storage"),
        "writers",
    },
    "tools": {
        *("checkpoints", "config", "launch", "mirror", "results", "runner", "runs", "storage", "writers"),
    },
    "worker": {"config", "identity", "launch", "parallel", "session", "storage", "writers"},
}
# As first words of a docstring these announce a riddle: a function begins with a verb, a class with a noun.
NO_FIRST_WORDS = set(
    "What Those That Of Nobody Nothing Where Whether Who How It They Here".split()  # noqa: SIM905
)
NO_IMPERATIVES = {"A", "All", "An", "Called", "From", "In", "On", "Small", "Sorted", "Stopped", "The", "To"}


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for top in TOPS:
        for path in (ROOT / top).rglob("*.py"):
            dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[dotted.removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of ours that a file imports, at any depth, also for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            module = node.module or ""
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name in known)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for target in edges.get(left.pop(), set()) - seen:
                seen.add(target)
                left.append(target)
        return seen

    reach = {module: reached(module) for module in edges}
    groups = {tuple(sorted(m for m in reach[start] if start in reach.get(m, ()))) for start in edges}
    return [list(group) for group in groups if group]


def test_no_modules_import_each_other_in_a_circle_not_even_for_types() -> None:
    known = modules()
    edges = {
        module: {n for n in imported(path, known) if n != module and known[n].name != "__init__.py"}
        for module, path in known.items()
    }
    assert circles(edges) == []


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_arrows_between_packages_of_the_core_point_one_way(package: str) -> None:
    known = {name: path for name, path in modules().items() if name.startswith("danling_core")}
    allowed = MAY_IMPORT[package] | FOR_ALL | {package, ""}
    wrong = [
        (module, target)
        for module, path in known.items()
        if package_of(module) == package
        for target in imported(path, known)
        if package_of(target) not in allowed
    ]
    assert not wrong


def test_every_package_has_a_row_and_few_modules_lie_flat() -> None:
    assert {package_of(m) for m in modules() if m.startswith("danling_core.")} == set(MAY_IMPORT)
    flat = [path.name for path in (ROOT / "danling_core").glob("*.py") if path.name != "__init__.py"]
    assert len(flat) <= 6


def private(names: object) -> set[str]:
    return {name for name in names if name.startswith("_") and not name.startswith("__")}  # type: ignore[attr-defined]


def test_a_runner_is_three_classes_with_few_names_of_its_own(tmp_path: Path) -> None:
    classes = [cls for cls in dl.TorchRunner.__mro__ if cls is not object]
    assert len(classes) <= 4
    of_classes = private(name for cls in classes for name in vars(cls))
    assert len(of_classes) <= 20
    runner = SmallRunner(config(tmp_path))
    runner.train()
    assert private(vars(runner)) == {"_parts"}


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    files = [*modules().values()]
    for folder in ("examples", "benchmarks", "scripts"):
        files += (ROOT / folder).rglob("*.py")
    odd = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                doc = ast.get_docstring(node) or ""
                if doc and doc.split(None, 1)[0].rstrip(",") in NO_FIRST_WORDS:
                    odd.append((str(path.relative_to(ROOT)), doc.splitlines()[0]))
    assert odd == []


def test_docstrings_of_functions_begin_with_an_imperative() -> None:
    """No name in backticks, no plural and no third person (`Returns`), no preposition or participle."""
    odd = []
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
                word = doc.split(None, 1)[0].rstrip(",:")
                is_plural = word.endswith("s") and not word.endswith("ss")
                if not word.isalpha() or is_plural or word in NO_IMPERATIVES:
                    odd.append(f"{path.relative_to(ROOT)}:{node.lineno}: {doc.splitlines()[0]}")
    assert odd == []


def _functions(path: Path) -> set[str]:
    """Return the qualified names of a module's functions and methods."""
    found: set[str] = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + child.name)
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(path.read_text()), "")
    return found


def test_what_the_architecture_names_is_there() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    calls = re.findall(r"`([\w/]+\.py):([\w.]+)`", page)
    assert len(calls) > 30
    assert [f"{file}:{name}" for file, name in calls if name not in _functions(ROOT / file)] == []
    files = re.findall(r"`([\w/]+/\w+\.py)`", page)
    assert len(files) > 20
    roots = (ROOT, ROOT / "danling_core")
    assert [file for file in files if not any((root / file).is_file() for root in roots)] == []
