"""Every file of a run's folder, damaged in every way: no traceback, no hang, no wrong result, no other run harmed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from danling_core import storage
from danling_core.errors import DanLingError, RunInterrupted
from danling_core.runs import lease
from flows.cli import main
from tests import damage
from tests.small_runner import SmallRunner, config, weights
from tests.store_fixtures import asking_s3, new_bucket
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
FILES_ON_S3 = (
    *(name for name in FILES if name not in ("run.log", "events.jsonl")),
    "events/*.jsonl",
    "run/*.log",
)
WAYS_ON_S3 = tuple(way for way in damage.EVERY if way not in (damage.link, damage.pipe, damage.folder))
UNPROVEN: tuple[Any, ...] = (
    "run.log",
    "run/*.log",
    "../lease/*.json",
    ("status.json", damage.flip),
    ("config.yaml", damage.cut),
    ("metadata.json", damage.flip),
    ("metadata.json", damage.swap),
    ("latest.json", damage.swap),
    ("events.jsonl", damage.truncate),
    ("events.jsonl", damage.huge),
    ("events.jsonl", damage.flip),
    ("events/*.jsonl", damage.truncate),
    ("events/*.jsonl", damage.huge),
    ("events/*.jsonl", damage.flip),
)
"""Damage that no other file contradicts: logs, a lease (it is beside the run), one bit of a text, a YAML text that ends
early, another valid file in its place, and a last line that is not finished (a loss of power leaves that, and a resume
cuts it off)."""
OFTEN = (
    ("status.json", damage.empty),
    ("status.json", damage.pipe),
    ("config.yaml", damage.bomb),
    ("metadata.json", damage.deep),
    ("../lease/*.json", damage.cut),
    ("checkpoints/records/*.json", damage.other_types),
    ("results.json", damage.not_utf8),
)


def train(root: Path | str, **fields: Any) -> SmallRunner:
    runner = SmallRunner(config(root, epoch_end=3, **fields))
    runner.train()
    return runner


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project root with two runs: one that was stopped, and one that is complete."""
    root = tmp_path_factory.mktemp("original")
    make_two_runs(root)
    return root


@pytest.fixture(scope="module")
def original_on_s3(tmp_path_factory: pytest.TempPathFactory, moto_url: str) -> Path:
    """A copy of the same as a store has it, without the scratch of the machine that made it."""
    copy = tmp_path_factory.mktemp("original-on-s3")
    with pytest.MonkeyPatch.context() as patch, asking_s3(moto_url, patch):
        root = new_bucket(moto_url)
        make_two_runs(root, scratch=str(tmp_path_factory.mktemp("scratch")))
        for name, *_ in storage.list_tree(root):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            storage.get_file(storage.join(root, name), str(copy / name))
    return copy


def make_two_runs(root: Path | str, **fields: Any) -> None:
    train(root, params={"width": 3}, **fields)
    stopped = Stopped(config(root, epoch_end=3, **fields))
    stopped.stop_in = ("train", 9)
    with pytest.raises(RunInterrupted):
        stopped.train()


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
    run = damaged_copy(original, root, name, way)
    check_commands(str(root), str(run), tmp_path, capfd, name, way)
    check_resume(str(root), name, way, peace)


@pytest.mark.parametrize(
    ("name", "way"),
    [pytest.param(name, way, id=f"{name} {way.__name__}") for name in FILES_ON_S3 for way in WAYS_ON_S3],
)
@pytest.mark.long
def test_a_damaged_object_costs_its_own_run_only(
    original_on_s3: Path,
    peace: list[float],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    moto_url: str,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    way: Callable[[Path], None],
) -> None:
    copy = tmp_path / "root"
    run = damaged_copy(original_on_s3, copy, name, way)
    with asking_s3(moto_url, monkeypatch):
        root = new_bucket(moto_url)
        for path in copy.rglob("*"):
            if path.is_file():
                storage.put_file(str(path), storage.join(root, str(path.relative_to(copy))))
        check_commands(root, storage.join(root, str(run.relative_to(copy))), tmp_path, capfd, name, way)
        check_resume(root, name, way, peace, scratch=str(tmp_path / "scratch"))


def damaged_copy(original: Path, root: Path, name: str, way: Callable[[Path], None]) -> Path:
    """Copy the two runs, and damage a file of the stopped one; its folder."""
    shutil.copytree(original, root)
    (run,) = [path.parent for path in root.glob("*/*/status.json") if b"complete" not in path.read_bytes()]
    paths = [*run.parent.glob(f"{run.name}/{name}")]
    assert paths, f"the run has no {name}"
    for path in paths:
        way(path)
    return run


def check_commands(
    root: str,
    run: str,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    way: Callable[[Path], None],
) -> None:
    others = contents_of_others(root, run)
    for words in (
        ["runs", root, "--json"],
        ["show", run],
        ["verify", run],
        ["pull", run, str(folder / "pulled")],
        ["push", root, f"memory://{folder}/pushed"],
        ["prune", root, "--keep-last", "1", "--yes"],
    ):
        if words[0] == "prune":
            assert contents_of_others(root, run) == others, "a damaged file changes nothing of another run"
        began = time.monotonic()
        code = main(words)
        said = capfd.readouterr()
        assert code in (0, 1, 2) and "Traceback" not in said.err, words
        assert time.monotonic() - began < 10, words
        if words[0] == "runs":
            rows = json.loads(said.out)
            assert code == 0 and "complete" in [row["status"] for row in rows]
            assert len(rows) == 2 or name == "status.json", rows
        if words[0] == "verify" and not (code == 0 and way is damage.delete):
            assert code == 1 or name in UNPROVEN or (name, way) in UNPROVEN, "damage is found"
            named = (
                "checkpoint "
                if "/records/" in name or "/data/" in name
                else Path(name).name.partition("*")[0]
            )
            named = named or name.partition("/")[0]  # a segment is named by its file
            assert code == 0 or named in said.out + said.err, "and the file is named"


def contents_of_others(root: str, run: str) -> dict[str, bytes]:
    """Return every file of the runs that were not damaged."""
    kept = storage.base_name(storage.parent(run))
    return {
        name: storage.read_bytes(storage.join(root, name))
        for name, *_ in storage.list_tree(root)
        if not name.startswith(kept)
    }


def check_resume(
    root: str, name: str, way: Callable[[Path], None], peace: list[float], **fields: Any
) -> None:
    try:
        again = train(root, **fields)
    except DanLingError as error:
        assert str(error)
        assert way is damage.folder or name.startswith("checkpoints/"), error
    else:
        assert weights(again) == peace
        if not name.startswith("events") and name != "checkpoints/latest.json" and "records" not in name:
            assert main(["verify", again.dir]) == 0, "what was damaged is whole again"
