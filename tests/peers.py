"""The environment of other frameworks and of a notebook's kernel, which `make peers` makes beside the tests' own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = Path(sys.prefix).with_name(f"{Path(sys.prefix).name}-peers") / "bin" / "python"


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python there, in a folder, and return what it said; skips where the environment was not made."""
    if not PYTHON.exists():
        pytest.skip("the other frameworks and a notebook's kernel are not installed: make peers")
    return subprocess.run(
        [str(PYTHON), *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
    )
