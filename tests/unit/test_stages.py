"""Stages of a run one at a time: a run is complete when training is over and what it came to is evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from danling_core.errors import ConfigError, Fenced, RunInterrupted
from danling_core.runs.folder import RunFolder
from danling_core.tools.verify import verify
from tests.small_runner import SmallRunner, config, events, weights


class WithTest(SmallRunner):
    """Has a test split, and may be stopped, or fail, inside a step."""

    stops_at: int | None = None
    fails_at: int | None = None
    begins_at: int | None = None
    """The step at which this object began to train."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.datasets["test"] = self.datasets["val"]
        self.training_state.ignore("begins_at")

    def train_step(self, data: Any) -> Any:
        self.begins_at = self.steps if self.begins_at is None else self.begins_at
        if self.stops_at == self.steps:
            self.request_stop("enough")
        if self.fails_at == self.steps:
            raise ValueError("mine")
        return super().train_step(data)


def status_of(runner: SmallRunner) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(runner.dir, "status.json").read_text())
    return found


def stopped(root: Path) -> WithTest:
    """A run that was interrupted in the second of its three epochs."""
    runner = WithTest(config(root, epoch_end=3))
    runner.stops_at = 5
    with pytest.raises(RunInterrupted, match="enough"):
        runner.run()
    return runner


def test_an_unfinished_run_that_is_evaluated_stays_as_it_was_and_resumes(tmp_path: Path) -> None:
    whole = WithTest(config(tmp_path / "whole", epoch_end=3))
    whole.run()
    before = status_of(stopped(tmp_path))
    runner = WithTest(config(tmp_path, epoch_end=3))
    runner.run(["evaluate"])
    status = status_of(runner)
    assert (status["status"], status["error"]) == (before["status"], before["error"])
    assert status["steps"] == before["steps"] and runner.begins_at is None
    assert status["evaluation"]["test"]["loss"] == runner.results[0]["val"]["loss"], "it is told"
    assert events(runner)[-1]["event"] == "completed", "what was asked for was done"
    again = WithTest(config(tmp_path, epoch_end=3))
    again.run()
    assert again.begins_at == 7 and status_of(again)["status"] == "complete"
    assert weights(again) == weights(whole) and again.results == whole.results
    assert status_of(again)["evaluation"] == status_of(whole)["evaluation"]


def test_a_run_that_is_only_trained_is_not_complete_and_the_next_one_only_evaluates(tmp_path: Path) -> None:
    runner = WithTest(config(tmp_path, epoch_end=3))
    runner.run(["train"])
    status = status_of(runner)
    assert (status["status"], status["progress"]) == ("interrupted", 1.0)
    assert "stage evaluate is still to do" in status["error"]
    assert verify(runner.dir).findings == []
    assert "the run is interrupted: stage evaluate is still to do" in Path(runner.dir, "run.log").read_text()
    again = WithTest(config(tmp_path, epoch_end=3))
    again.run()
    status = status_of(again)
    assert again.begins_at is None and status["status"] == "complete" and status["evaluation"]
    assert again.results == runner.results and status["error"] is None


def test_the_two_stages_one_after_the_other_make_a_run_complete(tmp_path: Path) -> None:
    stopped(tmp_path)
    WithTest(config(tmp_path, epoch_end=3)).run(["evaluate"])
    runner = WithTest(config(tmp_path, epoch_end=3))
    runner.run(["train"])
    trained = status_of(runner)
    assert trained["status"] == "interrupted" and trained["evaluation"] is None, "that of the first is stale"
    runner = WithTest(config(tmp_path, epoch_end=3))
    runner.run(["evaluate"])
    assert status_of(runner)["status"] == "complete"


def test_a_failed_run_that_is_evaluated_is_still_failed(tmp_path: Path) -> None:
    failing = WithTest(config(tmp_path))
    failing.fails_at = 6
    with pytest.raises(ValueError, match="mine"):
        failing.run()
    runner = WithTest(config(tmp_path))
    runner.run(["evaluate"])
    assert status_of(runner)["status"] == "failed" and "mine" in status_of(runner)["error"]
    WithTest(config(tmp_path)).evaluate("val")
    assert status_of(runner)["status"] == "failed"


def test_a_stop_in_the_last_evaluation_of_a_run_in_steps_loses_no_result(tmp_path: Path) -> None:
    class Stopped(SmallRunner):
        def evaluate_step(self, data: Any) -> Any:
            if self.steps == 6 and not self.resumed:
                self.request_stop("enough")
            return super().evaluate_step(data)

    fields: dict[str, Any] = {"step_end": 6, "params": {"val_samples": 12}}
    whole = SmallRunner(config(tmp_path / "whole", **fields)).train()
    with pytest.raises(RunInterrupted):
        Stopped(config(tmp_path, **fields)).train()
    assert Stopped(config(tmp_path, **fields)).train() == whole


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"evaluate_splits": ["vall"]}, "evaluate_splits"),
        ({"dataloader": {"batch_size": 5, "vall": {"batch_size": 3}}}, "dataloader"),
    ],
)
@pytest.mark.parametrize("method", ["run", "train"])
def test_a_misspelt_split_is_refused_before_the_first_epoch(
    fields: dict[str, Any], place: str, method: str, tmp_path: Path
) -> None:
    runner = SmallRunner(config(tmp_path, **fields))
    with pytest.raises(ConfigError, match=rf"{place}.*'vall'.*\['train', 'val'\].*did you mean 'val'\?"):
        getattr(runner, method)()
    assert runner.steps == 0 and not list(tmp_path.iterdir())


class LosesTheRun(WithTest):
    """Another owner takes the run over while its best checkpoint is evaluated."""

    def evaluate_epoch(self, split: str = "val") -> dict[str, Any]:
        result = super().evaluate_epoch(split)
        if split == "test":
            generations = Path(RunFolder(self.dir).lease_url)
            newest = max(int(path.stem) for path in generations.glob("*.json") if path.stem.isdigit())
            (generations / f"{newest + 1:06d}.json").write_bytes(
                (generations / f"{newest:06d}.json").read_bytes()
            )
        return result


def test_a_runner_that_lost_its_run_writes_no_evaluation(tmp_path: Path) -> None:
    runner = LosesTheRun(config(tmp_path))
    with pytest.raises(Fenced):
        runner.run()
    assert not Path(runner.dir, "evaluation.json").exists()
