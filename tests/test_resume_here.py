"""What a resume takes up, seen in one process: a runner that is stopped, and another that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from danling_core.errors import RunInterrupted
from tests.small_runner import SmallRunner, config, weights

DROPOUT: dict[str, Any] = {"params": {"width": 8, "dropout": 0.5}}


class Stopped(SmallRunner):
    """Is asked to stop in one of its steps, as by a SIGTERM."""

    stop_in: tuple[str, int] | None = None

    def train_step(self, data: Any) -> Any:
        self.stop("train")
        return super().train_step(data)

    def evaluate_step(self, data: Any) -> Any:
        self.stop(str(self.split))
        return super().evaluate_step(data)

    def stop(self, place: str) -> None:
        if (place, self.steps) == self.stop_in:
            self._stopping.wish("asked by the test")


def in_peace(root: Path, runner_class: type[Stopped] = Stopped, **fields: Any) -> Stopped:
    runner = runner_class(config(root / "peace", **fields))
    runner.train()
    return runner


def resumed(
    root: Path, where: tuple[str, int], runner_class: type[Stopped] = Stopped, **fields: Any
) -> Stopped:
    """Stopped there, and trained to its end by another runner."""
    first = runner_class(config(root / "stopped", **fields))
    first.stop_in = where
    with pytest.raises(RunInterrupted):
        first.train()
    second = runner_class(config(root / "stopped", **fields))
    second.train()
    return second


class TwoEvaluations(Stopped):
    """Each in one batch, which draws a random number."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.datasets["validate"] = self.datasets["val"]

    def evaluate_step(self, data: Any) -> Any:
        torch.rand(1)
        return super().evaluate_step(data)


@pytest.mark.parametrize("where", [("val", 4), ("validate", 4), ("train", 5)])
def test_a_stop_inside_an_evaluation_of_one_batch_costs_no_bit(tmp_path: Path, where: Any) -> None:
    fields: dict[str, Any] = {
        **DROPOUT,
        "dataloader": {"batch_size": 5, "val": {"batch_size": 7}, "validate": {"batch_size": 7}},
    }
    peace = in_peace(tmp_path, TwoEvaluations, **fields)
    again = resumed(tmp_path, where, TwoEvaluations, **fields)
    assert again._resumed is not None
    assert weights(again) == weights(peace) and again.results == peace.results


@pytest.mark.parametrize("way", ["evaluate", "infer"])
def test_averaged_weights_are_used_by_whoever_evaluates_later(tmp_path: Path, way: str) -> None:
    trained = in_peace(tmp_path, ema_decay=0.9)
    later = Stopped(config(tmp_path / "peace", ema_decay=0.9))
    if way == "evaluate":
        assert later.evaluate("val")["val"] == trained.results[1]["val"]
    else:
        inputs = torch.stack([sample[0] for sample in trained.datasets["val"]])
        assert torch.equal(later.infer("val"), trained.ema.module(inputs).detach())


def test_an_average_that_begins_later_starts_from_the_checkpoints_weights(tmp_path: Path) -> None:
    trained = in_peace(tmp_path)
    later = Stopped(config(tmp_path / "later", ema_decay=0.9))
    later.load_checkpoint(trained.checkpoint_dir)
    assert [v.tolist() for v in later.ema.module.state_dict().values()] == [
        v.tolist() for v in trained.model.state_dict().values()
    ]
