"""Shorter passes: limit_batches, overfit_batches, fast_dev_run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import danling_core as dl
from tests.small_runner import SmallRunner, config, events, weights


class Seeing(SmallRunner):
    """Keeps the first input of each batch, by kind of step."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.seen: list[float] = []
        self.evaluated: list[float] = []

    def train_step(self, data: Any) -> Any:
        self.seen.append(float(data[0][0, 0]))
        return super().train_step(data)

    def evaluate_step(self, data: Any) -> Any:
        self.evaluated.append(float(data[0][0, 0]))
        return super().evaluate_step(data)


@pytest.mark.parametrize("kind", ["sized", "stream"])
@pytest.mark.parametrize(("limit", "batches"), [(3, 3), (9, 4), (0.5, 2), (1.0, 4), (0.01, 1)])
def test_a_pass_is_as_long_as_it_is_limited(kind: str, limit: Any, batches: int, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"limit_batches": {"train": limit}, "params": {"kind": kind}}
    runner = Seeing(config(tmp_path, **fields))
    if kind == "stream" and isinstance(limit, float):
        with pytest.raises(dl.ConfigError, match=f"limit_batches.train is {limit}, a fraction, and the data"):
            runner.train()
        return
    runner.train()
    assert (runner.iters, runner.steps, runner.epochs) == (2 * batches, 2 * batches, 2)
    assert len(runner.evaluated) == 2 * 2, "7 samples, 5 in a batch"
    if kind == "sized":
        assert runner.total_steps == 2 * batches and runner.progress == 1.0
        assert runner.seen[:batches] != runner.seen[batches:], "each epoch has an order of its own"


def test_the_batches_are_the_first_of_the_whole_pass(tmp_path: Path) -> None:
    whole, limited = Seeing(config(tmp_path)), Seeing(config(tmp_path, limit_batches={"train": 2}))
    whole.train()
    limited.train()
    assert limited.seen == whole.seen[:2] + whole.seen[4:6]
    assert limited.id != whole.id


def test_an_evaluation_and_an_inference_are_limited(tmp_path: Path) -> None:
    runner = Seeing(config(tmp_path, limit_batches={"val": 1}, epoch_end=1))
    runner.train()
    assert len(runner.seen) == 4 and len(runner.evaluated) == 1
    assert len(runner.infer("val")) == 5


@pytest.mark.parametrize(("limit", "steps"), [(3, [2, 4]), (4, [2, 4])])
@pytest.mark.parametrize("kind", ["sized", "stream"])
def test_a_window_ends_with_the_pass(kind: str, limit: int, steps: list[int], tmp_path: Path) -> None:
    runner = SmallRunner(
        config(tmp_path, limit_batches={"train": limit}, accum_steps=2, params={"kind": kind})
    )
    runner.train()
    assert runner.steps == steps[-1] and runner.iters == 2 * limit
    assert [event["timings"]["step_seconds"] is not None for event in events(runner, "epoch_finished")]


def test_step_mode_goes_on_with_the_next_pass(tmp_path: Path) -> None:
    runner = Seeing(config(tmp_path, step_end=5, evaluate_interval_steps=5, limit_batches={"train": 2}))
    runner.train()
    assert (runner.steps, runner.epochs) == (5, 2)
    assert len(set(runner.seen)) > 2


@pytest.mark.parametrize("kind", ["sized", "stream"])
def test_a_resume_inside_a_limited_pass_goes_on(kind: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "limit_batches": {"train": 3},
        "save_interval_steps": 1,
        "epoch_end": 3,
        "params": {"kind": kind, "width": 4, "dropout": 0.3},
    }

    class Stopping(Seeing):
        stops_at: int | None = None

        def after_step(self) -> None:
            if self.steps == self.stops_at:
                self.request_stop()

    whole = Stopping(config(tmp_path / "whole", **fields))
    whole.train()
    Stopping.stops_at = 5
    with pytest.raises(dl.RunInterrupted):
        Stopping(config(tmp_path / "cut", **fields)).train()
    Stopping.stops_at = None
    resumed = Stopping(config(tmp_path / "cut", **fields))
    resumed.train()
    assert resumed.resumed is not None and resumed.resumed["step"] in (5, 6)
    assert weights(resumed) == weights(whole) and resumed.results == whole.results


def test_overfitting_sees_the_same_batches_again_and_again(tmp_path: Path) -> None:
    runner = Seeing(config(tmp_path, overfit_batches=2, epoch_end=30, optim={"name": "adam", "lr": 0.1}))
    runner.train()
    assert runner.seen == runner.seen[:2] * 30
    inputs = [float(sample[0]) for sample, _ in runner.datasets["train"]]
    assert runner.seen[:2] == [inputs[0], inputs[5]], "in the order of the data set"
    assert runner.results[29]["train"]["loss"] < 0.1 < runner.results[0]["train"]["loss"]


@pytest.mark.parametrize(
    ("end", "counters"),
    [({"epoch_end": 50}, (2, 2, 1)), ({"step_end": 50}, (2, 2, 0)), ({"iter_end": 50}, (2, 2, 0))],
)
def test_a_fast_run_tries_everything_once(end: dict[str, int], counters: Any, tmp_path: Path) -> None:
    wanted = config(tmp_path, fast_dev_run=2, **end)
    assert dl.Config.from_yamls(wanted.yamls()) == wanted
    runner = Seeing(wanted)
    runner.train()
    assert (runner.iters, runner.steps) == counters[:2] and len(runner.results) == 1
    assert len(runner.evaluated) == 2
    assert SmallRunner(config(tmp_path, **end)).id != runner.id


def test_a_fast_run_of_data_without_a_length_ends_too(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"steps_per_epoch": 50, "epoch_end": 9, "params": {"kind": "stream"}}
    runner = Seeing(config(tmp_path, fast_dev_run=2, **fields))
    runner.train()
    assert (runner.iters, runner.steps, len(runner.results)) == (2, 2, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"limit_batches": {"train": 0}},
            r"limit_batches.train: wanted a number of batches >= 1, or a fraction",
        ),
        ({"limit_batches": {"train": 1.5}}, r"limit_batches.train: .*found 1.5"),
        ({"limit_batches": {"train": True}}, r"limit_batches.train: .*found true"),
        ({"limit_batches": {"train": "all"}}, r"limit_batches.train: .*found 'all'"),
        ({"limit_batches": 10}, r"limit_batches: wanted a mapping of keys"),
        ({"limit_batches": {"trian": 3}}, r"limit_batches names split 'trian'.*did you mean 'train'"),
        ({"overfit_batches": 0}, r"overfit_batches: wanted a number >= 1"),
        ({"overfit_batches": 2, "limit_batches": {"val": 1}}, r"limit_batches and overfit_batches are both"),
        ({"fast_dev_run": 1, "overfit_batches": 1}, r"overfit_batches and fast_dev_run are both given"),
        ({"fast_dev_run": "yes"}, r"fast_dev_run: wanted a whole number"),
        ({"fast_dev_run": True}, r"fast_dev_run: wanted a number"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(dl.ConfigError, match=message):
        SmallRunner(config(tmp_path, **fields)).train()
    assert not list(tmp_path.iterdir())


def test_a_loader_of_ones_own_is_limited(tmp_path: Path) -> None:
    class Own(Seeing):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for split in ("train", "val"):
                self.dataloaders[split] = torch.utils.data.DataLoader(self.datasets.pop(split), batch_size=4)

    runner = Own(config(tmp_path, limit_batches={"train": 2, "val": 1}, dataloader={}))
    runner.train()
    assert (runner.iters, runner.total_steps, len(runner.evaluated)) == (4, 4, 2)
