"""What a resume takes up, seen in one process: a runner that is stopped, and another that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import danling_core as dl
from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import ConfigError, NonFiniteLossError, RunInterrupted
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
            self.request_stop("asked by the test")


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
    assert again.resumed is not None
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


class Tempered(Stopped):
    """A criterion with a state: a buffer that moves at every step, and a weight that is trained."""

    class Criterion(torch.nn.Module):
        def __init__(self, is_trained: bool) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=is_trained)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                self.seen += 0.01
            return torch.nn.functional.cross_entropy(pred * self.scale * (1 + self.seen), target)

    is_trained = True

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.criterion = self.Criterion(self.is_trained)
        self.optimizer.add_param_group({"params": [self.criterion.scale]})


def test_the_state_of_a_criterion_survives_a_resume(tmp_path: Path) -> None:
    peace, again = in_peace(tmp_path, Tempered), resumed(tmp_path, ("train", 5), Tempered)
    assert again.criterion.scale.item() == peace.criterion.scale.item() != 1.0
    assert again.criterion.seen.item() == peace.criterion.seen.item()
    assert weights(again) == weights(peace) and again.results == peace.results


class Frozen(Tempered):
    """Of all weights only the criterion's is trained."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.model.requires_grad_(False)

    def backward(self, loss: torch.Tensor) -> None:
        dl.TorchRunner.backward(self, loss)


class Wild(Frozen):
    def train_step(self, data: Any) -> Any:
        found = super().train_step(data)
        if self.steps == 8:
            self.criterion.scale.data.fill_(float("nan"))
        return found


def test_a_criterion_may_be_all_that_is_trained_and_its_weights_are_looked_at_too(tmp_path: Path) -> None:
    runner = Frozen(config(tmp_path / "frozen"))
    runner.train()
    assert runner.steps == 8 and runner.criterion.scale.item() != 1.0
    with pytest.raises(
        NonFiniteLossError, match="weight 'scale' of the criterion is not finite after step 8"
    ):
        Wild(config(tmp_path / "wild")).train()


class Cliff(Stopped):
    """The loss is finite in the last step of an epoch, and its gradient is not."""

    def train_step(self, data: Any) -> Any:
        pred = self.model(data[0])
        loss = self.criterion(pred, data[1])
        if self.steps == 7:
            loss = loss + (pred.sum() * 0).sqrt()
        self.advance(loss)
        return pred, loss


def test_weights_that_are_not_finite_never_become_the_newest_checkpoint(tmp_path: Path) -> None:
    runner = Cliff(config(tmp_path, epoch_end=3))
    with pytest.raises(
        NonFiniteLossError, match="of the model is not finite after step 8.*a gradient was not"
    ):
        runner.train()
    newest = CheckpointStore(runner.checkpoint_dir).pointed("latest")
    assert newest is not None and newest.step == 4


def test_a_criterion_that_does_not_return_the_mean_is_told_so(tmp_path: Path) -> None:
    runner = Stopped(config(tmp_path))
    runner.criterion = torch.nn.CrossEntropyLoss(reduction="none")
    with pytest.raises(ConfigError, match=r"shape \(5,\), wanted one number.*reduction='mean'"):
        runner.train()
