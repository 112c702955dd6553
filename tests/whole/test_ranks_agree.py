"""Two ranks hold one model: weights are made equal where they are placed, and compared before every commit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from danling_core.errors import RunInterrupted
from tests.ranks import RankFailed, Ranks
from tests.small_runner import SmallRunner, config, points, weights


class PerRank(SmallRunner):
    """Its weights differ between ranks until somebody makes them equal."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        disturb(self)


@torch.no_grad()
def disturb(runner: SmallRunner) -> None:
    """Change one class's weights, by another value on each rank: all classes alike would change no loss."""
    for parameter in runner.unwrap(runner.model).parameters():
        parameter[0] += 3.0 * runner.rank


def evaluated(root: str, way: str) -> Any:
    """Evaluate in four ways; what each reports, and the outputs."""
    runner = PerRank(config(root))
    if way == "loaded by hand":
        runner.evaluate("val")  # which places the model
        state = {
            name: value + 0.25 * runner.rank
            for name, value in runner.unwrap(runner.model).state_dict().items()
        }
        runner.load_pretrained(state)
    elif way == "changed by hand":
        runner.infer("val")
        disturb(runner)
    elif way == "a stage":
        status = runner.run(["evaluate"])
        loss = status.evaluation["val"]["loss"] if status and status.evaluation else None
        return loss, runner.infer("val").tolist(), weights(runner)
    elif way == "an epoch":
        return runner.evaluate_epoch("val")["loss"], runner.infer("val").tolist(), weights(runner)
    return runner.evaluate("val")["val"]["loss"], runner.infer("val").tolist(), weights(runner)


@pytest.mark.parametrize("way", ["at once", "loaded by hand", "changed by hand", "a stage", "an epoch"])
def test_an_evaluation_without_training_is_of_one_model(way: str, two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(evaluated, str(tmp_path), way)
    assert first[1:] == second[1:] and second[0] in (first[0], None)
    inputs, targets = points(27)
    with torch.no_grad():
        outputs = SmallRunner(config(tmp_path / "alone")).model(inputs[20:])
        expected = nn.functional.cross_entropy(outputs, targets[20:]).item()
    assert first[0] == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(torch.tensor(first[1]), outputs)


class Bypasses(SmallRunner):
    def train_step(self, data: Any) -> Any:
        pred = self.unwrap(self.model)(data[0])
        loss = self.criterion(pred, data[1])
        self.advance(loss)
        return pred, loss

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


class HasOutsider(SmallRunner):
    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.temperature = nn.Parameter(torch.ones(()))
        self.optimizer.add_param_group({"params": [self.temperature]})


class HasContainer(SmallRunner):
    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.heads = nn.ModuleDict({"a": nn.Linear(2, 2)})
        self.optimizer.add_param_group({"params": list(self.heads.parameters())})


def train(root: str, kind: type[SmallRunner]) -> Any:
    runner = kind(config(root))
    runner.train()
    return weights(runner)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Bypasses, "RanksDiffer: parameter 'model.weight' differs between the ranks after step"),
        (HasOutsider, r"1 parameter\(s\) of no module of the runner"),
        (HasContainer, "self.heads is a ModuleDict, which has no forward of its own"),
    ],
)
def test_gradients_that_are_not_reduced_are_refused(
    two_ranks: Ranks, tmp_path: Path, kind: type[SmallRunner], message: str
) -> None:
    with pytest.raises(RankFailed, match=message):
        two_ranks.run(train, str(tmp_path), kind)


def two_optimizers(root: str, **fields: Any) -> Any:
    from examples.gan.runner import GANRunner

    class Fixed(GANRunner):
        """The same noise for the same sample, on any number of ranks."""

        def __init__(self, given: Any) -> None:
            super().__init__(given)
            images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))
            self.datasets = {name: TensorDataset(images, torch.arange(24)) for name in ("train", "val")}
            torch.manual_seed(3)
            self.model[0].reset_parameters()
            self.critic[0].reset_parameters()
            self.table = torch.randn(24, self.params.noise, generator=torch.Generator().manual_seed(2))

        def train_step(self, data: Any) -> Any:
            self.indices = data[1]
            return super().train_step(data)

        def noise(self, count: int) -> torch.Tensor:
            return self.table[self.indices]

    os.environ["OMP_NUM_THREADS"] = "1"
    runner = Fixed(config(root, runner="examples.gan.runner:GANRunner", **fields))
    results = runner.train()
    critic = [v.flatten() for v in runner.unwrap(runner.critic).state_dict().values()]
    return weights(runner), torch.cat(critic).tolist(), results[1]["train"]


def test_two_optimizers_come_to_the_same_weights_on_one_and_two_ranks(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    alone = two_optimizers(str(tmp_path / "alone"), dataloader={"batch_size": 8})
    first, second = two_ranks.run(two_optimizers, str(tmp_path / "two"), dataloader={"batch_size": 4})
    assert first == second
    for one, two in zip(alone[:2], first[:2], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-4, atol=1e-5)
    assert first[2] == pytest.approx(alone[2], rel=1e-4)


def aurocs(root: str) -> Any:
    from torchmetrics.classification import BinaryAUROC

    runner = SmallRunner(config(root, params={"val_samples": 1}))
    auroc = BinaryAUROC()

    class Binary:
        def __init__(self) -> None:
            self.inner, self.persistent, self._defaults = auroc, auroc.persistent, auroc._defaults

        def __getattr__(self, name: str) -> Any:
            return getattr(auroc, name)

        def update(self, pred: torch.Tensor, target: torch.Tensor) -> None:
            auroc.update(pred.softmax(1)[:, 1], target)

    runner.evaluate_metrics, runner.metrics = Binary(), None
    return runner.evaluate("val")


def test_lists_of_torchmetrics_need_a_sample_on_every_rank(two_ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"1 rank\(s\) had no sample of this split"):
        two_ranks.run(aurocs, str(tmp_path))


class Unfreezes(SmallRunner):
    """Trains its last layer in the first epoch, and all of them from the second on."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        with torch.no_grad():
            for number, parameter in enumerate(self.model.parameters()):
                parameter.copy_(
                    torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) * (1 + number)
                )
        self.model[0].requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def train_epoch(self, split: str = "train") -> Any:
        if self.epochs == 1:
            self.unwrap(self.model)[0].requires_grad_(True)
        return super().train_epoch(split)


def unfrozen(root: str, stop_at: int | None = None, **fields: Any) -> Any:
    runner = Unfreezes(config(root, epoch_end=3, save_interval=1, **fields))
    if stop_at is not None:
        step = runner.after_step
        runner.after_step = lambda: step() if runner.steps < stop_at else runner.request_stop("test")  # type: ignore[method-assign]
    try:
        runner.train()
    except RunInterrupted:
        return None
    return weights(runner), bool(runner.bitwise)


def test_layers_that_are_unfrozen_while_training_are_reduced_and_resumed(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"dataloader": {"batch_size": 5, "shuffle": False}}
    first, second = two_ranks.run(unfrozen, str(tmp_path / "two"), **fields)
    assert first == second
    alone = unfrozen(str(tmp_path / "one"), dataloader={"batch_size": 10, "shuffle": False})
    assert first[0] == pytest.approx(alone[0], rel=1e-4)
    assert two_ranks.run(unfrozen, str(tmp_path / "again"), 3, **fields) == [None, None]
    assert two_ranks.run(unfrozen, str(tmp_path / "again"), **fields) == [first, first]
