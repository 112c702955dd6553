"""The pages made of the code are up to date, and what they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from danling_core.config import Config
from danling_core.config.sections import OptimConfig, SplitOptions
from danling_core.runner import TorchRunner
from scripts.make_reference import _KNOWN, PAGE, SOURCES, entries, page

ROOT = Path(__file__).parents[1]
COVERAGE = (ROOT / "docs" / "spec-coverage.md").read_text()
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", COVERAGE)))


def test_the_reference_is_what_the_docstrings_say() -> None:
    assert PAGE.read_text() == page(), "run: python scripts/make_reference.py"


def test_the_reference_lists_every_public_name_with_its_meaning() -> None:
    found = {
        title: {entry.name: entry.meaning for entry in entries((ROOT / path).read_text(), name)}
        for title, (path, name) in SOURCES.items()
    }
    public = {name for name in dir(TorchRunner) if not name.startswith("_")}
    assert public <= {name for title in _KNOWN for name in found[title]}
    assert set(found["Config"]) == set(Config.model_fields)
    assert set(found["Config: optim"]) == set(OptimConfig.model_fields)
    assert set(found["Config: one split of dataloader"]) == set(SplitOptions.model_fields)
    assert all(meaning for table in found.values() for meaning in table.values())


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_test_that_the_coverage_names_exists(file: str) -> None:
    defined = set(re.findall(r"^def (test_\w+)\(", (ROOT / "tests" / file).read_text(), flags=re.M))
    assert {name for named, name in NAMED if named == file} <= defined


@pytest.mark.parametrize(
    "section", ["1. The system", "2. Levels", "3. Attributes", "3. Methods", "3. Training", "4.", "5.", "6."]
)
def test_the_coverage_has_a_row_with_tests_for_each_section(section: str) -> None:
    (body,) = re.findall(rf"^## {re.escape(section)}.*?\n(.*?)(?=^## |\Z)", COVERAGE, flags=re.M | re.S)
    rows = [line for line in body.splitlines() if line.startswith("| ") and not line.startswith("| row")]
    assert rows and all("::test_" in row for row in rows)
