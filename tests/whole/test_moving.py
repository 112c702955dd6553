"""The programs of docs/moving.md: ours, and those of other frameworks, in an environment of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import peers

ROOT = Path(__file__).parents[2]


def programs() -> dict[str, str]:
    """Every program of the page, by the name in its first line."""
    page = (ROOT / "docs" / "moving.md").read_text()
    return dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", page, flags=re.S))


def written(folder: Path) -> dict[str, str]:
    found = programs()
    for name, text in found.items():
        (folder / name).write_text(text)
    return found


def test_no_program_is_longer_than_sixty_lines() -> None:
    lengths = {name: len(text.splitlines()) for name, text in programs().items()}
    assert len(lengths) == 7 and max(lengths.values()) <= 60
    assert lengths["ours.py"] + lengths["ours.yaml"] < 25


def test_ours_trains_as_the_page_says(tmp_path: Path) -> None:
    written(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "danling_core.worker", "ours.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    accuracy = re.findall(r"accuracy ([0-9.]+)", done.stderr + done.stdout)
    assert float(accuracy[-1]) > 0.88


@pytest.mark.long
@pytest.mark.parametrize("name", ["lightning", "accelerate", "trainer", "danling"])
def test_the_others_train_as_the_page_says(name: str, tmp_path: Path) -> None:
    written(tmp_path)
    done = peers.run(tmp_path, f"{name}_digits.py")
    assert done.returncode == 0, done.stderr
    accuracy = re.findall(r"accuracy (?:tensor\()?([0-9.]+)", done.stderr + done.stdout)
    assert float(accuracy[-1]) > 0.88
