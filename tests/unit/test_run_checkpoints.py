"""The checkpoints of a run as its user meets them: named, loaded by name, damaged, of another run."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import CheckpointError, ConfigError
from danling_core.runs.folder import RunFolder, find_checkpoints
from danling_core.tools.prune import plan
from danling_core.tools.transfer import copy_run
from danling_core.tools.verify import verify
from tests.s3_faults import FaultyProxy
from tests.small_runner import SmallRunner, config, events, weights


def store_of(runner: Any) -> CheckpointStore:
    return CheckpointStore(runner.checkpoint_dir)


# elsewhere
def test_checkpoints_of_a_local_run_may_be_kept_in_a_store(
    s3_root: str, s3_proxy: FaultyProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"{s3_root}/checkpoints"
    runner = SmallRunner(config(tmp_path, checkpoint_dir=place, keep_last=1, epoch_end=3))
    runner.train()
    assert not [path for method, path in s3_proxy.requests if method == "GET" and "state.pt" in path]
    assert find_checkpoints(RunFolder(runner.dir)) == place
    assert (
        verify(runner.dir).is_good and verify(runner.dir).checkpoints == len(store_of(runner).records()) > 0
    )
    with pytest.raises(ConfigError, match="would not be copied"):
        copy_run(RunFolder(runner.dir), str(tmp_path / "there"))
    again = SmallRunner.from_checkpoint(runner.dir)
    assert weights(again) == weights(runner)
    assert [each.reason for each in plan(str(tmp_path), keep_best=False)] in ([], [None])


def damage(store: CheckpointStore, name: str) -> str:
    record = store.pointed(name)
    assert record is not None
    path = Path(store.url, "data", record.name, "state.pt")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return record.name


# of another run
def test_a_checkpoint_dir_that_holds_another_runs_checkpoints_is_refused(tmp_path: Path) -> None:
    shared = {"checkpoint_dir": str(tmp_path / "fast")}
    first = SmallRunner(config(tmp_path, seed=1, **shared))
    first.train()
    before = store_of(first).records()
    second = SmallRunner(config(tmp_path, seed=2, **shared))
    with pytest.raises(
        ConfigError, match=f"run {first.identity.run_id}.*leave checkpoint_dir out"
    ) as refused:
        second.train()
    assert store_of(first).records() == before and second.results == {}
    for fields in ({"seed": 2}, {"seed": 3}):
        place = str(refused.value).rpartition(" such as ")[2]
        assert SmallRunner(config(tmp_path, **fields, checkpoint_dir=place)).train()
        with pytest.raises(ConfigError) as refused:
            SmallRunner(config(tmp_path, **{**fields, "seed": 4}, checkpoint_dir=place)).train()


def test_a_run_that_begins_beside_another_one_saves_nothing_into_its_checkpoint_dir(tmp_path: Path) -> None:
    shared = {"checkpoint_dir": str(tmp_path / "fast")}
    intruder = SmallRunner(config(tmp_path, seed=2, **shared))

    class Host(SmallRunner):
        def train_epoch(self, split: str = "train") -> Any:
            if self.steps == 0:  # both have found an empty folder
                with intruder.at_work():
                    self.save_checkpoint()
                    self.run_session.files.drain()
                    intruder.save_checkpoint()
                    with pytest.raises(ConfigError, match="leave checkpoint_dir out"):
                        intruder.run_session.files.drain()
            return super().train_epoch(split)

    host = Host(config(tmp_path, seed=1, **shared))
    host.train()
    assert {record.info["run_id"] for record in store_of(host).records()} == {host.identity.run_id}


def test_a_run_resumes_from_a_checkpoint_dir_of_its_own(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"checkpoint_dir": str(tmp_path / "fast"), "params": {"nan_at_step": 6}}
    with pytest.raises(ArithmeticError):
        SmallRunner(config(tmp_path, **fields)).train()
    again = SmallRunner(config(tmp_path, **fields))
    with pytest.raises(ArithmeticError):
        again.train()
    assert again.resumed is not None and again.resumed["step"] == 4


# named by the user
class Naming(SmallRunner):
    """Saves by a name of its own in step 5, the first of the second epoch."""

    def train_step(self, data: Any) -> Any:
        if self.steps == 4:
            self.save_checkpoint("before-finetune")
        return super().train_step(data)


def test_what_the_user_named_stays_and_best_stays_with_its_scored_state(tmp_path: Path) -> None:
    runner = Naming(config(tmp_path, epoch_end=6, keep_last=1))
    runner.train()
    store = store_of(runner)
    mine, best = store.pointed("before-finetune"), store.pointed("best")
    assert mine is not None and mine.step == 5 and "best" not in mine.names
    assert best is not None and best.info["inside"] is None
    store.verify(mine)


@pytest.mark.parametrize("fields", [{}, {"checkpoint_dir_name": "ck"}])
def test_checkpoints_are_loaded_by_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    runner = SmallRunner(config(tmp_path, epoch_end=3, save_interval=1, **fields))
    runner.train()
    other = SmallRunner(config(tmp_path / "other", epoch_end=3))
    other.load_checkpoint(f"{runner.checkpoint_dir}/epoch-1")
    assert other.epochs == 2
    record = store_of(runner).pointed("epoch-0")
    assert record is not None
    other.load_checkpoint(f"{runner.checkpoint_dir}/{record.name}")
    assert other.epochs == 1
    other.load_checkpoint(runner.dir)
    assert other.epochs == 3 and weights(other) == weights(runner)
    assert SmallRunner.from_checkpoint(f"{runner.checkpoint_dir}/epoch-1").config == runner.config
    with pytest.raises(CheckpointError, match="no committed checkpoint at .*epoch-9"):
        other.load_checkpoint(f"{runner.checkpoint_dir}/epoch-9")


def test_checkpoints_beside_a_config_of_another_program_are_loaded(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.train()
    shutil.copytree(runner.checkpoint_dir, tmp_path / "export" / "checkpoints")
    (tmp_path / "export" / "config.yaml").write_text("model_type: bert\n")
    other = SmallRunner(config(tmp_path / "other"))
    other.load_pretrained(tmp_path / "export")
    assert weights(other) == weights(runner)


# what they hold
class Remembering(SmallRunner):
    """Has state of its own."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.memory = torch.zeros(3)

    def train_step(self, data: Any) -> Any:
        self.memory += 1
        return super().train_step(data)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "memory": self.memory}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.memory = state["memory"]


def test_state_of_the_users_own_is_saved_and_restored(tmp_path: Path) -> None:
    Remembering(config(tmp_path)).train()
    again = Remembering(config(tmp_path))
    again.train()  # complete: takes up the last checkpoint
    assert again.memory.tolist() == [8.0] * 3


def test_a_checkpoint_of_a_newer_version_is_refused_clearly(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.train()
    with pytest.raises(CheckpointError, match="version 99.*update"):
        runner.load_checkpoint({**runner.state_dict(), "version": 99, "ranks": []})


def test_a_checkpoint_of_another_kind_of_device_is_no_longer_bitwise(tmp_path: Path) -> None:
    first = SmallRunner(config(tmp_path))
    first.train()
    from danling_core.runner.loading import read

    other = SmallRunner(config(tmp_path / "other"))
    other.load_checkpoint({**read(first.dir), "device": "cuda"})
    assert not other.bitwise


# what goes wrong
def test_the_evaluate_stage_goes_on_without_a_damaged_best(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"epoch_end": 3, "params": {"nan_at_step": 11}}
    runner = SmallRunner(config(tmp_path, **fields))
    with pytest.raises(ArithmeticError):
        runner.train()
    store = store_of(runner)
    first = next(record for record in store.records() if record.step == 4)
    store.point("best", first)
    damage(store, "best")
    later = SmallRunner(config(tmp_path, **fields))
    later.run(["evaluate"])
    said = json.loads(Path(later.dir, "evaluation.json").read_text())
    newest = store.pointed("latest")
    assert newest is not None and said["checkpoint"] == newest.name
    assert "the newest good one takes its place" in Path(later.dir, "run.log").read_text()


class LosesItsBest(SmallRunner):
    """Its newest checkpoint, which is the best, is damaged before it is evaluated."""

    def _load_best(self) -> Any:
        damage(store_of(self), "best")
        return super()._load_best()


def test_an_evaluation_names_the_result_of_the_checkpoint_that_it_fell_back_to(tmp_path: Path) -> None:
    runner = LosesItsBest(config(tmp_path, epoch_end=3))
    runner.run()
    before = store_of(runner).records()[1]
    assert runner.best_index == 2 and before.names == ("latest", "best")
    said = json.loads(Path(runner.dir, "evaluation.json").read_text())
    assert (said["checkpoint"], said["index"]) == (before.name, 1)


def test_old_checkpoints_that_cannot_be_removed_do_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, refused = shutil.rmtree, []

    def busy(path: str, *options: Any, **named: Any) -> None:
        if "checkpoints" not in path:
            remove(path, *options, **named)
            return
        refused.append(path)
        raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        runner = SmallRunner(config(tmp_path, epoch_end=5, keep_last=1))
        runner.train()
    assert refused and events(runner)[-1]["event"] == "completed"


class Failing(SmallRunner):
    """Its background save in step 2 fails, for good."""

    def train_step(self, data: Any) -> Any:
        if self.steps == 1:
            saver = self.run_session.files._saver
            saver._store.publish = _full
            self.save_checkpoint()
        return super().train_step(data)


def _full(*_: Any, **__: Any) -> Any:
    raise CheckpointError("the disk is full")


def test_a_save_that_failed_in_the_background_surfaces_at_the_next_log_point(tmp_path: Path) -> None:
    runner = Failing(config(tmp_path, log_interval=1))
    with pytest.raises(CheckpointError, match="disk is full"):
        runner.train()
    assert 2 <= runner.steps < 8  # the save begins at the end of step 2, in another thread
