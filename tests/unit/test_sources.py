"""Which edits count as another code while runs are being trained, and which do not."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from danling_core.errors import CodeChanged
from danling_core.identity.sources import check_sources, loaded_sources


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of two modules, of which one is imported."""
    folder = tmp_path / "edited_package"
    folder.mkdir()
    for name in ("__init__", "used", "unused"):
        (folder / f"{name}.py").write_text(f"NAME = {name!r}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("edited_package.used")
    yield folder
    for name in [name for name in sys.modules if name.startswith("edited_package")]:
        del sys.modules[name]


def test_an_edit_of_what_was_imported_is_refused_by_name(package: Path) -> None:
    sources = loaded_sources()
    check_sources(sources)
    (package / "used.py").write_text("NAME = 'new'\n")
    with pytest.raises(CodeChanged, match=r"edited_package/used\.py\): start again"):
        check_sources(sources)


def test_a_file_that_is_gone_is_an_edit(package: Path) -> None:
    sources = loaded_sources()
    (package / "__init__.py").unlink()
    with pytest.raises(CodeChanged, match="__init__"):
        check_sources(sources)


def test_what_the_runner_does_not_import_may_change(package: Path) -> None:
    sources = loaded_sources()
    (package / "unused.py").write_text("NAME = 'new'\n")
    (package / "README.md").write_text("new")
    os.utime(package / "used.py")
    check_sources(sources)


def test_installed_packages_and_the_standard_library_are_left_out() -> None:
    paths = loaded_sources()
    assert not any(path in paths for path in (os.__file__, pytest.__file__))
    assert __file__ in paths
