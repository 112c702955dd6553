"""The look before the first step: what would fail later is met at once, and nothing is left of it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from danling_core.errors import ConfigError, RunInterrupted
from danling_core.metrics import MetricGroup
from danling_core.runner import aside
from tests.ranks import Ranks
from tests.small_runner import SmallRunner, config, points, weights
from tests.unit.test_attributes import Rich
from tests.unit.test_data_and_bits import Noisy


def looking(root: Path, **fields: Any) -> Any:
    return config(root, **{"sanity_batches": 2, **fields})


def broken(root: Path, change: Any, **fields: Any) -> str:
    """Train a runner that `change` has broken; return the message, once nothing was trained."""
    runner = SmallRunner(looking(root, **fields))
    change(runner)
    with pytest.raises(ConfigError) as refused:
        runner.train()
    assert runner.steps == 0 and runner.results == {}
    return str(refused.value)


PER_SAMPLE = nn.CrossEntropyLoss(reduction="none")


class Odd:
    def update(self, pred: Any, target: Any) -> None: ...

    def compute(self) -> Any:
        return object()

    def reset(self) -> None: ...


def fails(data: Any) -> Any:
    raise KeyError("inputs")


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (
            lambda r: setattr(r, "evaluate_step", fails),
            {},
            "evaluate_step of split 'val' failed.*KeyError: 'inputs'",
        ),
        (
            lambda r: setattr(r, "evaluate_step", lambda d: r.model(d[0])),
            {},
            "returned a Tensor, wanted \\(prediction",
        ),
        (lambda r: setattr(r, "evaluate_step", lambda d: (1, 0.5)), {}, "returned a float as the loss"),
        (lambda r: setattr(r, "train_step", lambda d: r.model(d[0])), {}, "never called self.advance"),
        (lambda r: setattr(r, "train_step", lambda d: r.advance(0.5)), {}, "advance was given a float"),
        (
            lambda r: setattr(r, "criterion", None),
            {},
            "train_step of split 'train'.*self.criterion is not set",
        ),
        (lambda r: setattr(r, "metrics", MetricGroup(odd=Odd())), {}, "metric 'odd' must be one number"),
        (lambda r: None, {"score_name": "acuracy", "score_mode": "max"}, "reports \\['accuracy', 'loss'\\]"),
        (lambda r: r.datasets.update(val=[]), {}, "the data set is empty"),
        (
            lambda r: setattr(r, "criterion", nn.CrossEntropyLoss(reduction="none")),
            {},
            "RuntimeError: grad can be implicitly created only",
        ),
    ],
    ids=[
        "raises",
        "returns",
        "loss",
        "advance",
        "float",
        "criterion",
        "metric",
        "score",
        "empty",
        "reduction",
    ],
)
def test_what_would_fail_later_is_met_before_the_first_step(
    tmp_path: Path, change: Any, fields: dict[str, Any], message: str
) -> None:
    import re

    assert re.search(message, broken(tmp_path, change, **fields))


@pytest.mark.parametrize("place", ["metrics", "train_metrics", "evaluate_metrics"])
@pytest.mark.parametrize("kind", ["a collection", "a class"])
def test_a_metric_of_torchmetrics_that_is_called_loss_is_met_before_the_first_step(
    tmp_path: Path, place: str, kind: str
) -> None:
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy

    class Loss(MulticlassAccuracy):
        """A metric that is named after its class."""

    metric = Loss(2) if kind == "a class" else MetricCollection({"loss": MulticlassAccuracy(2)})
    said = broken(tmp_path, lambda runner: setattr(runner, place, metric))
    assert f"self.{place} has a metric called 'loss'" in said


def as_lists(samples: Any) -> Any:
    return [sample[0].tolist() for sample in samples], [int(sample[1]) for sample in samples]


def time_first(samples: Any) -> Any:
    return torch.stack([sample[0] for sample in samples], 1), torch.stack([sample[1] for sample in samples])


READERS: dict[Any, Any] = {as_lists: torch.tensor, time_first: torch.t}


@pytest.mark.parametrize(
    ("collate", "found"),
    [(as_lists, "There is no tensor in it"), (time_first, "Its tensors have first dimensions [2, 5]")],
)
def test_a_batch_of_the_users_own_loader_that_does_not_say_its_size_is_met_before_the_first_step(
    tmp_path: Path, collate: Any, found: str
) -> None:
    def change(runner: SmallRunner) -> None:
        data = runner.datasets.pop("val")
        runner.dataloaders["val"] = DataLoader(data, batch_size=5, collate_fn=collate)
        runner.metrics = None

        def evaluate_step(data: Any) -> Any:
            pred = runner.model(READERS[collate](data[0]))
            return pred, runner.criterion(pred, torch.as_tensor(data[1]))

        runner.evaluate_step = evaluate_step  # type: ignore[method-assign]

    said = broken(tmp_path / "unsized", change)
    assert "evaluate_step of split 'val', tried before the first step" in said
    assert found in said and "set self.size_of in the runner" in said
    sized = SmallRunner(looking(tmp_path / "sized"))
    change(sized)
    sized.size_of = lambda batch: len(batch[1])
    loss = sized.train()[1]["val"]["loss"]
    inputs, targets = points(27)
    with torch.no_grad():
        plain = nn.functional.cross_entropy(sized.model(inputs[20:]), targets[20:]).item()
    assert loss == pytest.approx(plain, rel=1e-6)


def test_the_splits_of_the_evaluate_stage_are_looked_at(tmp_path: Path) -> None:
    class NoVal(SmallRunner):
        """Trains on batches that its evaluate_step cannot take, and has no other split."""

        def __init__(self, given: Any) -> None:
            super().__init__(given)
            del self.datasets["val"]

        def evaluate_step(self, data: Any) -> Any:
            raise TypeError("three elements")

    class BrokenTest(SmallRunner):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            self.datasets["test"] = [(torch.zeros(5), 0)] * 4

    for kind, split in ((NoVal, "train"), (BrokenTest, "test")):
        runner = kind(looking(tmp_path / split))
        with pytest.raises(ConfigError, match=f"evaluate_step of split '{split}' failed when it was tried"):
            runner.run()
        assert runner.steps == 0
    NoVal(looking(tmp_path / "trained")).train()  # which evaluates nothing


def test_an_evaluation_may_return_a_mapping(tmp_path: Path) -> None:
    plain, other = SmallRunner(looking(tmp_path / "a")), SmallRunner(looking(tmp_path / "b"))
    step = other.evaluate_step
    other.evaluate_step = lambda data: {"loss": step(data)[1], "more": 1}  # type: ignore[assignment, method-assign]
    assert other.train() == plain.train()


class Counts(Rich):
    """Counts how its steps were called, and keeps lists."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.calls = {"train": 0, "evaluate": 0}
        self.seen: list[float] = []
        self.datasets["noisy"] = Noisy()

    def train_step(self, data: Any) -> Any:
        self.calls["train"] += 1
        self.seen.append(float(data[0].sum()))
        self.logger.debug("step %s", self.steps)
        return super().train_step(data)

    def evaluate_step(self, data: Any) -> Any:
        self.calls["evaluate"] += 1
        return super().evaluate_step(data[:2])


@pytest.mark.parametrize("at", ["a fork", "copies"])
@pytest.mark.parametrize("fields", [{}, {"precision": "bf16", "ema_decay": 0.9, "accum_steps": 2}])
def test_nothing_is_left_of_the_look(
    tmp_path: Path, fields: dict[str, Any], at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if at == "copies":  # as with a GPU
        monkeypatch.setattr(aside, "can_fork", lambda device: False)
    given = {"params": {"width": 4, "dropout": 0.5, "batch_norm": True}, **fields}
    looked = Counts(looking(tmp_path / "a", **given))
    looked.train()
    plain = Counts(config(tmp_path / "b", **given))
    assert looked.results == plain.train()
    assert looked.all() == plain.all() and weights(looked) == weights(plain)
    assert looked.calls == plain.calls and looked.seen == plain.seen
    assert (looked.iters, looked.steps) == (plain.iters, plain.steps)
    assert Path(looked.dir, "results.json").exists()


@pytest.mark.parametrize("at", ["a fork", "copies"])
@pytest.mark.parametrize("where", [("train", 1), ("train", 5), ("val", 4)])
def test_a_run_that_looked_was_stopped_and_resumed_has_the_bits_of_one_that_did_neither(
    tmp_path: Path, where: tuple[str, int], at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if at == "copies":
        monkeypatch.setattr(aside, "can_fork", lambda device: False)
    fields: dict[str, Any] = {"params": {"width": 4, "dropout": 0.5, "batch_norm": True}, "ema_decay": 0.9}
    plain = Counts(config(tmp_path / "plain", **fields))
    plain.train()
    first = Counts(looking(tmp_path / "looked", **fields))
    first.stop_in = where
    with pytest.raises(RunInterrupted):
        first.train()
    again = Counts(looking(tmp_path / "looked", **fields))
    again.train()
    assert again.resumed is not None and again.bitwise
    assert weights(again) == weights(plain) and again.results == plain.results
    assert again.all() == plain.all() and again.seen == plain.seen


def test_data_is_shared_with_a_look_at_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "can_fork", lambda device: False)
    monkeypatch.setattr("danling_core.runner.look._MOST_BYTES", 16 << 20)

    class Heavy(SmallRunner):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            self.array = np.zeros(3 << 20)
            self.inside = {"list": [SimpleNamespace(tensor=torch.zeros(5 << 20))]}
            self.data = self.datasets["train"]
            self.many = [[number] for number in range(150_000)]
            self.small = torch.zeros(1 << 20)

        def train_step(self, data: Any) -> Any:
            attributes = (self.array, self.inside["list"][0].tensor, self.data, self.many, self.small)
            seen.append([id(each) for each in attributes])
            return super().train_step(data)

    seen: list[list[int]] = []
    runner = Heavy(config(tmp_path, sanity_batches=2))
    runner.train()
    look, real = seen[0], seen[-1]
    assert look[:4] == real[:4] and look[4] != real[4]


class Replay(Dataset[Any]):
    def __init__(self) -> None:
        self.items: list[float] = []

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> float:
        return self.items[index]


class Locked:
    def __init__(self) -> None:
        self.lock, self.count = threading.Lock(), 0


SEEN: list[float] = []


class Everywhere(SmallRunner):
    """Keeps what it trains on where no copy would find it."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        SEEN.clear()
        self.model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.replay, self.locked = Replay(), Locked()
        self.derived = torch.zeros(1, requires_grad=True) * 2
        hooked: list[float] = []
        self.hooked = lambda: len(hooked)
        self.model[0].register_forward_hook(lambda module, given, out: hooked.append(1.0))
        self.predict = lambda inputs: self.model(inputs)

    def train_step(self, data: Any) -> Any:
        factor = 1.0 + 0.01 * (len(self.replay) + self.locked.count + self.hooked() + len(SEEN))
        loss = self.criterion(self.predict(data[0]), data[1]) * (factor + self.derived.detach().sum())
        self.advance(loss)
        self.replay.items.append(1.0)
        self.locked.count += 1
        SEEN.append(1.0)
        with torch.no_grad():
            self.derived.add_(0.01)
        return None, loss

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def everywhere(root: str, sanity_batches: int) -> list[float]:
    runner = Everywhere(config(root, sanity_batches=sanity_batches))
    runner.metrics = None
    runner.train()
    return weights(runner)


def test_whatever_the_look_touches_is_as_it_was(tmp_path: Path, two_ranks: Ranks) -> None:
    assert everywhere(str(tmp_path / "look"), 2) == everywhere(str(tmp_path / "none"), 0)
    looked, plain = (two_ranks.run(everywhere, str(tmp_path / f"two-{n}"), n) for n in (2, 0))
    assert looked == plain


class Gathers(SmallRunner):
    """Has a collective of its own in a step."""

    def train_step(self, data: Any) -> Any:
        total = torch.ones(())
        torch.distributed.all_reduce(total)
        assert total == 2
        return super().train_step(data)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def gathered(root: str) -> int:
    runner = Gathers(looking(Path(root)))
    runner.train()
    return runner.steps


def test_a_step_with_a_collective_of_its_own_is_not_tried_and_trains(
    tmp_path: Path, two_ranks: Ranks
) -> None:
    assert two_ranks.run(gathered, str(tmp_path)) == [4, 4]


def test_a_look_that_hangs_or_dies_lets_the_run_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("danling_core.runner.look._LIMIT_SECONDS", 3.0)
    parent = os.getpid()

    class Hangs(SmallRunner):
        def train_step(self, data: Any) -> Any:
            if os.getpid() != parent:
                signal.pause()
            return super().train_step(data)

    class Dies(SmallRunner):
        def train_step(self, data: Any) -> Any:
            if os.getpid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().train_step(data)

    for kind in (Hangs, Dies):
        runner = kind(looking(tmp_path / kind.__name__))
        runner.train()
        assert runner.steps == 8
    assert capsys.readouterr().err.count("has no result") == 2


def test_a_resume_does_not_look_again(tmp_path: Path) -> None:
    calls = tmp_path / "calls"

    class Looks(SmallRunner):
        def evaluate_step(self, data: Any) -> Any:
            with calls.open("a") as file:  # which the look writes to, too
                file.write(".")
            return super().evaluate_step(data)

        def after_step(self) -> None:
            if self.steps == 6 and not self.resumed:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Looks(looking(tmp_path)).train()
    assert len(calls.read_text()) == 2 + 2  # the look, and the first epoch
    Looks(looking(tmp_path)).train()
    assert len(calls.read_text()) == 2 + 2 + 2


def test_metrics_that_training_never_updates_are_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Bare(SmallRunner):
        def train_step(self, data: Any) -> Any:
            loss = self.criterion(self.model(data[0]), data[1])
            self.advance(loss)
            return loss

    Bare(looking(tmp_path / "bare", epoch_end=1)).train()
    assert "train_step of split 'train' never updates the metrics" in capfd.readouterr().err
    without = Bare(looking(tmp_path / "without", epoch_end=1))
    without.evaluate_metrics, without.metrics = without.metrics, None
    without.train()
    SmallRunner(looking(tmp_path / "usual", epoch_end=1)).train()
    assert "never updates" not in capfd.readouterr().err
