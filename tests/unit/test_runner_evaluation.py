"""Evaluation and inference: exact at any world size, whatever the data comes as."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

import danling_core as dl
from danling_core.errors import ConfigError
from danling_core.metrics import Accuracy, MetricGroup
from tests.small_runner import SmallRunner, config, points, weights

# metrics ----------------------------------------------------------------------------------------------------


class TwoTasks(dl.TorchRunner):
    def __init__(self, given: Any) -> None:
        super().__init__(given)
        inputs, targets = points(14)
        self.datasets["train"] = self.datasets["val"] = list(zip(inputs, targets, strict=True))
        self.model = nn.Linear(2, 4)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.metrics = MetricGroup(a=MetricGroup(accuracy=Accuracy()), b=MetricGroup(accuracy=Accuracy()))

    def train_step(self, data: Any) -> Any:
        pred, loss = self.evaluate_step(data)
        self.advance(loss)
        return pred, loss

    def evaluate_step(self, data: Any) -> Any:
        pred, target = self.model(data[0]), {"a": data[1], "b": 1 - data[1]}
        tasks = {"a": pred[:, :2], "b": pred[:, 2:]}
        self.metrics.update(tasks, target)
        return pred, sum(nn.functional.cross_entropy(tasks[name], target[name]) for name in tasks)


@pytest.mark.holds("training-10")
def test_metrics_of_several_tasks_are_nested_and_can_be_the_score(tmp_path: Path) -> None:
    runner = TwoTasks(config(tmp_path, epoch_end=5, score_name="a/accuracy"))
    results = runner.train()
    assert set(results[4]["val"]) == {"loss", "a", "b"}
    assert runner.best_score == max(result["val"]["a"]["accuracy"] for result in results.values())


@pytest.mark.holds("attributes-26")
def test_train_and_evaluate_may_have_metrics_of_their_own(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, epoch_end=1))
    runner.metrics = None
    runner.train_metrics = MetricGroup(seen=Accuracy())
    runner.evaluate_metrics = MetricGroup(held_out=Accuracy())
    result = runner.train()[0]
    assert set(result["train"]) == {"loss", "seen"} and set(result["val"]) == {"loss", "held_out"}


def test_the_mean_over_tasks_can_be_the_score(tmp_path: Path) -> None:
    class Averaged(TwoTasks):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            self.metrics = MetricGroup(dict(self.metrics), average_tasks=True)

    results = (runner := Averaged(config(tmp_path, epoch_end=3, score_name="average/accuracy"))).train()
    means = [(r["val"]["a"]["accuracy"] + r["val"]["b"]["accuracy"]) / 2 for r in results.values()]
    assert [r["val"]["average"]["accuracy"] for r in results.values()] == pytest.approx(means)
    assert runner.best_score == pytest.approx(max(means))


def test_so_many_batches_can_be_evaluated(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, epoch_end=1, dataloader={"batch_size": 2}))
    runner.train()
    counted: list[int] = []
    step = runner.evaluate_step
    runner.evaluate_step = lambda data: (counted.append(len(data[1])), step(data))[1]  # type: ignore[method-assign,func-returns-value]
    whole = runner.evaluate_epoch("val")
    assert sum(counted) == 7
    counted.clear()
    assert set(runner.evaluate_steps("val", 2)) == set(whole) and sum(counted) == 4
    counted.clear()
    assert runner.evaluate_steps("val", 99) == whole
    with pytest.raises(ConfigError, match="steps is 0"):
        runner.evaluate_steps("val", 0)


# state ------------------------------------------------------------------------------------------------------
@pytest.mark.holds("attributes-18")
def test_evaluation_leaves_training_as_it_was(tmp_path: Path) -> None:
    plain = SmallRunner(config(tmp_path / "a", params={"width": 4, "dropout": 0.5}))
    plain.train(evaluate_splits=[])
    evaluated = SmallRunner(config(tmp_path / "b", params={"width": 4, "dropout": 0.5}))
    evaluated.train()
    assert weights(plain) == weights(evaluated)


@pytest.mark.holds("methods-4")
def test_infer_of_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split 'infer' has no data"):
        SmallRunner(config(tmp_path)).infer()


@pytest.mark.holds("methods-4")
def test_infer_joins_outputs_in_mappings_and_needs_no_targets(tmp_path: Path) -> None:
    class Named(SmallRunner):
        def infer_step(self, data: Any) -> Any:
            return {"logits": super().infer_step(data), "pair": (data[0][:, 0],)}

    runner = Named(config(tmp_path))
    runner.datasets["infer"] = TensorDataset(points(12)[0])
    outputs = runner.infer()
    assert outputs["logits"].shape == (12, 2)
    assert torch.equal(outputs["pair"][0], points(12)[0][:, 0])
    assert "infer" not in runner.train()[0]


class Output(NamedTuple):
    logits: torch.Tensor
    length: torch.Tensor


def test_infer_keeps_named_tuples_and_what_differs_in_length_by_batch(tmp_path: Path) -> None:
    class Ragged(SmallRunner):
        def infer_step(self, data: Any) -> Any:
            count = len(data[0])
            return Output(super().infer_step(data), torch.zeros(count, count, 2))

    runner = Ragged(config(tmp_path))
    runner.datasets["infer"] = TensorDataset(points(12)[0])
    outputs = runner.infer()
    assert isinstance(outputs, Output) and outputs.logits.shape == (12, 2)
    assert [each.shape for each in outputs.length] == [(5, 5, 2), (5, 5, 2), (2, 2, 2)]


@pytest.mark.holds("attributes-13")
def test_the_users_own_loaders_and_samplers_are_used_and_shown(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, epoch_end=1))
    data = runner.datasets.pop("train")
    own = DataLoader(data, batch_size=4, sampler=SequentialSampler(data))
    runner.dataloaders["train"] = own
    runner.datasamplers["val"] = [6, 5, 4]
    runner.train()
    assert runner.dataloaders["train"] is own and runner.batch_size == 4
    assert runner.steps == 5
    assert set(runner.dataloaders) == {"train", "val"} == set(runner.datasamplers) | {"train"}
    inputs, targets = points(27)
    with torch.no_grad():
        right = runner.model(inputs[24:27]).argmax(1) == targets[24:27]
    assert runner.results[0]["val"]["accuracy"] == pytest.approx(right.double().mean().item())


@pytest.mark.holds("attributes-13")
def test_loaders_are_visible_once_training_began(tmp_path: Path) -> None:
    class Looks(SmallRunner):
        def train_step(self, data: Any) -> Any:
            assert set(self.dataloaders) == set(self.datasamplers) == {"train", "val"}
            return super().train_step(data)

    Looks(config(tmp_path, epoch_end=1)).train()


@pytest.mark.holds("attributes-16")
def test_an_evaluation_split_cannot_be_shuffled_or_cut(tmp_path: Path) -> None:
    for option in ("shuffle", "drop_last"):
        with pytest.raises(ConfigError, match="counts every sample once"):
            SmallRunner(config(tmp_path, dataloader={"val": {option: True}})).train()
