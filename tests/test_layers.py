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

# What the orchestrator's process does, and what it must not load for it: it must start fast.
LIGHT = {
    "import danling_core, danling_core.config.sweep, danling_core.identity.ids; danling_core.Config\n"
    "dir(danling_core)": {"torch", "prefect", "fsspec", "numpy"},
    "import danling_core.config.overrides, danling_core.runs.folder, danling_core.runs.metadata\n"
    "import danling_core.session.open_run, danling_core.launch.client, danling_core.parallel.control": {
        "torch",
        "prefect",
        "fsspec",
    },
    "from danling_core.results import history, formatting\nfrom danling_core import writers": {
        "torch",
        "prefect",
    },
    "import danling_core.checkpoints": {"torch", "prefect"},
    "import tempfile, danling_core.runs.lease, danling_core.mirror.process, danling_core.mirror.uploader\n"
    "danling_core.storage.write_bytes(tempfile.mkdtemp() + '/x', b'1')": {
        "torch",
        "prefect",
        "fsspec",
        "s3fs",
        "gcsfs",
        "botocore",
    },
    "import flows.cli, flows.run, flows.experiment, flows.group": {"torch"},
}
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


@pytest.mark.parametrize("statement", LIGHT)
def test_what_the_orchestrators_process_does_loads_nothing_heavy(statement: str) -> None:
    assert not loaded_by(statement) & LIGHT[statement]


@pytest.mark.holds("system-5")
def test_the_runner_loads_torch_but_not_prefect() -> None:
    loaded = loaded_by("import danling_core\ndanling_core.TorchRunner\nimport danling_core.worker")
    assert "torch" in loaded
    assert "prefect" not in loaded


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
