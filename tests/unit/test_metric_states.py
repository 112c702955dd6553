"""Metrics that are stopped in the middle of an epoch: saved, restored, merged, or refused when a run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from danling_core.checkpoints.plain import to_plain
from danling_core.errors import ConfigError, RunInterrupted
from danling_core.metrics import Accuracy, MetricGroup
from danling_core.metrics.states import merged, restore, saved
from tests.small_runner import config
from tests.unit.test_resume_here import Stopped


class Hits:
    """A user's own metric, without a state_dict."""

    def __init__(self) -> None:
        self.hits, self.parts = torch.zeros(()), [0]

    def update(self, pred: Any, target: Any) -> None:
        self.hits = self.hits + (pred.argmax(1) == target).sum()
        self.parts[0] += len(target)

    def compute(self) -> float:
        return float(self.hits / self.parts[0])

    def reset(self) -> None:
        self.hits, self.parts = torch.zeros(()), [0]


class Opaque(Hits):
    def __init__(self) -> None:
        super().__init__()
        self.seen = iter([])


def of_torchmetrics(kind: str) -> Any:
    import torchmetrics
    from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

    if kind == "torchmetrics":
        return MulticlassAccuracy(2, average="micro")
    if kind == "a list state":
        return torchmetrics.classification.MulticlassAUROC(2)
    return torchmetrics.MetricCollection([MulticlassPrecision(2), MulticlassRecall(2)])


def made(kind: str) -> Any:
    own = {"bare": Accuracy, "own": Hits, "group": lambda: MetricGroup(a=Accuracy(), own=Hits())}
    return own[kind]() if kind in own else of_torchmetrics(kind)


class Measured(Stopped):
    kind = "bare"

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.metrics = made(self.kind)


@pytest.mark.parametrize("kind", ["bare", "own", "group", "torchmetrics", "a list state", "a collection"])
def test_an_epoch_that_was_stopped_reports_all_of_it(kind: str, tmp_path: Path) -> None:
    kinds = type("Measured", (Measured,), {"kind": kind})
    fields: dict[str, Any] = {"epoch_end": 1, "dataloader": {"batch_size": 2}, "score_split": "train"}
    peace = kinds(config(tmp_path / "peace", **fields))
    peace.train()
    first = kinds(config(tmp_path / "stopped", **fields))
    first.stop_in = ("train", 4)
    with pytest.raises(RunInterrupted):
        first.train()
    again = kinds(config(tmp_path / "stopped", **fields))
    again.train()
    assert again.resumed is not None and again.resumed["step"] == 6
    assert again.results[0]["train"] == peace.results[0]["train"] and len(peace.results[0]["train"]) > 1


def test_a_metric_that_could_not_be_saved_is_refused_before_training(tmp_path: Path) -> None:
    runner = Stopped(config(tmp_path))
    runner.metrics = Opaque()
    with pytest.raises(ConfigError, match="metrics: a Opaque.*give it state_dict and load_state_dict"):
        runner.train()
    assert runner.steps == 0


def test_counts_of_former_ranks_are_merged_where_they_add(caplog: pytest.LogCaptureFixture) -> None:
    def counted(hits: int) -> MetricGroup:
        group = MetricGroup(a=Accuracy(), own=Hits())
        group.update(torch.eye(4)[:, :2], torch.tensor([0] * hits + [1] * (4 - hits)))
        return group

    states = [saved(counted(hits)) for hits in (1, 3)]
    whole, rest = counted(0), counted(0)
    restore(whole, merged(whole, states, is_first=True))
    restore(rest, merged(rest, states, is_first=False))
    wanted = [a + b for a, b in zip(states[0]["a"].tolist(), states[1]["a"].tolist(), strict=True)]
    assert whole["a"].state().tolist() == wanted and wanted[1] == 8
    assert rest["a"].state().tolist() == [0, 0]
    [told] = [record.getMessage() for record in caplog.records]
    assert "a Hits has counted of this epoch does not add" in told


def test_what_is_saved_is_what_a_checkpoint_may_hold() -> None:
    for kind in ("bare", "own", "torchmetrics", "a list state", "a collection"):
        metric = made(kind)
        metric.update(torch.eye(2), torch.tensor([0, 1]))
        to_plain(saved(metric), lambda tensor: tensor)
