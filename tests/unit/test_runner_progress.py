"""Three ways to end, what is counted on the way, and schedulers that follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from danling_core.data.lengths import Lengths
from danling_core.errors import ConfigError
from danling_core.train.progress import Progress
from tests.small_runner import SmallRunner, config, events

KINDS = ["sized", "stream"]


# An epoch has 4 batches of 5, the last of them smaller where there are 18 samples.
@pytest.mark.holds("attributes-6", "training-12", "bugs-2", "bugs-10")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fields", "counters", "keys"),
    [
        ({"epoch_end": 3}, (12, 12, 3), [0, 1, 2]),
        ({"step_end": 6}, (6, 6, 1), [4, 6]),
        ({"step_end": 8}, (8, 8, 2), [4, 8]),
        ({"iter_end": 7}, (7, 7, 1), [4, 7]),
        ({"epoch_end": 2, "accum_steps": 3}, (8, 4, 2), [0, 1]),
        ({"step_end": 3, "accum_steps": 3}, (7, 3, 1), [2, 3]),
        ({"iter_end": 6, "accum_steps": 4}, (6, 2, 1), [1, 2]),
        ({"iter_end": 9, "accum_steps": 2}, (9, 5, 2), [2, 4, 5]),
        ({"epoch_end": 2, "steps_per_epoch": 3}, (6, 6, 2), [0, 1]),
        ({"step_end": 7, "steps_per_epoch": 3}, (7, 7, 2), [3, 6, 7]),
        ({"step_end": 7, "evaluate_interval_steps": 3}, (7, 7, 1), [3, 6, 7]),
    ],
)
def test_each_end_drives_the_loop(
    fields: dict[str, Any], counters: tuple[int, int, int], keys: list[int], kind: str, tmp_path: Path
) -> None:
    runner = SmallRunner(config(tmp_path, params={"samples": 18, "kind": kind}, **fields))
    results = runner.train()
    iters, steps, epochs = counters
    if kind == "stream" and fields == {"step_end": 8}:
        epochs = 1  # that the second pass is over is known once there is no batch after its last
    assert (runner.iters, runner.steps, runner.epochs) == (iters, steps, epochs)
    assert list(results) == keys
    assert runner.progress == 1.0
    assert len(runner.gradients) == steps
    assert len(runner.step_losses) == iters


@pytest.mark.holds("attributes-7")
@pytest.mark.parametrize(
    ("fields", "iters", "steps", "epochs"),
    [
        ({"epoch_end": 3, "accum_steps": 3}, 12, 6, 3),
        ({"step_end": 5, "accum_steps": 3}, 11, 5, 3),
        ({"iter_end": 9, "accum_steps": 2}, 9, 5, 3),
        ({"epoch_end": 2, "steps_per_epoch": 3}, 6, 6, 2),
    ],
)
def test_the_other_ends_follow_from_the_one_that_is_given(
    fields: dict[str, Any], iters: int, steps: int, epochs: int, tmp_path: Path
) -> None:
    runner = SmallRunner(config(tmp_path, **fields))
    assert (runner.iter_end, runner.step_end, runner.epoch_end) == (iters, steps, epochs)
    assert (runner.iter_begin, runner.step_begin, runner.epoch_begin) == (0, 0, 0)
    assert (runner.total_iters, runner.total_steps, runner.total_epochs) == (iters, steps, epochs)
    assert runner.progress == 0.0
    runner.train()
    assert runner.iters == iters and runner.steps == steps
    assert (runner.total_iters, runner.total_steps, runner.total_epochs) == (iters, steps, epochs)


@pytest.mark.holds("attributes-7")
def test_ends_of_unsized_data_are_not_known(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, params={"kind": "stream"}, epoch_end=3))
    assert (runner.epoch_end, runner.step_end, runner.iter_end) == (3, None, None)
    assert (runner.total_epochs, runner.total_steps, runner.total_iters) == (3, None, None)
    assert runner.steps_per_epoch is None


def test_asking_for_totals_before_there_is_data_does_not_fix_them(tmp_path: Path) -> None:
    class Early(SmallRunner):
        def init_distributed(self) -> None:
            super().init_distributed()
            self.datasets = {}
            assert self.total_steps is None

    assert Early(config(tmp_path)).total_steps == 8


@pytest.mark.holds("attributes-6")
@pytest.mark.parametrize("given", [{}, {"epoch_end": 1, "step_end": 2}])
def test_exactly_one_end_is_given(given: dict[str, int], tmp_path: Path) -> None:
    values = {"project_root": str(tmp_path), "epoch_end": None, **given}
    with pytest.raises(ConfigError, match=r"epoch_end.*step_end"):
        SmallRunner(values)


@pytest.mark.holds("attributes-8")
def test_progress_grows_within_an_epoch(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watched(SmallRunner):
        def after_step(self) -> None:
            seen.append(self.progress)

    Watched(config(tmp_path)).train()
    assert seen == [i / 8 for i in range(1, 9)]


@pytest.mark.holds("attributes-9")
def test_counters_survive_a_resume_and_begin_does_not_move(tmp_path: Path) -> None:
    class Stops(SmallRunner):
        def train_step(self, data: Any) -> Any:
            if self.steps == 6 and not self.resumed:
                raise KeyboardInterrupt
            return super().train_step(data)

    with pytest.raises(KeyboardInterrupt):
        Stops(config(tmp_path, epoch_end=3)).train()
    runner = Stops(config(tmp_path, epoch_end=3))
    runner.train()
    assert runner.resumed is not None and runner.resumed["epoch"] == 1
    assert (runner.iters, runner.steps, runner.epochs) == (12, 12, 3)
    assert (runner.iter_begin, runner.step_begin, runner.epoch_begin) == (0, 0, 0)
    assert list(runner.results) == [0, 1, 2]


@pytest.mark.holds("attributes-8")
def test_progress_counts_from_where_it_began() -> None:
    progress = Progress("step", 10, steps=6, step_begin=2)
    assert progress.fraction() == 0.5 and not progress.finished
    progress.steps = 12
    assert progress.fraction() == 1.0 and progress.finished


@pytest.mark.parametrize("steps", range(9))
def test_lengths_convert_there_and_back(steps: int) -> None:
    lengths = Lengths(iters=4, steps=2, accum_steps=3)
    assert lengths.iters_to_steps(lengths.steps_to_iters(steps)) == steps
    assert Lengths(None, None, 3).steps_to_iters(steps) == 3 * steps


def test_data_without_a_batch_is_refused(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.datasets["train"] = iter_of(())
    with pytest.raises(ConfigError, match="empty"):
        runner.train()


def iter_of(samples: Any) -> Any:
    class Given(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(samples)

    return Given()


@pytest.mark.holds("methods-2")
def test_several_train_splits_are_passes_of_one_epoch(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, epoch_end=2))
    runner.datasets["train_more"] = runner.datasets["train"]
    results = runner.train()
    assert runner.steps == 16 and runner.total_steps == 16
    assert list(results[1]) == ["train", "train_more", "val"]


def test_the_end_in_steps_holds_with_several_train_splits(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, step_end=6))
    runner.datasets["train_more"] = runner.datasets["train"]
    runner.train()
    assert runner.steps == 6 and set(runner.results[6]) == {"train", "train_more", "val"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step_end": 3}, "ends before 'train_more' begins"),
        ({"step_end": 9, "evaluate_interval_steps": 3}, "evaluate_interval_steps goes with one split"),
    ],
)
def test_a_split_that_steps_would_never_come_to_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    runner = SmallRunner(config(tmp_path, **fields))
    runner.datasets["train_more"] = runner.datasets["train"]
    with pytest.raises(ConfigError, match=message):
        runner.train()
    assert runner.steps == 0


@pytest.mark.holds("methods-2")
def test_a_split_may_be_named_alone(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, epoch_end=1))
    assert list(runner.train("train", "val")[0]) == ["train", "val"]


def test_a_split_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split 'dev' has no data"):
        SmallRunner(config(tmp_path)).train(evaluate_splits=["dev"])


@pytest.mark.holds("training-12")
def test_evaluate_every_leaves_out_epochs_but_never_the_last(tmp_path: Path) -> None:
    results = SmallRunner(config(tmp_path, epoch_end=5, evaluate_every=2)).train()
    assert [index for index, result in results.items() if "val" in result] == [1, 3, 4]


# schedulers -------------------------------------------------------------------------------------------------
@pytest.mark.holds("training-6")
def test_a_schedule_per_step_moves_each_step(tmp_path: Path) -> None:
    fields = {"optim": {"name": "sgd", "lr": 0.1}, "scheduler": {"name": "linear"}}
    runner = SmallRunner(config(tmp_path, **fields))
    runner.train()
    assert runner.rates == pytest.approx([0.1 * (1 - i / 8) for i in range(8)])


@pytest.mark.holds("training-6")
def test_a_schedule_of_torch_counts_epochs_unless_told(tmp_path: Path) -> None:
    scheduler: dict[str, Any] = {"name": "StepLR", "step_size": 1, "gamma": 0.5}
    runner = SmallRunner(config(tmp_path, scheduler=scheduler))
    runner.train()
    assert runner.rates == pytest.approx([0.1] * 4 + [0.05] * 4)
    each = SmallRunner(config(tmp_path, scheduler={**scheduler, "interval": "step"}))
    each.train()
    assert each.rates == pytest.approx([0.1 * 0.5**i for i in range(8)])


@pytest.mark.holds("attributes-12")
@pytest.mark.parametrize(("interval", "rates"), [(None, [0.1] * 4 + [0.05] * 4), ("step", [0.1, 0.05])])
def test_a_schedule_set_by_hand_follows_the_same_rule(
    interval: str | None, rates: list[float], tmp_path: Path
) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.scheduler = torch.optim.lr_scheduler.StepLR(runner.optimizer, 1, gamma=0.5)
    runner.scheduler_interval = interval
    runner.train()
    assert runner.rates[: len(rates)] == pytest.approx(rates)


def test_in_step_mode_a_schedule_counts_steps(tmp_path: Path) -> None:
    scheduler = {"name": "StepLR", "step_size": 2, "gamma": 0.5}
    runner = SmallRunner(config(tmp_path, step_end=6, scheduler=scheduler))
    runner.train()
    assert runner.rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])


@pytest.mark.holds("training-6")
@pytest.mark.parametrize("score_name", ["loss", "accuracy"])
def test_reduce_on_plateau_follows_the_score_in_its_direction(score_name: str, tmp_path: Path) -> None:
    values = {"loss": [1.0, 2.0, 2.0], "accuracy": [0.5, 0.4, 0.4]}

    class Scripted(SmallRunner):
        def evaluate_epoch(self, split: str = "val") -> dict[str, Any]:
            return {name: of[min(self.epochs, 2)] for name, of in values.items()}

    scheduler = {"name": "ReduceLROnPlateau", "patience": 0}
    runner = Scripted(config(tmp_path, epoch_end=3, scheduler=scheduler, score_name=score_name))
    runner.train()
    assert [runner.rates[0], runner.rates[4]] == pytest.approx([0.1, 0.1])
    assert runner.rates[8] == pytest.approx(0.01)
    assert runner.scheduler.mode == ("min" if score_name == "loss" else "max")


@pytest.mark.holds("attributes-22")
def test_events_carry_timings_and_results_do_not(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, log_interval=2))
    runner.train()
    progress, finished = events(runner, "progress"), events(runner, "epoch_finished")
    assert 1 <= len(progress) <= 4 and len(finished) == 2  # told at most a few times a second
    names = {
        "seconds",
        "data_wait_seconds",
        "step_seconds",
        "evaluate_seconds",
        "checkpoint_stall_seconds",
        "memory_bytes",
    }
    for event in [*progress, *finished]:
        assert set(event["timings"]) == names
        assert all(value is not None and value >= 0 for value in event["timings"].values())
    assert finished[1]["timings"]["evaluate_seconds"] > 0
    assert all(event["samples_per_second"] > 0 for event in progress)
    assert "timings" not in str(runner.results) and "seconds" not in str(runner.results)
