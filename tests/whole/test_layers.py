"""Real processes for what tests/unit/test_layers.py tries without them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.unit.test_layers import ROOT

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


def loaded_by(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after `statement`."""
    program = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", LIGHT)
def test_what_the_orchestrators_process_does_loads_nothing_heavy(statement: str) -> None:
    assert not loaded_by(statement) & LIGHT[statement]


@pytest.mark.holds("system-5")
def test_the_runner_loads_torch_but_not_prefect() -> None:
    loaded = loaded_by("import danling_core\ndanling_core.TorchRunner\nimport danling_core.worker")
    assert "torch" in loaded
    assert "prefect" not in loaded
