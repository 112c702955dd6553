"""Proofs about a run: its files are whole and agree, and an epoch trained again has the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from danling_core.checkpoints import codec
from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import ConfigError, NotFound
from danling_core.launch.client import Launcher
from danling_core.tools.reproduce import differences, reproduce
from danling_core.tools.verify import verify
from flows.cli import main
from tests.damage import flip
from tests.whole_runs import EXPERIMENT_ID, ROOT, config, fault, launch


@pytest.fixture(scope="module")
def original(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a kept checkpoint of every epoch, killed once on its way."""
    root = tmp_path_factory.mktemp("original")
    with fault("SIGKILL", 13, rank=1):
        ended = launch(launcher, config(root, save_interval=1, params={"batch_norm": True}, ema_decay=0.9))
    assert ended.outcome is not None and ended.outcome.status == "complete"
    return ended.path


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of it that may be damaged."""
    copy = tmp_path / original.parent.name / original.name
    shutil.copytree(original, copy)
    return copy


# verify


def test_a_good_run_has_no_findings(run: Path) -> None:
    report = verify(str(run))
    assert report.findings == [] and report.is_good
    assert report.checkpoints >= 3 and report.events > 10


def newest(run: Path) -> Path:
    return max((run / "checkpoints" / "data").glob("*/state.pt"))


def change_result(run: Path) -> None:
    """The last bit of one number."""
    document = json.loads((run / "results.json").read_text())
    document["results"]["1"]["val"]["loss"] += 1e-16
    (run / "results.json").write_text(json.dumps(document))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit in a checkpoint": (lambda run: flip(newest(run)), "checkpoint 0000000024"),
    "a missing payload": (lambda run: newest(run).unlink(), "checkpoint 0000000024"),
    "a flipped bit in a record": (
        lambda run: flip(max((run / "checkpoints" / "records").glob("*.json"))),
        "checkpoint 0000000024",
    ),
    "a pointer to nothing": (
        lambda run: (run / "checkpoints" / "best.json").write_text('{"record": "gone", "as_of": 99}'),
        "checkpoints/best.json",
    ),
    "a changed result": (change_result, "results.json"),
    "a torn results file": (lambda run: (run / "results.json").write_text('{"results'), "results.json"),
    "a torn status": (lambda run: (run / "status.json").write_text("{"), "status.json"),
    "a config that says nothing": (lambda run: (run / "config.yaml").write_text("seed: ["), "config.yaml"),
    "a broken event": (
        lambda run: (run / "events.jsonl").write_bytes(b"\0\0\n" + (run / "events.jsonl").read_bytes()),
        "events.jsonl:1",
    ),
    "another evaluation": (
        lambda run: (run / "evaluation.json").write_text('{"result": {"val": {"loss": 0.0}}}'),
        "evaluation.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(run: Path, damage: str) -> None:
    inflict, where = DAMAGES[damage]
    inflict(run)
    report = verify(str(run))
    assert not report.is_good
    assert any(finding.where.startswith(where) for finding in report.findings if finding.severity == "bad")


def test_what_a_crash_leaves_is_odd_and_no_damage(run: Path) -> None:
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "progr')
    report = verify(str(run))
    assert report.is_good and "torn" in str(report.findings[0])


def test_there_must_be_a_run(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no run"):
        verify(str(tmp_path))


def test_the_command_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", str(run)]
    assert main(command) == 0 and capsys.readouterr().out.startswith("good")
    flip(newest(run))
    assert main(command) == 1 and "DAMAGED" in capsys.readouterr().out


# reproduce


@pytest.mark.parametrize("epoch", [0, 2])
def test_an_epoch_trained_again_is_identical(launcher: Launcher, run: Path, epoch: int) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    report = reproduce(str(run), epoch, launcher=launcher, cwd=ROOT)
    assert report.is_identical and report.replayed == 1, str(report)
    assert len(report.compared) >= 2
    (note,) = report.notes
    assert note.endswith(f"the run was made with {EXPERIMENT_ID}"), "the id was stated"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before, "the run is only read"


def test_a_bit_planted_in_a_result_is_found(launcher: Launcher, run: Path) -> None:
    change_result(run)
    report = reproduce(str(run), 1, launcher=launcher, cwd=ROOT)
    assert len(report.differences) == 1 and "result of val" in report.differences[0]


def test_a_bit_planted_in_a_checkpoint_is_found(launcher: Launcher, run: Path) -> None:
    store = CheckpointStore(str(run / "checkpoints"))
    record = store.pointed("epoch-1")
    assert record is not None
    state = codec.load_state(store, record)
    weight = state["model"]["0.weight"]
    weight.view(torch.int32)[0, 0] ^= 1
    store.commit(
        lambda file: codec.dump(state, file),
        step=record.step,
        attempt="9.9",
        info=record.info,
        names=["epoch-1"],
    )
    report = reproduce(str(run), 1, launcher=launcher, cwd=ROOT)
    (found,) = report.differences
    assert "model.0.weight: 1 of 32 elements" in found and "9.9" in found


def test_without_an_earlier_checkpoint_it_says_what_to_set(launcher: Launcher, run: Path) -> None:
    store = CheckpointStore(str(run / "checkpoints"))
    for record in store.records():
        if record.progress["epochs"] < 3:
            (run / "checkpoints" / "records" / f"{record.name}.json").unlink()
    with pytest.raises(ConfigError, match="save_interval=1"):
        reproduce(str(run), 1, launcher=launcher, cwd=ROOT)
    report = reproduce(str(run), 1, from_start=True, launcher=launcher, cwd=ROOT)
    assert report.is_identical and report.replayed == 2 and "weights were not compared" in report.notes[-1]
    with pytest.raises(NotFound, match="0 to 2"):
        reproduce(str(run), 7, launcher=launcher, cwd=ROOT)


def test_differences_are_told_by_place() -> None:
    ours = {"a": [1.0, float("nan")], "b": torch.tensor([0.0, 1.0]), "progress": {"seconds": 1.0}}
    theirs = {"a": [1.0, float("nan")], "b": torch.tensor([-0.0, 1.0]), "progress": {"seconds": 2.0}}
    assert differences(ours, ours) == []
    assert differences(ours, theirs) == ["b: 1 of 2 elements differ"]
