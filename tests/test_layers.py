"""Arrows go down only, and a flow's process starts without torch."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What the orchestrator's process imports: it must start fast.
LIGHT = [
    "danling_core",
    "danling_core.config",
    "danling_core.overrides",
    "danling_core.sweep",
    "danling_core.identity",
    "danling_core.results",
    "danling_core.storage",
    "danling_core.run_folder",
    "danling_core.lease",
    "danling_core.metadata",
    "danling_core.open_run",
    "danling_core.follow",
    "danling_core.control",
    "danling_core.launch",
    "danling_core.checkpoints.record",
    "danling_core.checkpoints.store",
]
# A layer may import what stands in its row, of our own packages.
BELOW = {
    "danling_core": {"danling_core"},
    "tasks": {"tasks", "danling_core"},
    "flows": {"flows", "tasks", "danling_core"},
}


def loaded_by(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after `statement`."""
    program = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def imports_of(file: Path) -> Iterator[str]:
    """Top-level names that a source file imports absolutely, at any depth of nesting."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def test_the_light_parts_of_the_core_load_neither_torch_nor_prefect() -> None:
    loaded = loaded_by("\n".join(f"import {name}" for name in LIGHT))
    assert not loaded & {"torch", "prefect", "tasks", "flows"}


def test_the_runner_loads_torch_but_not_prefect() -> None:
    loaded = loaded_by("import danling_core\ndanling_core.TorchRunner\nimport danling_core.worker")
    assert "torch" in loaded
    assert "prefect" not in loaded


def test_the_flows_load_no_torch() -> None:
    assert "torch" not in loaded_by("import flows.cli, flows.run, flows.experiment, flows.group")


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


def test_nothing_in_the_core_imports_prefect() -> None:
    assert not [file for file in (ROOT / "danling_core").rglob("*.py") if "prefect" in imports_of(file)]


def test_the_package_is_typed() -> None:
    for layer in BELOW:
        found = importlib.util.find_spec(layer)
        assert found is not None and found.origin is not None
        assert (Path(found.origin).parent / "py.typed").exists(), f"{layer} has no py.typed"
