"""The steps of training: accumulation, uneven batches, clipping, precision, losses that blow up."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import danling_core as dl
from danling_core.errors import ConfigError, NonFiniteLossError
from examples.gan.runner import GANRunner
from tests.small_runner import SmallRunner, config, events, points, weights


@pytest.mark.holds("training-1")
def test_the_last_and_smaller_window_is_the_mean_of_its_own_samples(tmp_path: Path) -> None:
    fields = {"params": {"samples": 13}, "epoch_end": 1, "accum_steps": 2}
    shuffled_off = {"batch_size": 5, "shuffle": False}
    runner = SmallRunner(config(tmp_path, dataloader=shuffled_off, **fields))
    inputs, targets = points(20)
    runner.train()
    linear = nn.Linear(2, 2)
    linear.load_state_dict(SmallRunner(config(tmp_path)).model.state_dict())
    for gradient, span in zip(runner.gradients, [slice(0, 10), slice(10, 13)], strict=True):
        linear.zero_grad()
        nn.functional.cross_entropy(linear(inputs[span]), targets[span]).backward()
        own = torch.cat([p.grad.flatten() for p in linear.parameters()])
        torch.testing.assert_close(torch.tensor(gradient), own)
        with torch.no_grad():
            for p in linear.parameters():
                p -= 0.1 * p.grad


# clipping ---------------------------------------------------------------------------------------------------
@pytest.mark.holds("training-4")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped_by_norm(precision: str, tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, clip_grad_norm=0.01, epoch_end=1, precision=precision))
    before = torch.tensor(weights(runner))
    norms = step_sizes(runner, before)
    assert len(norms) >= 4
    assert all(norm == pytest.approx(0.1 * 0.01, rel=1e-2) for norm in norms if norm)
    assert any(norms)


def step_sizes(runner: SmallRunner, before: torch.Tensor) -> list[float]:
    """How far SGD moved the weights in each step: the clipped gradient times the rate."""
    norms: list[float] = []

    def watched() -> None:
        nonlocal before
        now = torch.tensor(weights(runner))
        norms.append(float((now - before).norm()))
        before = now

    runner.after_step = watched  # type: ignore[method-assign]
    runner.train()
    return norms


@pytest.mark.holds("training-4")
def test_gradients_are_clipped_by_value(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, clip_grad_value=1e-3, step_end=1))
    before = torch.tensor(weights(runner))
    runner.train()
    moved = (torch.tensor(weights(runner)) - before).abs().max()
    assert float(moved) == pytest.approx(0.1 * 1e-3, rel=1e-3)


# losses and gradients that are not finite -------------------------------------------------------------------


@pytest.mark.holds("training-8", "files-4")
def test_the_last_checkpoint_is_intact_after_a_nan(tmp_path: Path) -> None:
    fields = {"params": {"nan_at_step": 6}, "epoch_end": 3, "log_interval": 50}
    with pytest.raises(NonFiniteLossError, match="step 6"):
        SmallRunner(config(tmp_path, **fields)).train()
    good = SmallRunner.from_checkpoint(find_run(tmp_path))
    assert all(math.isfinite(weight) for weight in weights(good))
    status = events_of(find_run(tmp_path))[-1]
    assert status["event"] == "failed" and "step 6" in status["error"]


def find_run(root: Path) -> str:
    (found,) = root.glob("*/*/config.yaml")
    return str(found.parent)


def events_of(folder: str) -> list[dict[str, Any]]:
    class At:
        dir = folder

    return events(At())


# user's own steps -------------------------------------------------------------------------------------------
class TwoLosses(SmallRunner):
    """Computes its own loss, on data of its own shape."""

    def train_step(self, data: Any) -> tuple[Any, torch.Tensor]:
        pred = self.model(data[0])
        loss = self.criterion(pred, data[1]) + 0.1 * pred.square().mean()
        self.advance(loss)
        return pred, loss


SAMPLES, BATCH, ACCUM, CLIP = 46, 4, 2, 0.05


class FixedGAN(GANRunner):
    """The GAN of the examples, on images and noise that a test knows."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(SAMPLES, 1, 8, 8, generator=generator)
        self.table = torch.randn(SAMPLES, self.params.noise, generator=generator)
        self.datasets = {"train": torch.utils.data.TensorDataset(images, torch.arange(SAMPLES))}

    def train_step(self, data: Any) -> Any:
        self.indices = data[1]
        return super().train_step(data)

    def noise(self, count: int) -> torch.Tensor:
        return self.table[self.indices]


def plain_gan(runner: FixedGAN) -> tuple[nn.Module, nn.Module, list[float]]:
    """Train copies of a GAN's networks for an epoch in plain torch; return them, and each window's gradient norms."""
    makes, judges = copy.deepcopy(runner.model), copy.deepcopy(runner.critic)
    adams = [torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.5, 0.999)) for net in (makes, judges)]
    images, norms = runner.datasets["train"].tensors[0].flatten(1), []

    def loss_of(shown: torch.Tensor, truth: float) -> torch.Tensor:
        verdict = judges(shown)
        return nn.functional.binary_cross_entropy_with_logits(verdict, torch.full_like(verdict, truth))

    def add(net: nn.Module, loss: torch.Tensor) -> None:
        weights = list(net.parameters())
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient if weight.grad is None else weight.grad + gradient

    def step(net: nn.Module, adam: torch.optim.Optimizer) -> None:
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), CLIP)))
        adam.step()
        adam.zero_grad()

    rows = torch.arange(SAMPLES)
    for window in rows.split(BATCH * ACCUM):
        batches = window.split(BATCH)
        for number, batch in enumerate(batches, 1):
            share = len(batch) / len(window)
            made = makes(runner.table[batch])
            add(judges, share * (loss_of(images[batch], 1.0) + loss_of(made.detach(), 0.0)))
            if number == len(batches):
                step(judges, adams[1])
            add(makes, share * loss_of(made, 1.0))
            if number == len(batches):
                step(makes, adams[0])
    return makes, judges, norms


@pytest.mark.holds("training-1", "training-4")
def test_two_optimizers_accumulate_and_clip_each_by_itself_as_in_plain_torch(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"accum_steps": ACCUM, "clip_grad_norm": CLIP, "epoch_end": 1}
    loader = {"batch_size": BATCH, "shuffle": False}
    given = config(tmp_path, runner="examples.gan.runner:GANRunner", dataloader=loader, **fields)
    runner = FixedGAN(given)
    makes, judges, norms = plain_gan(runner)
    assert len(norms) == 2 * 6 and min(norms) > CLIP
    runner.train()
    assert runner.steps == 6
    for net, plain in ((runner.model, makes), (runner.critic, judges)):
        for found, wanted in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-6)


@pytest.mark.holds("methods-2")
def test_a_step_of_the_users_own_trains(tmp_path: Path) -> None:
    runner = TwoLosses(config(tmp_path, epoch_end=3))
    results = runner.train()
    assert results[2]["train"]["loss"] < results[0]["train"]["loss"]


class Forgetful(SmallRunner):
    def train_step(self, data: Any) -> tuple[Any, torch.Tensor]:
        pred = self.model(data[0])
        return pred, self.criterion(pred, data[1])


@pytest.mark.holds("methods-2")
def test_a_step_that_never_advances_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="never called self.advance"):
        Forgetful(config(tmp_path)).train()


class Mapped(dl.TorchRunner):
    """Batches are mappings, made by a collate function of its own."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        inputs, targets = points(16)
        self.datasets["train"] = [(i, t) for i, t in zip(inputs, targets, strict=True)]
        self.model, self.criterion = nn.Linear(2, 2), nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def collate_fn(self, samples: list[Any]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"input": torch.stack([s[0] for s in samples]), "target": torch.stack([s[1] for s in samples])}


def test_batches_may_be_mappings(tmp_path: Path) -> None:
    results = Mapped(config(tmp_path)).train()
    assert results[1]["train"]["loss"] < results[0]["train"]["loss"]


class Weighted(SmallRunner):
    """Losses are weighted by what a batch says, as by its tokens: every sample of class 1 counts."""

    def size_of(self, batch: Any) -> int:  # type: ignore[override]
        return int(batch[1].sum())


@pytest.mark.holds("training-2")
def test_losses_are_weighted_by_the_users_own_size(tmp_path: Path) -> None:
    runner = Weighted(config(tmp_path, epoch_end=1, seed=2))
    result = runner.train()[0]["train"]
    counts = counts_of(runner)
    weighted = sum(count * loss for count, loss in zip(counts, runner.step_losses, strict=True)) / sum(counts)
    assert result["loss"] == pytest.approx(weighted, rel=1e-5)
    assert result["loss"] != pytest.approx(sum(runner.step_losses) / len(counts), rel=1e-5)


def counts_of(runner: SmallRunner) -> list[int]:
    """Samples of class 1 in each batch of the first pass."""
    sampler = runner.datasamplers["train"]
    sampler.set_pass(0)
    targets = points(27)[1][:20]
    return [int(targets[batch].sum()) for batch in sampler]


# options ----------------------------------------------------------------------------------------------------
class Images(dl.TorchRunner):
    def __init__(self, given: Any) -> None:
        super().__init__(given)
        images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
        self.datasets["train"] = torch.utils.data.TensorDataset(images, torch.arange(8) % 2)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)


@pytest.mark.holds("training-11")
def test_channels_last_changes_the_layout_and_not_the_result(tmp_path: Path) -> None:
    plain = Images(config(tmp_path / "a"))
    last = Images(config(tmp_path / "b", channels_last=True))
    wanted, found = plain.train(), last.train()
    assert last.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert found[1]["train"]["loss"] == pytest.approx(wanted[1]["train"]["loss"], rel=1e-4)


@pytest.mark.holds("attributes-10", "training-11")
def test_compile_is_opt_in_and_hands_back_the_users_module(tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[nn.Module] = []

    def compile_(module: nn.Module) -> nn.Module:
        asked.append(module)
        return torch._dynamo.OptimizedModule(module, lambda function: function)

    monkeypatch.setattr(torch, "compile", compile_)
    SmallRunner(config(tmp_path)).train()
    assert not asked
    runner = SmallRunner(config(tmp_path, compile=True))
    own = runner.model
    runner.train()
    assert asked == [own]
    assert runner.unwrap(runner.model) is own
    assert list(runner.state_dict()["model"]) == ["weight", "bias"]


@pytest.mark.holds("training-7")
def test_early_stopping_counts_results_that_are_not_better(tmp_path: Path) -> None:
    class Stuck(SmallRunner):
        def evaluate_epoch(self, split: str = "val") -> dict[str, Any]:
            return {"loss": 1.0}

    runner = Stuck(config(tmp_path, epoch_end=50, patience=3))
    runner.train()
    assert runner.epochs == 4
    assert events(runner)[-1]["event"] == "completed"


@pytest.mark.holds("methods-3")
def test_train_can_be_followed_by_evaluate_and_preceded_by_it(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    before = runner.evaluate()["val"]["loss"]
    runner.train()
    after = runner.evaluate()["val"]["loss"]
    assert after < before
    assert after == pytest.approx(runner.results[1]["val"]["loss"])


@pytest.mark.holds("attributes-10")
def test_a_model_is_needed(tmp_path: Path) -> None:
    class Empty(dl.TorchRunner):
        pass

    runner = Empty(config(tmp_path))
    runner.datasets["train"] = torch.utils.data.TensorDataset(*points(4))
    with pytest.raises(ConfigError, match="sets no model"):
        runner.train()


class Named(torch.utils.data.Dataset[Any]):
    """Samples as a tokenizer names them."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.ones(2), "labels": torch.tensor(1)}


def test_a_batch_without_an_input_is_refused_with_the_keys_it_has(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.datasets["train"] = Named()
    with pytest.raises(ConfigError, match=r"mapping of \['input_ids', 'labels'\].*override train_step"):
        runner.train()
