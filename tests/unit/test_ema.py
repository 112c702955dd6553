"""The moving average of the weights: followed, skipped, saved, restored and evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from danling_core.optim.ema import EMA
from tests.small_runner import SmallRunner, config, points


def parameters(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.holds("training-5")
def test_the_average_follows_the_weights_and_copies_the_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    ema = EMA(model, decay=0.75)
    wanted = parameters(model)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        model(torch.randn(4, 2))
        ema.update(model)
        wanted = 0.75 * wanted + 0.25 * parameters(model)
    torch.testing.assert_close(parameters(ema.module), wanted)
    assert torch.equal(ema.module[1].running_mean, model[1].running_mean)
    assert not any(p.requires_grad for p in ema.parameters()) and not ema.module.training


@pytest.mark.holds("training-5")
@pytest.mark.parametrize("taken", [0.0, 1.0])
def test_a_skipped_step_leaves_no_nan_behind(taken: float) -> None:
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.5)
    before = parameters(ema.module)
    with torch.no_grad():
        model.weight.fill_(float("nan") if taken == 0.0 else 3.0)
    ema.update(model, torch.tensor(taken))
    assert torch.equal(parameters(ema.module), before) == (taken == 0.0)
    assert torch.isfinite(parameters(ema.module)).all()


@pytest.mark.holds("attributes-11")
def test_it_is_updated_once_per_step_and_used_to_evaluate_and_infer(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, ema_decay=0.5, accum_steps=2, epoch_end=1))
    wanted = parameters(runner.model)

    def watched() -> None:
        nonlocal wanted
        wanted = 0.5 * wanted + 0.5 * parameters(runner.model)

    runner.after_step = watched  # type: ignore[method-assign]
    result = runner.train()[0]
    torch.testing.assert_close(parameters(runner.ema.module), wanted)
    inputs, targets = points(27)
    with torch.no_grad():
        averaged = nn.functional.cross_entropy(runner.ema(inputs[20:]), targets[20:]).item()
        plain = nn.functional.cross_entropy(runner.model(inputs[20:]), targets[20:]).item()
    assert result["val"]["loss"] == pytest.approx(averaged) != pytest.approx(plain)
    runner.datasets["infer"] = runner.datasets["val"]
    torch.testing.assert_close(runner.infer(), runner.ema(inputs[20:]))


def test_a_state_inside_an_evaluation_holds_the_trained_weights_beside_the_average(tmp_path: Path) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []

    class Asks(SmallRunner):
        def evaluate_step(self, data: Any) -> Any:
            state = self.state_dict()
            joined = [torch.cat([v.flatten() for v in state[name].values()]) for name in ("model", "ema")]
            seen.append((*joined, parameters(self.model)))
            return super().evaluate_step(data)

    runner = Asks(config(tmp_path, ema_decay=0.5, epoch_end=1))
    average = parameters(runner.model)

    def watched() -> None:
        nonlocal average
        average = 0.5 * average + 0.5 * parameters(runner.model)

    runner.after_step = watched  # type: ignore[method-assign]
    runner.train()
    trained = parameters(runner.model)
    assert len(seen) == 2 and not torch.allclose(trained, average)
    for model, ema, evaluated in seen:
        assert torch.equal(model, trained)
        torch.testing.assert_close(ema, average)
        torch.testing.assert_close(evaluated, average)


@pytest.mark.holds("attributes-11")
def test_it_is_saved_and_restored(tmp_path: Path) -> None:
    class Stops(SmallRunner):
        def train_epoch(self, split: str = "train") -> dict[str, Any]:
            if self.epochs == 1 and not self.resumed:
                raise KeyboardInterrupt
            return super().train_epoch(split)

    fields = {"ema_decay": 0.9, "epoch_end": 3}
    whole = SmallRunner(config(tmp_path / "whole", **fields))
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        Stops(config(tmp_path, **fields)).train()
    again = Stops(config(tmp_path, **fields))
    again.train()
    assert again.epochs == 3
    assert torch.equal(parameters(again.ema.module), parameters(whole.ema.module))


def test_there_is_none_unless_asked_for(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.train()
    assert runner.ema is None and runner.state_dict()["ema"] is None


def test_complex_weights_are_averaged_too() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    ema = EMA(model, decay=0.5)
    with torch.no_grad():
        model.weight.mul_(3j)
    ema.update(model)
    assert ema.module.weight.tolist() == [0.5 + 1.5j] * 3
    ema.update(model, torch.tensor(1.0))
    assert ema.module.weight.tolist() == [0.25 + 2.25j] * 3
