"""Arrows go down only, and a flow's process starts without torch."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What the orchestrator's process does, and what it must not load for it: it must start fast.
# A layer may import what stands in its row, of our own packages.
BELOW = {
    "danling_core": {"danling_core"},
    "tasks": {"tasks", "danling_core"},
    "flows": {"flows", "tasks", "danling_core"},
}


def imports_of(file: Path) -> Iterator[str]:
    """Top-level names that a source file imports absolutely, at any depth of nesting."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("layer", BELOW)
def test_a_layer_imports_nothing_of_those_above_it(layer: str) -> None:
    files = list((ROOT / layer).rglob("*.py"))
    assert files
    wrong = [
        (str(file.relative_to(ROOT)), name)
        for file in files
        for name in imports_of(file)
        if name in BELOW and name not in BELOW[layer]
    ]
    assert not wrong


@pytest.mark.holds("system-5")
def test_nothing_in_the_core_imports_prefect() -> None:
    assert not [file for file in (ROOT / "danling_core").rglob("*.py") if "prefect" in imports_of(file)]


def test_the_package_is_typed() -> None:
    for layer in BELOW:
        found = importlib.util.find_spec(layer)
        assert found is not None and found.origin is not None
        assert (Path(found.origin).parent / "py.typed").exists(), f"{layer} has no py.typed"
