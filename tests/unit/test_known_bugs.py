"""Bugs of earlier systems of this kind (section 6 of the specification), each of which must stay away.

Those that belong to one module are tested there; docs/spec-coverage.md says where.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from danling_core.checkpoints.store import CheckpointStore
from danling_core.config import Config
from danling_core.errors import DanLingError
from danling_core.train.meters import LossMeter
from tests.small_runner import SmallRunner, config, events, weights


# checkpoints -----------------------------------------------------------------------------------------------
@pytest.mark.holds("config-6", "bugs-5")
def test_latest_is_saved_every_epoch_without_any_interval(tmp_path: Path) -> None:
    seen: list[int] = []

    class Waits(SmallRunner):
        def save_checkpoint(self, *given: Any, **named: Any) -> None:
            super().save_checkpoint(*given, **named)
            self.run_session.files.drain()
            record = CheckpointStore(self.checkpoint_dir).pointed("latest")
            assert record is not None
            seen.append(record.step)

    runner = Waits(config(tmp_path, epoch_end=3))
    runner.train()
    assert runner.save_interval is None and seen == [4, 8, 12]


@pytest.mark.holds("methods-19", "bugs-5")
def test_a_failed_save_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CheckpointStore, "publish", full)
    runner = SmallRunner(config(tmp_path))
    with pytest.raises((DanLingError, OSError), match="No space left"):
        runner.train()
    status = json.loads(Path(runner.dir, "status.json").read_text())
    assert status["status"] == "failed"
    assert not events(runner, "completed")


@pytest.mark.holds("bugs-5")
def test_best_is_the_state_that_was_best_and_not_a_stale_latest(tmp_path: Path) -> None:
    kept: dict[int, list[float]] = {}

    class Scripted(SmallRunner):
        def evaluate_epoch(self, split: str = "val") -> dict[str, Any]:
            kept[self.epochs] = weights(self)
            return {"loss": [3.0, 1.0, 2.0][self.epochs]}

    runner = Scripted(config(tmp_path, epoch_end=3))
    runner.train()
    best = Scripted(config(tmp_path / "twin"))
    best.load_pretrained(runner.dir)
    assert weights(best) == kept[1] != kept[2]


class Stops(SmallRunner):
    """Is interrupted in step 6, inside the second epoch, the first time."""

    stops = True

    def train_step(self, data: Any) -> Any:
        if self.stops and self.steps == 6 and not self.resumed:
            self.request_stop()
        return super().train_step(data)


FIELDS: dict[str, Any] = {
    "epoch_end": 3,
    "params": {"width": 4, "dropout": 0.4, "batch_norm": True, "samples": 22},
    "optim": {"name": "adamw", "lr": 0.05},
    "scheduler": {"name": "cosine", "warmup_steps": 2},
    "ema_decay": 0.8,
    "precision": "fp16",
    "accum_steps": 1,
    "log_interval": 3,
}


@pytest.mark.holds("bugs-6")
def test_a_resume_inside_an_epoch_changes_no_bit(tmp_path: Path) -> None:
    whole = Stops(config(tmp_path / "whole", **FIELDS))
    whole.stops = False
    whole.train()
    first = Stops(config(tmp_path, **FIELDS))
    with pytest.raises(DanLingError, match="asked to stop"):
        first.train()
    again = Stops(config(tmp_path, **FIELDS))
    again.train()
    assert again.resumed is not None and again.resumed["step"] == 8
    assert weights(again) == weights(whole)
    assert again.results == whole.results
    for part in ("ema", "optimizer", "scheduler", "scalers", "progress"):
        ours, theirs = again.state_dict()[part], whole.state_dict()[part]
        if part == "progress":
            ours, theirs = ({**state, "seconds": 0} for state in (ours, theirs))
        assert repr(ours) == repr(theirs), part


@pytest.mark.holds("bugs-6")
def test_the_same_runner_may_go_on_after_an_interruption(tmp_path: Path) -> None:
    whole = Stops(config(tmp_path / "whole", **FIELDS))
    whole.stops = False
    whole.train()
    runner = Stops(config(tmp_path, **FIELDS))
    with pytest.raises(DanLingError, match="asked to stop"):
        runner.train()
    runner.train()
    assert weights(runner) == weights(whole) and runner.results == whole.results


@pytest.mark.holds("bugs-6")
def test_there_is_no_phantom_checkpoint_after_the_last_epoch(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, epoch_end=2, save_interval=1))
    runner.train()
    found = {
        event["record"]: (event["step"], event["epochs"]) for event in events(runner, "checkpoint_committed")
    }
    assert sorted(found.values()) == [(4, 1), (8, 2)]
    assert {path.stem for path in Path(runner.checkpoint_dir).glob("epoch*")} == {"epoch-0", "epoch-1"}


@pytest.mark.holds("bugs-6")
def test_a_resumed_run_does_not_overwrite_best_by_something_worse(tmp_path: Path) -> None:
    class Scripted(SmallRunner):
        def evaluate_epoch(self, split: str = "val") -> dict[str, Any]:
            if self.epochs == 1 and not self.resumed:
                raise KeyboardInterrupt
            return {"loss": float(self.epochs + 1)}

    with pytest.raises(KeyboardInterrupt):
        Scripted(config(tmp_path, epoch_end=3)).train()
    runner = Scripted(config(tmp_path, epoch_end=3))
    runner.train()
    record = CheckpointStore(runner.checkpoint_dir).pointed("best")
    assert record is not None and record.step == 4 and runner.best_index == 0


# identity --------------------------------------------------------------------------------------------------
@pytest.mark.holds("bugs-8")
def test_the_id_follows_the_code_and_not_the_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "import tests.small_runner\nclass Mine(tests.small_runner.SmallRunner):\n    pass\n"
    ids = []
    for text in (source, source, source + "# edited\n"):
        (tmp_path / "own_code.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        sys.modules.pop("own_code", None)
        import own_code  # type: ignore[import-not-found]

        values = {**config(tmp_path / "runs").dict(), "experiment_id": None, "epoch_end": 1}
        runner = own_code.Mine(Config.from_dict(values))
        before = runner.id
        runner.train()
        assert runner.id == before
        ids.append(before)
    assert ids[0] == ids[1] != ids[2]


# devices and data ------------------------------------------------------------------------------------------


# the hot loop ----------------------------------------------------------------------------------------------


class Plain(SmallRunner):
    """Without what `SmallRunner` keeps for tests, which reads tensors."""

    train_step = SmallRunner.__mro__[1].train_step  # type: ignore[attr-defined]
    backward = SmallRunner.__mro__[1].backward  # type: ignore[attr-defined]


class OnDevice:
    """A loss that is somewhere else: reading it would wait."""

    is_cpu = False

    def __init__(self, value: float) -> None:
        self.value = value

    def numel(self) -> int:
        return 1

    def detach(self) -> torch.Tensor:
        return torch.tensor(self.value)


@pytest.mark.holds("bugs-11")
def test_a_loss_on_a_device_waits_until_somebody_asks() -> None:
    meter = LossMeter()
    for value in range(5):
        meter.add(OnDevice(float(value)), 2)  # type: ignore[arg-type]
    assert (meter.iters, meter.count) == (0, 0)
    assert meter.mean == 2.0 and meter.iters == 5


class CountingConfig:
    def __init__(self, wrapped: Any, calls: Counter[str]) -> None:
        self.__dict__.update(wrapped=wrapped, calls=calls)

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self.wrapped, name)


def lookups(root: Path, batches: int) -> Counter[str]:
    runner = Plain(config(root, params={"samples": 5 * batches}, log_interval=10_000))
    runner.train("train", [])
    calls: Counter[str] = Counter()
    runner.config = CountingConfig(runner.config, calls)  # type: ignore[assignment]
    runner.close()
    runner.train_epoch("train")
    return calls


@pytest.mark.holds("bugs-11")
def test_the_config_is_not_looked_up_in_the_hot_loop(tmp_path: Path) -> None:
    assert lookups(tmp_path / "few", 4) == lookups(tmp_path / "many", 40)


# endings ---------------------------------------------------------------------------------------------------
@pytest.mark.holds("bugs-12")
def test_writers_and_threads_are_closed(tmp_path: Path) -> None:
    import threading

    before = set(threading.enumerate())
    runner = SmallRunner(config(tmp_path, tensorboard=True))
    closed: list[str] = []
    runner_make = type(runner).init_tensorboard

    def init_tensorboard() -> None:
        runner_make(runner)
        for writer in runner.run_session.files._writers.writers:
            close = writer.close
            name = type(writer).__name__
            writer.close = lambda close=close, name=name: (closed.append(name), close())  # type: ignore[method-assign, misc]

    runner.init_tensorboard = init_tensorboard  # type: ignore[method-assign]
    runner.train()
    assert {"EventLog", "TensorBoardWriter"} <= set(closed)
    assert set(threading.enumerate()) <= before
