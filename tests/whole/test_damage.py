"""Every file of a run's folder, damaged in every way: no traceback, no hang, no wrong result, no other run harmed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from danling_core.errors import DanLingError, RunInterrupted
from danling_core.runs import lease
from flows.cli import main
from tests import damage
from tests.small_runner import SmallRunner, config, weights
from tests.unit.test_resume_here import Stopped

FILES = (
    "config.yaml",
    "metadata.json",
    "run.log",
    "events.jsonl",
    "results.json",
    "latest.json",
    "best.json",
    "status.json",
    "checkpoints/latest.json",
    "checkpoints/records/*.json",
    "checkpoints/data/*/*",
    "../lease/*.json",
)
OFTEN = (
    ("status.json", damage.empty),
    ("status.json", damage.pipe),
    ("config.yaml", damage.bomb),
    ("metadata.json", damage.deep),
    ("../lease/*.json", damage.cut),
    ("checkpoints/records/*.json", damage.other_types),
    ("results.json", damage.not_utf8),
)


def train(root: Path, **fields: Any) -> SmallRunner:
    runner = SmallRunner(config(root, epoch_end=3, **fields))
    runner.train()
    return runner


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project root with two runs: one that was stopped, and one that is complete."""
    root = tmp_path_factory.mktemp("original")
    train(root, params={"width": 3})
    stopped = Stopped(config(root, epoch_end=3))
    stopped.stop_in = ("train", 9)
    with pytest.raises(RunInterrupted):
        stopped.train()
    return root


@pytest.fixture(scope="module")
def peace(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return weights(train(tmp_path_factory.mktemp("peace")))


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner that nobody knows is watched for 30 s."""
    for function in (lease.Lease.acquire.__func__, lease.is_held):  # type: ignore[attr-defined]
        monkeypatch.setitem(function.__kwdefaults__, "stale_after_seconds", 0.2)
    monkeypatch.setattr("danling_core.session.open_run.STALE_AFTER_SECONDS", 0.2)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, id=f"{name} {way.__name__}", marks=() if short else pytest.mark.long)
        for name in FILES
        for way in damage.EVERY
        for short in [(name, way) in OFTEN]
    ],
)
def test_a_damaged_file_costs_its_own_run_only(
    original: Path,
    peace: list[float],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    way: Callable[[Path], None],
) -> None:
    root = tmp_path / "root"
    shutil.copytree(original, root)
    (run,) = [path.parent for path in root.glob("*/*/status.json") if b"complete" not in path.read_bytes()]
    for path in run.parent.glob(f"{run.name}/{name}"):
        way(path)
    for words in (
        ["runs", str(root), "--json"],
        ["show", str(run)],
        ["verify", str(run)],
        ["pull", str(run), str(tmp_path / "pulled")],
        ["push", str(root), f"memory://{tmp_path}/pushed"],
        ["prune", str(root), "--keep-last", "1", "--yes"],
    ):
        began = time.monotonic()
        code = main(words)
        said = capfd.readouterr()
        assert code in (0, 1, 2) and "Traceback" not in said.err, words
        assert time.monotonic() - began < 10, words
        if words[0] == "runs":
            assert code == 0 and len(json.loads(said.out)) >= 1
    try:
        again = train(root)
    except DanLingError as error:
        assert str(error)
        assert way is damage.folder or name.startswith("checkpoints/"), error
    else:
        assert weights(again) == peace
        if name not in ("events.jsonl", "checkpoints/latest.json") and "records" not in name:
            assert main(["verify", again.dir]) == 0, "what was damaged is whole again"
