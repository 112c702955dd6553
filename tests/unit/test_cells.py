"""The id of code that lies in no file: it changes with what is run, and with nothing else."""

from __future__ import annotations

import linecache
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

from danling_core.identity.cells import code_id
from tests.small_runner import SmallRunner, config

BASE = """
import helping_cells
from helping_cells import tool
RATE = 0.1
UNUSED = 1

def scale(x):
    return x * RATE

class Base:
    factor = 2
    def both(self): return helping_cells.x

class Mine(Base):
    width: int = 3
    @property
    def size(self): return scale(self.width)
    @staticmethod
    def fixed(): return [scale(i) for i in range(3)]
    def other(self): return tool()
"""
SAME = [("UNUSED = 1", "UNUSED = 2"), ("\nRATE", "\n\n\nRATE")]
OTHER = [
    ("RATE = 0.1", "RATE = 0.2"),
    ("x * RATE", "x + RATE"),
    ("factor = 2", "factor = 3"),
    ("width: int = 3", "width: int = 4"),
    ("range(3)", "range(4)"),
    ("Mine(Base)", "Mine"),
]


@pytest.fixture
def helping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "helping_cells.py"
    path.write_text("x = 1\n\n\ndef tool(): return 1\n")
    yield path  # type: ignore[misc]
    sys.modules.pop("helping_cells", None)


def defined(text: str, is_known: bool) -> type:
    """The class of a cell, whose text is known in a notebook and not at a prompt."""
    name = f"<cell {hash(text)} {is_known}>"
    if is_known:
        linecache.cache[name] = len(text), None, text.splitlines(True), name
    module = types.ModuleType("cells")
    exec(compile(text, name, "exec"), module.__dict__)
    mine: type = module.__dict__["Mine"]
    return mine


@pytest.mark.parametrize("is_known", [True, False])
def test_the_id_of_a_cell_changes_with_what_the_runner_uses(helping: Path, is_known: bool) -> None:
    first = code_id(defined(BASE, is_known))
    assert len(first) == 40 and first == code_id(defined(BASE, is_known))
    for old, new in SAME:
        assert code_id(defined(BASE.replace(old, new), is_known)) == first, new
    ids = {code_id(defined(BASE.replace(old, new), is_known)) for old, new in OTHER}
    assert len(ids | {first}) == len(OTHER) + 1
    helping.write_text("x = 2\n\n\ndef tool(): return 1\n")
    assert code_id(defined(BASE, is_known)) not in ids | {first}


@pytest.mark.parametrize("file", [None, "<stdin>"])
def test_an_edited_cell_trains_again_and_the_same_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str | None
) -> None:
    text = """
from tests.small_runner import SmallRunner
steps = []
class Mine(SmallRunner):
    def train_step(self, data):
        steps.append(1)
        return super().train_step(data)
"""
    counts = []
    for cell in (text, text, text.replace("append(1)", "append(2)")):
        cls = defined(cell, True)
        monkeypatch.setitem(sys.modules, "cells", SimpleNamespace(__file__=file))
        runner = cls(config(tmp_path, experiment_id=None))
        assert isinstance(runner, SmallRunner)
        runner.train()
        counts.append(len(cls.train_step.__globals__["steps"]))
    assert counts[0] == counts[2] > 0 and counts[1] == 0
