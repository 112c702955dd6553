"""The pages made of the code are up to date, and what they name is there."""

from __future__ import annotations

from pathlib import Path

from danling_core.config import Config
from danling_core.config.sections import OptimConfig, SplitOptions
from danling_core.runner import TorchRunner
from scripts import make_coverage
from scripts.make_reference import _KNOWN, PAGE, SOURCES, entries, page

ROOT = Path(__file__).parents[2]


def test_the_reference_is_what_the_docstrings_say() -> None:
    assert PAGE.read_text() == page(), "run: make docs"


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


def test_the_table_of_promises_is_what_the_markers_say() -> None:
    assert make_coverage.PAGE.read_text() == make_coverage.page(), "run: make docs"


def test_every_promise_is_held_by_a_test_and_every_marker_names_a_promise() -> None:
    known = {name for rows in make_coverage.promises().values() for name in rows}
    assert known == set(make_coverage.holders())
