"""What a user replaces or changes after training has begun: taken up, refused or said; never ignored."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, TensorDataset

from danling_core.errors import ConfigError
from tests.marks import rarely
from tests.small_runner import SmallRunner, config, points, weights
from tests.unit.test_resume_here import Stopped, in_peace, resumed


class Growing(Dataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count
        self.samples = list(zip(*points(40), strict=True))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def relabel(runner: SmallRunner) -> None:
    inputs, targets = runner.datasets["train"].tensors
    runner.datasets["train"].tensors = (inputs, 1 - targets)


def take_others(runner: SmallRunner) -> None:
    runner.datasets["train"].indices = list(range(10, 20))


def grow(runner: SmallRunner) -> None:
    runner.datasets["train"].count = 30


def other_data(runner: SmallRunner) -> None:
    runner.datasets["train"] = TensorDataset(*points(20))


def other_loader(runner: SmallRunner) -> None:
    runner.dataloaders["train"] = DataLoader(TensorDataset(*points(20)), batch_size=2)


def other_sampler(runner: SmallRunner) -> None:
    runner.datasamplers["train"] = torch.utils.data.SequentialSampler(range(20))


def other_optimizer(runner: SmallRunner) -> None:
    runner.optimizer = torch.optim.SGD(runner.model.parameters(), lr=0.0)


def other_scheduler(runner: SmallRunner) -> None:
    runner.scheduler = torch.optim.lr_scheduler.ConstantLR(runner.optimizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (relabel, "the content of split 'train' is another one"),
        (take_others, "the content of split 'train' is another one"),
        (grow, "the length of split 'train' is another one"),
        (other_data, "the data set of split 'train' is another one"),
        (other_loader, "the loader of split 'train' is another one"),
        (other_sampler, "the sampler of split 'train' is another one"),
        (other_optimizer, "self.optimizer was replaced since training began"),
        (other_scheduler, "self.scheduler was replaced since training began"),
    ],
)
def test_what_is_replaced_between_epochs_is_refused(
    tmp_path: Path, change: Callable[[SmallRunner], None], message: str
) -> None:
    class Changing(SmallRunner):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            if change is take_others:
                self.datasets["train"] = Subset(self.datasets["train"], list(range(10)))
            if change is grow:
                self.datasets["train"] = Growing(20)
            self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
            self.scheduler_interval = "step"

        def train_epoch(self, split: str = "train") -> Any:
            if self.epochs == 1:
                change(self)
            return super().train_epoch(split)

    runner = Changing(config(tmp_path))
    with pytest.raises(ConfigError, match=message):
        runner.train()
    assert runner.epochs == 1


def test_a_data_set_that_overrides_how_it_is_read_is_read_so(tmp_path: Path) -> None:
    class Short(TensorDataset):
        def __len__(self) -> int:
            return 10

    class Doubled(TensorDataset):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [(self.tensors[0][i] * 2, self.tensors[1][i]) for i in indices]

    runner = SmallRunner(config(tmp_path / "short", epoch_end=1))
    runner.datasets["train"] = Short(*points(20))
    runner.train()
    assert runner.steps == 2
    runner = SmallRunner(config(tmp_path / "doubled"))
    runner.datasets["val"] = Doubled(*points(20))
    inputs, targets = points(20)
    plain = nn.functional.cross_entropy(runner.model(inputs * 2), targets).item()
    assert runner.evaluate("val")["val"]["loss"] == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("keys", [[(0, 0.5), (1, 0.5)], ["a", "b"]])
def test_a_sampler_whose_keys_are_no_integers_is_refused(tmp_path: Path, keys: list[Any]) -> None:
    class Keys(Sampler[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(keys)

        def __len__(self) -> int:
            return len(keys)

    runner = SmallRunner(config(tmp_path))
    runner.datasamplers["train"] = Keys()
    with pytest.raises(ConfigError, match="a sampler gives integers, and a batch sampler lists"):
        runner.train()


@pytest.mark.parametrize("step", ["train_step", "evaluate_step"])
def test_a_criterion_that_sums_is_refused_where_losses_are_averaged(tmp_path: Path, step: str) -> None:
    class Sums(SmallRunner):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            self.criterion = nn.CrossEntropyLoss(reduction="sum")
            self.metrics = None

    class Divides(Sums):
        def train_step(self, data: Any) -> Any:
            loss = self.criterion(self.model(data[0]), data[1]) / len(data[1])
            self.advance(loss)
            return None, loss

        def evaluate_step(self, data: Any) -> Any:
            return None, self.criterion(self.model(data[0]), data[1]) / len(data[1])

    with pytest.raises(ConfigError, match="reduction='sum'"):
        dl_runner(Sums, tmp_path).train() if step == "train_step" else dl_runner(Sums, tmp_path).evaluate(
            "val"
        )
    Divides(config(tmp_path / "own")).train()


def dl_runner(kind: type[SmallRunner], root: Path) -> Any:
    """Return a runner whose steps are those of `TorchRunner`."""
    import danling_core as dl

    plain = type(
        "Plain", (kind,), {name: getattr(dl.TorchRunner, name) for name in ("train_step", "evaluate_step")}
    )
    return plain(config(root))


def test_parameters_that_nothing_trains_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, pred: Any, target: Any) -> Any:
            return nn.functional.cross_entropy(pred * self.scale, target)

    class Late(SmallRunner):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            self.criterion = Weighted()
            self.model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            self.model[0].requires_grad_(False)
            self.optimizer = torch.optim.SGD(self.model[1].parameters(), lr=0.1)

        def train_epoch(self, split: str = "train") -> Any:
            if self.epochs == 1:
                self.model[0].requires_grad_(True)
            return super().train_epoch(split)

    Late(config(tmp_path)).train()
    said = capsys.readouterr().err
    assert "1 parameter(s) of the criterion are in no optimizer" in said
    assert "2 parameter(s) of the model are in no optimizer and stay as they are, such as '0.weight'" in said


def test_steps_before_training_are_said_to_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = SmallRunner(config(tmp_path, epoch_end=None, step_end=4))
    loss = runner.criterion(runner.model(points(5)[0]), points(5)[1])
    runner.advance(loss)
    runner.train()
    assert runner.steps == 4 and "1 steps were made before train(): they count" in capsys.readouterr().err


class Drawing(Sampler[int]):
    """Draws its order from a generator of its own."""

    def __init__(self, kind: str) -> None:
        self.rng: Any = {"numpy": np.random.default_rng(3), "python": random.Random(3), "state": None}[kind]
        self.passes = 0

    def __iter__(self) -> Iterator[int]:
        order = list(range(20))
        if self.rng is None:
            self.passes += 1
            random.Random(self.passes).shuffle(order)
        else:
            self.rng.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return 20


@pytest.mark.parametrize("own_loader", [False, True])
@pytest.mark.parametrize("kind", ["numpy", "state", *rarely(["python"])])
@pytest.mark.parametrize("where", [("train", 6), *rarely([(("train", 2),)])])
def test_a_sampler_that_draws_by_itself_is_resumed_or_said(
    tmp_path: Path, kind: str, own_loader: bool, where: tuple[str, int]
) -> None:
    class Sampled(Stopped):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            if own_loader:
                data = self.datasets["train"]
                self.dataloaders["train"] = DataLoader(data, batch_size=5, sampler=Drawing(kind))
            else:
                self.datasamplers["train"] = Drawing(kind)

    fields: dict[str, Any] = {"dataloader": {}} if own_loader else {}
    peace = in_peace(tmp_path, Sampled, epoch_end=3, **fields)
    again = resumed(tmp_path, where, Sampled, epoch_end=3, **fields)
    assert again.resumed is not None
    assert again.bitwise or kind == "state"
    assert weights(again) == weights(peace) or not again.bitwise


def test_a_stream_with_a_state_of_its_own_is_said(tmp_path: Path) -> None:
    class Counting(IterableDataset[Any]):
        def __init__(self) -> None:
            self.samples = list(zip(*points(20), strict=True))
            self.passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            return iter(self.samples[self.passes :] + self.samples[: self.passes])

    class Streamed(Stopped):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            self.datasets["train"] = Counting()

    assert not resumed(tmp_path, ("train", 6), Streamed).bitwise
