"""The moving average of the weights: followed, skipped, saved, restored and evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import danling_core as dl
from danling_core.optim.averages import EMA, SWA
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


# other averages ---------------------------------------------------------------------------------------------
def moved(average: Any, model: nn.Module, steps: int) -> list[float]:
    """The average of a weight that is its step's number."""
    found = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.fill_(float(step))  # type: ignore[operator,union-attr]
        average.update(model)
        found.append(float(average.module.weight[0, 0]))
    return found


def test_a_warm_up_begins_with_a_smaller_decay() -> None:
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.zero_()
    wanted, value = [], 0.0
    for step in range(1, 31):
        decay = min(0.7, (1 + step) / (10 + step))
        value = decay * value + (1 - decay) * step
        wanted.append(value)
    assert moved(EMA(model, 0.7, warmup=True), model, 30) == pytest.approx(wanted, rel=1e-5)


def test_an_average_may_be_updated_every_few_steps() -> None:
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.zero_()
    assert moved(EMA(model, 0.5, every_steps=3), model, 7) == [0, 0, 1.5, 1.5, 1.5, 3.75, 3.75]


def test_swa_is_the_equal_average_since_its_start() -> None:
    model = nn.Linear(1, 1)
    assert moved(SWA(model, start=2), model, 6) == pytest.approx([1, 2, 3, 3.5, 4, 4.5])
    assert moved(SWA(model, start=2, every_steps=2), model, 6) == pytest.approx([1, 2, 2, 4, 4, 5])
    norm = nn.BatchNorm1d(1)
    average = SWA(norm, start=0)
    for mean in (1.0, 3.0):
        norm.running_mean.fill_(mean)  # type: ignore[union-attr]
        norm.num_batches_tracked.fill_(int(mean))  # type: ignore[union-attr]
        average.update(norm)
    assert float(average.module.running_mean) == 2.0 and int(average.module.num_batches_tracked) == 3


class Averaging(SmallRunner):
    """Has an average of torch's own where it is asked for, and may be stopped."""

    stops_at: int | None = None
    has_own = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.has_own:
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.8))

    def after_step(self) -> None:
        if self.steps == self.stops_at:
            self.request_stop()


@pytest.mark.parametrize(
    "fields",
    [
        {"average": {"warmup": True, "decay": 0.9, "every_steps": 2}},
        {
            "average": {"name": "swa", "start": 0.4},
            "non_finite": "skip",
            "params": {"nan_at_step": 7, "width": 3},
        },
        {
            "average": {"name": "swa", "start": 2, "every_steps": 2},
            "params": {"width": 3, "batch_norm": True},
        },
        {},
    ],
    ids=["ema", "swa, a skipped step", "swa, BatchNorm", "torch's own"],
)
def test_averages_survive_a_stop(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Averaging, "has_own", not fields)
    known = {"epoch_end": 3, "save_interval_steps": 1, **fields}
    whole = Averaging(config(tmp_path / "whole", **known))
    whole.train()
    monkeypatch.setattr(Averaging, "stops_at", 6)
    with pytest.raises(dl.RunInterrupted):
        Averaging(config(tmp_path / "cut", **known)).train()
    monkeypatch.setattr(Averaging, "stops_at", None)
    resumed = Averaging(config(tmp_path / "cut", **known))
    resumed.train()
    assert resumed.resumed is not None and resumed.bitwise
    ours, theirs = resumed.ema.state_dict(), whole.ema.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        assert same, name
    assert resumed.results == whole.results
    assert not torch.equal(parameters(whole.ema.module), parameters(whole.model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"average": {"name": "swa", "decay": 0.5}}, "average: decay means nothing to 'swa'"),
        ({"average": {"start": 4}}, "average: start means nothing to 'ema'"),
        ({"average": {"decay": 1.0}}, "average.decay: wanted a number < 1"),
        ({"average": {"every_steps": 0}}, "average.every_steps: wanted a number >= 1"),
        ({"average": {"name": "sma"}}, "average.name: .*'ema' or 'swa'"),
        ({"average": {"dekay": 0.5}}, "average.*unknown key 'dekay': did you mean 'decay'"),
        ({"average": {}, "ema_decay": 0.5}, "average and ema_decay are both given"),
        (
            {"average": {"name": "swa"}, "params": {"kind": "stream"}},
            "average.start is 0.75, a share of all steps, and their number is not known",
        ),
    ],
)
def test_averages_that_make_no_sense_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(dl.ConfigError, match=message):
        SmallRunner(config(tmp_path, **fields)).train()


def test_what_cannot_follow_is_refused(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.ema = nn.Linear(2, 2)
    with pytest.raises(
        dl.ConfigError, match="self.ema is a Linear, wanted a torch.optim.swa_utils.AveragedModel"
    ):
        runner.train()
