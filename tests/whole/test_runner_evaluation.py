"""Real processes for what tests/unit/test_runner_evaluation.py tries without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import danling_core as dl
from danling_core.metrics import Accuracy, MetricGroup
from tests.ranks import RankFailed, Ranks
from tests.small_runner import SmallRunner, config, points

# 7 samples, of which 3 are right: a sampler that pads for 2 ranks would report 4 of 8.
INPUTS = torch.arange(7.0).unsqueeze(1)


TARGETS = torch.tensor([1, 1, 1, 0, 0, 0, 0])


TRUTH = 3 / 7


class Judge(nn.Module):
    """Always says class 1, and how far along the sample is; keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[float] = []
        self.had_grad = False

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen.extend(inputs.flatten().tolist())
        self.had_grad |= torch.is_grad_enabled()
        return torch.cat([-inputs - 1, inputs + 1], dim=1) * self.weight


class Judging(dl.TorchRunner):
    def __init__(self, given: Any, kind: str = "dataset") -> None:
        super().__init__(given)
        data = TensorDataset(INPUTS, TARGETS)
        if kind == "dataset":
            self.datasets["val"] = data
        elif kind == "stream":
            self.datasets["val"] = Unsized()
        elif kind == "distributed sampler":
            self.dataloaders["val"] = DataLoader(data, 2, sampler=DistributedSampler(data, 2, self.rank))
        else:
            self.dataloaders["val"] = DataLoader(data, 2, shuffle=kind == "shuffled loader")
        self.model, self.criterion = Judge(), nn.CrossEntropyLoss()
        self.metrics = MetricGroup(accuracy=Accuracy())


class Unsized(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(INPUTS, TARGETS, strict=True))


def judged(root: str, kind: str = "dataset", **fields: Any) -> dict[str, Any]:
    given = config(root, dataloader={"batch_size": 2}, run_name=kind.replace(" ", "-"), **fields)
    runner = Judging(given, kind)
    result = runner.evaluate("val")["val"]
    seen = list(runner.model.seen)
    outputs = runner.infer("val")
    return {"result": result, "seen": seen, "outputs": outputs.tolist(), "grad": runner.model.had_grad}


KINDS = ["dataset", "stream", "loader", "shuffled loader"]


@pytest.mark.holds("attributes-16", "methods-4", "bugs-4")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_seven_samples_give_the_exact_metric_and_outputs_in_order(
    kind: str, world_size: int, two_ranks: Ranks, three_ranks: Ranks, tmp_path: Path
) -> None:
    group = {2: two_ranks, 3: three_ranks}.get(world_size)
    answers = [judged(str(tmp_path), kind)] if group is None else group.run(judged, str(tmp_path), kind)
    loss = nn.functional.cross_entropy(Judge()(INPUTS), TARGETS).item()
    wanted = Judge()(INPUTS).tolist()
    for answer in answers:
        assert answer["result"]["accuracy"] == TRUTH
        assert answer["result"]["loss"] == pytest.approx(loss)
        found = sorted(answer["outputs"], key=lambda row: row[1]) if "shuffled" in kind else answer["outputs"]
        assert found == wanted
        assert not answer["grad"]
    assert sorted(value for answer in answers for value in answer["seen"]) == INPUTS.flatten().tolist()


@pytest.mark.holds("attributes-16")
def test_a_sampler_that_pads_is_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="may repeat samples"):
        two_ranks.run(judged, str(tmp_path), "distributed sampler")


@pytest.mark.holds("attributes-16")
def test_more_ranks_than_samples(three_ranks: Ranks, tmp_path: Path) -> None:
    for answer in three_ranks.run(one_sample, str(tmp_path)):
        assert answer["val"]["accuracy"] == 1.0


def one_sample(root: str) -> Any:
    runner = Judging(config(root))
    runner.datasets["val"] = TensorDataset(INPUTS[:1], TARGETS[:1])
    return runner.evaluate("val")


def with_torchmetrics(root: str) -> dict[str, Any]:
    import torchmetrics

    runner = Judging(config(root, dataloader={"batch_size": 2}))
    runner.metrics = torchmetrics.MetricCollection(
        {
            "accuracy": torchmetrics.classification.MulticlassAccuracy(2, average="micro"),
            "recall": torchmetrics.classification.MulticlassRecall(2, average=None),
        }
    )
    collection = runner.evaluate("val")["val"]
    runner.metrics = torchmetrics.classification.MulticlassAccuracy(2, average="micro")
    return {"collection": collection, "single": runner.evaluate("val")["val"]}


@pytest.mark.holds("training-10")
@pytest.mark.parametrize("world_size", [1, 2])
def test_objects_of_torchmetrics_are_metrics(world_size: int, two_ranks: Ranks, tmp_path: Path) -> None:
    answers = (
        [with_torchmetrics(str(tmp_path))]
        if world_size == 1
        else two_ranks.run(with_torchmetrics, str(tmp_path))
    )
    for answer in answers:
        assert answer["collection"]["accuracy"] == pytest.approx(TRUTH)
        assert answer["collection"]["recall"] == {"0": 0.0, "1": 1.0}
        assert answer["single"]["multiclass_accuracy"] == pytest.approx(TRUTH)


def summed(root: str, log_interval: int) -> dict[int, Any]:
    runner = SmallRunner(config(root, log_interval=log_interval, params={"samples": 23, "width": 4}))
    runner.optimizer = torch.optim.SGD(runner.model.parameters(), lr=0.0)
    return runner.train()


@pytest.mark.holds("attributes-27", "bugs-3")
@pytest.mark.parametrize("log_interval", [1, 3, 1000])
def test_the_epoch_loss_depends_neither_on_log_interval_nor_on_world_size(
    log_interval: int, two_ranks: Ranks, three_ranks: Ranks, tmp_path: Path
) -> None:
    inputs, targets = points(30)
    still = SmallRunner(config(tmp_path, params={"samples": 23, "width": 4})).model.eval()
    truth = nn.functional.cross_entropy(still(inputs[:23]), targets[:23]).item()
    found = [summed(str(tmp_path / "1"), log_interval)]
    found += two_ranks.run(summed, str(tmp_path / "2"), log_interval)
    found += three_ranks.run(summed, str(tmp_path / "3"), log_interval)
    for results in found:
        assert results[0]["train"]["loss"] == pytest.approx(truth, rel=1e-6)
        assert results[0]["val"] == pytest.approx(found[0][0]["val"], rel=1e-6)


def buffers(root: str, broadcast_buffers: bool) -> dict[str, Any]:
    fields = {"width": 3, "batch_norm": True, "samples": 40}
    runner = SmallRunner(config(root, params=fields, broadcast_buffers=broadcast_buffers, epoch_end=1))
    loss = runner.train()[0]["val"]["loss"]
    return {"loss": loss, "mean": runner.unwrap(runner.model)[1].running_mean.tolist()}


@pytest.mark.holds("attributes-18")
@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_all_ranks_evaluate_with_the_buffers_of_rank_0(
    broadcast_buffers: bool, two_ranks: Ranks, tmp_path: Path
) -> None:
    first, second = two_ranks.run(buffers, str(tmp_path), broadcast_buffers)
    assert first["loss"] == second["loss"]
    assert (first["mean"] == second["mean"]) == broadcast_buffers  # each has its own back


@pytest.mark.holds("methods-3")
def test_a_trained_split_can_be_evaluated_too(two_ranks: Ranks, tmp_path: Path) -> None:
    for answer in [*two_ranks.run(train_evaluated, str(tmp_path)), train_evaluated(str(tmp_path / "one"))]:
        assert answer["sizes"] == answer["wanted"]


def train_evaluated(root: str) -> dict[str, Any]:
    runner = SmallRunner(config(root, epoch_end=1, params={"samples": 13}))
    runner.train()
    result = runner.evaluate(["train", "val"])
    inputs, targets = points(20)
    with torch.no_grad():
        right = (runner.unwrap(runner.model)(inputs).argmax(1) == targets).double()
    wanted = [right[:13].mean().item(), right[13:].mean().item()]
    return {"sizes": [result["train"]["accuracy"], result["val"]["accuracy"]], "wanted": wanted}
