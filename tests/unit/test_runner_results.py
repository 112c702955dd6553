"""Results, scores and what is kept of them: as the runner reports, saves, restores and prints them."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from danling_core.errors import ConfigError
from tests.small_runner import SmallRunner, config, events


class Scripted(SmallRunner):
    """Reports val losses that a test gives, one for each epoch."""

    losses: list[float] = []

    def evaluate_epoch(self, split: str = "val") -> dict[str, Any]:
        return {"loss": self.losses[min(self.epochs, len(self.losses) - 1)], "accuracy": 0.5}


def scripted(root: Path, losses: list[float], **fields: Any) -> Scripted:
    runner = Scripted(config(root, epoch_end=len(losses), **fields))
    runner.losses = losses
    runner.train()
    return runner


@pytest.mark.holds("attributes-19")
def test_results_are_kept_by_epoch_from_0_with_scores_and_best(tmp_path: Path) -> None:
    runner = scripted(tmp_path, [3.0, 1.0, 2.0])
    assert list(runner.results) == [0, 1, 2]
    assert runner.scores == {0: 3.0, 1: 1.0, 2: 2.0}
    assert (runner.best_index, runner.best_score, runner.latest_score) == (1, 1.0, 2.0)
    assert not runner.is_best and runner.best_fn is min
    assert runner.best_result is not None and runner.best_result["index"] == 1
    assert runner.latest_result is not None and runner.latest_result["index"] == 2
    assert runner.latest_result["val"] == {"loss": 2.0, "accuracy": 0.5}
    assert (runner.score_split, runner.score_name) == ("val", "loss")


@pytest.mark.holds("attributes-19", "bugs-1", "bugs-7")
@pytest.mark.parametrize(
    ("losses", "best"),
    [([math.nan, 2.0, 2.0], 1), ([0.0, 0.0], 0), ([1.0, 1.0 - 1e-12], 1), ([math.nan], None)],
)
def test_nan_is_never_best_ties_go_to_the_earliest_and_compare_exactly(
    losses: list[float], best: int | None, tmp_path: Path
) -> None:
    runner = scripted(tmp_path, losses)
    assert runner.best_index == best
    assert runner.is_best == (best == len(losses) - 1)


@pytest.mark.holds("methods-14", "files-2")
def test_files_hold_the_results_as_valid_json(tmp_path: Path) -> None:
    runner = scripted(tmp_path, [math.nan, 1.0, 2.0])
    kept = json.loads(Path(runner.dir, "results.json").read_text(), parse_constant=pytest.fail)
    assert {kept[key] for key in ("name", "id", "timestamp")} == {runner.name, runner.id, runner.timestamp}
    assert kept["results"]["0"]["val"]["loss"] == "NaN"
    assert json.loads(Path(runner.dir, "best.json").read_text())["index"] == 1
    assert json.loads(Path(runner.dir, "latest.json").read_text())["index"] == 2
    status = json.loads(Path(runner.dir, "status.json").read_text())
    assert (status["status"], status["best_index"], status["score_mode"]) == ("complete", 1, "min")


@pytest.mark.holds("attributes-21")
def test_a_run_that_is_complete_returns_its_history_with_integer_keys(tmp_path: Path) -> None:
    first = scripted(tmp_path, [3.0, math.nan])
    again = Scripted(config(tmp_path, epoch_end=2))
    results = again.train()
    assert again.dir == first.dir and again.gradients == first.gradients
    assert list(results) == [0, 1] and math.isnan(results[1]["val"]["loss"])
    assert (again.best_index, again.timestamp, again.epochs) == (0, first.timestamp, 2)


@pytest.mark.holds("levels-4", "bugs-6")
def test_history_best_and_patience_survive_a_resume(tmp_path: Path) -> None:
    class Stops(Scripted):
        def train_epoch(self, split: str = "train") -> dict[str, Any]:
            if self.epochs == 2 and not self.resumed:
                raise KeyboardInterrupt
            return super().train_epoch(split)

    losses = [1.0, 2.0, 2.0, 2.0, 2.0]
    first = Stops(config(tmp_path, epoch_end=5, patience=3))
    first.losses = losses
    with pytest.raises(KeyboardInterrupt):
        first.train()
    again = Stops(config(tmp_path, epoch_end=5, patience=3))
    again.losses = losses
    again.train()
    assert again.timestamp == first.timestamp
    assert list(again.results) == [0, 1, 2, 3]  # patience counted on
    assert (again.best_index, again.best_score) == (0, 1.0)
    best = [event for event in events(again, "checkpoint_committed") if "best" in event["names"]]
    assert [event["step"] for event in best] == [4]


@pytest.mark.holds("attributes-20")
@pytest.mark.parametrize(
    ("splits", "score_split"),
    [
        (["train", "val", "dev"], "val"),
        (["train", "dev", "validate"], "validate"),
        (["train", "dev"], "dev"),
        (["train"], "train"),
    ],
)
def test_the_score_split_falls_back(splits: list[str], score_split: str, tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, epoch_end=1))
    data = runner.datasets["train"]
    runner.datasets = dict.fromkeys(splits, data)
    runner.train()
    assert runner.score_split == score_split
    assert list(runner.scores) == [0]


@pytest.mark.holds("attributes-20")
def test_older_names_of_the_score_are_accepted(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, index_set="train", index="accuracy", epoch_end=1))
    assert (runner.score_split, runner.score_name, runner.best_fn) == ("train", "accuracy", max)
    runner.train()
    assert runner.best_score == runner.results[0]["train"]["accuracy"]


@pytest.mark.holds("attributes-20")
def test_a_score_whose_direction_nobody_knows_must_be_stated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="score_mode"):
        SmallRunner(config(tmp_path, score_name="wobble"))
    assert SmallRunner(config(tmp_path, score_name="wobble", score_mode="max")).best_fn is max


@pytest.mark.holds("attributes-20")
def test_a_score_that_is_not_reported_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"score_name is 'acc', but split 'val' reports .*accuracy"):
        SmallRunner(config(tmp_path, score_name="acc")).train()


@pytest.mark.holds("methods-14")
def test_append_result_merges_and_its_index_defaults_to_the_epoch(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.append_result({"val": {"loss": 2.0}})
    runner.append_result({"val": {"accuracy": 0.5}}, index=0)
    runner.append_result({"val": {"loss": 1.0}}, index=3)
    assert runner.results == {0: {"val": {"loss": 2.0, "accuracy": 0.5}}, 3: {"val": {"loss": 1.0}}}
    assert runner.best_index == 3


@pytest.mark.holds("attributes-21")
def test_in_step_mode_the_key_is_the_completed_steps(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, step_end=5, evaluate_interval_steps=2))
    assert list(runner.train()) == [2, 4, 5]


@pytest.mark.holds("attributes-25", "config-6")
def test_checkpoints_are_numbered_from_0_and_kept_by_interval(tmp_path: Path) -> None:
    runner = scripted(tmp_path, [5.0, 4.0, 3.0, 4.0], save_interval=2)
    pointers = {path.stem for path in Path(runner.checkpoint_dir).glob("*.json")}
    assert pointers == {"latest", "best", "epoch-1", "epoch-3"}
    names = [event["names"] for event in events(runner, "checkpoint_committed")]
    assert names[-1] == ["latest", "epoch-3"]


@pytest.mark.holds("config-6")
def test_step_mode_keeps_epochs_too(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, step_end=8, save_interval=1))
    runner.train()
    assert {path.stem for path in Path(runner.checkpoint_dir).glob("epoch*")} == {"epoch-0", "epoch-1"}


@pytest.mark.holds("attributes-26", "methods-15")
def test_step_and_epoch_results_tell_the_running_loss_and_metrics(tmp_path: Path) -> None:
    seen: list[tuple[Any, Any]] = []

    class Tells(SmallRunner):
        def train_step(self, data: Any) -> Any:
            answer = super().train_step(data)
            seen.append((self.get_step_result(), self.get_epoch_result()))
            assert self.get_epoch_result() == seen[-1][1]  # asking changes nothing
            return answer

    runner = Tells(config(tmp_path, epoch_end=1))
    runner.train()
    means = [sum(runner.step_losses[: n + 1]) / (n + 1) for n in range(4)]
    assert [step["loss"] for step, _ in seen] == pytest.approx(means)
    assert all(step == epoch for step, epoch in seen)
    assert seen[-1][1] == runner.results[0]["train"]


@pytest.mark.holds("methods-9")
def test_step_log_logs_a_line_and_draws_a_curve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Logs(SmallRunner):
        def train_step(self, data: Any) -> Any:
            answer = super().train_step(data)
            self.step_log("train", self.iters, 4)
            return answer

    points: list[tuple[str, float, int]] = []

    class Board:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            points.append((tag, value, step))

    runner = Logs(config(tmp_path, epoch_end=1))
    runner.writer = Board()
    logging.getLogger("danling").addHandler(caplog.handler)
    try:
        runner.train()
    finally:
        logging.getLogger("danling").removeHandler(caplog.handler)
    assert "train 3/4 | loss" in caplog.text
    assert [tag for tag, _, _ in points] == ["train_steps/loss", "train_steps/accuracy"] * 4
    assert [step for _, _, step in points] == [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.holds("methods-9")
@pytest.mark.parametrize(
    ("kind", "lines"), [("sized", ["train 1/4 |", "val 2/2 |"]), ("stream", ["train 1 |", "val 2 |"])]
)
def test_step_log_finds_the_length_of_a_pass_by_itself(tmp_path: Path, kind: str, lines: list[str]) -> None:
    class Logs(SmallRunner):
        evaluated = 0

        def train_step(self, data: Any) -> Any:
            answer = super().train_step(data)
            self.step_log("train", self.iters)
            return answer

        def evaluate_step(self, data: Any) -> Any:
            self.evaluated += 1
            self.step_log("val", self.evaluated)
            return super().evaluate_step(data)

    runner = Logs(config(tmp_path, epoch_end=1, params={"kind": kind}))
    runner.train()
    log = Path(runner.dir, "run.log").read_text()
    assert [line for line in lines if line not in log] == []


@pytest.mark.holds("methods-9")
def test_write_result_expands_lists_and_maps(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    points: dict[str, float] = {}
    runner.write_result({"loss": 1.0}, "val")  # without a board: nothing happens

    class Board:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            points[tag] = value

    runner.writer = Board()
    runner.write_result({"loss": 1, "recall": [0.5, 0.25], "task": {"f1": 0.75}}, "val", steps=3)
    runner.write_score("extra", 2, "val")
    assert points == {
        "val/loss": 1.0,
        "val/recall/0": 0.5,
        "val/recall/1": 0.25,
        "val/task/f1": 0.75,
        "val/extra": 2.0,
    }


@pytest.mark.holds("methods-14", "methods-16")
def test_lines_for_people(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = SmallRunner(config(tmp_path))
    assert runner.format_step_result({"loss": 0.5}, "train", 3, 20) == "train  3/20 | loss 0.5000"
    assert runner.format_epoch_result({"val": {"loss": 0.5}}, 1, 30) == "epoch  1/30 | val loss 0.5000"
    assert runner.format_result() == "no results yet"
    runner.append_result({"val": {"loss": 0.25}}, 0)
    assert "0.2500" in runner.format_result() and "latest" in runner.format_result()
    assert "0.7500" in runner.format_result({"val": {"loss": 0.75}})
    logging.getLogger("danling").addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "danling"):
        runner.print_result()
    logging.getLogger("danling").removeHandler(caplog.handler)
    assert "0.2500" in caplog.text


@pytest.mark.holds("files-3")
def test_the_evaluate_stage_scores_the_best_checkpoint_and_alters_no_result(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, epoch_end=3))
    runner.datasets["test"] = runner.datasets["val"]
    status = runner.run()
    assert status is not None and status.evaluation is not None
    kept = json.loads(Path(runner.dir, "evaluation.json").read_text())
    assert kept["index"] == runner.best_index
    assert kept["result"]["test"] == runner.results[runner.best_index]["val"]
    assert all("test" not in result for result in runner.results.values())


@pytest.mark.holds("attributes-25", "files-5")
def test_tensorboard_has_a_curve_for_each_metric(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runner = SmallRunner(config(tmp_path, tensorboard=True))
    assert runner.tensorboard
    runner.train()
    board = EventAccumulator(str(Path(runner.dir, "tensorboard")))
    board.Reload()
    curve = board.Scalars("val/loss")
    assert [point.step for point in curve] == [0, 1]
    assert [point.value for point in curve] == pytest.approx(
        [runner.results[index]["val"]["loss"] for index in (0, 1)]
    )
    assert runner.writer is None  # closed
