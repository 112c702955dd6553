"""Real processes for what tests/unit/test_runner_training.py tries without them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from danling_core.errors import RanksDiffer
from tests.marks import rarely
from tests.ranks import RankFailed, Ranks
from tests.small_runner import SmallRunner, config, train, trained, weights

# name: ranks, samples of a batch, batches of a window; a global batch of 64 in each
LAYOUTS = {"64x1": (1, 64, 1), "32x2": (2, 32, 1), "16x2x2": (2, 16, 2), "16x4 accumulated": (1, 16, 4)}


def run_layout(name: str, samples: int, kind: str, two_ranks: Ranks, root: str) -> list[dict[str, Any]]:
    world, batch, accum = LAYOUTS[name]
    fields: dict[str, Any] = {
        "step_end": 20,
        "accum_steps": accum,
        "dataloader": {"batch_size": batch},
        "params": {"samples": samples, "width": 4, "kind": kind},
        "run_name": f"{world}-{batch}-{accum}-{samples}-{kind}",
    }
    return two_ranks.run(trained, root, **fields) if world == 2 else [trained(root, **fields)]


@pytest.mark.holds("attributes-17", "training-1")
@pytest.mark.parametrize("kind", ["sized", "stream"])
@pytest.mark.parametrize("samples", [293, *rarely([257])])
def test_gradients_are_those_of_one_large_batch_at_each_of_20_steps(
    samples: int, kind: str, two_ranks: Ranks, tmp_path: Path
) -> None:
    found = {name: run_layout(name, samples, kind, two_ranks, str(tmp_path)) for name in LAYOUTS}
    wanted = torch.tensor(found["64x1"][0]["gradients"])
    assert wanted.shape[0] == 20
    for runs in found.values():
        for run in runs:
            torch.testing.assert_close(torch.tensor(run["gradients"]), wanted, rtol=1e-4, atol=1e-6)
            assert run["counters"][1] == 20


def synced(root: str) -> list[bool]:
    """Whether DDP reduced the gradients in each iter of a run that accumulates over 3."""
    runner = SmallRunner(config(root, accum_steps=3, epoch_end=1, params={"samples": 60}))
    seen: list[bool] = []
    before = runner.backward

    def backward(loss: torch.Tensor) -> None:
        seen.append(runner.model.require_backward_grad_sync)
        before(loss)

    runner.backward = backward  # type: ignore[method-assign]
    runner.train()
    return seen


@pytest.mark.holds("training-1", "bugs-2")
def test_gradients_are_reduced_once_per_window(two_ranks: Ranks, tmp_path: Path) -> None:
    for seen in two_ranks.run(synced, str(tmp_path)):
        assert seen == [False, False, True] * 2


def test_ranks_hold_the_same_weights(two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(trained, str(tmp_path), params={"width": 4, "dropout": 0.5, "samples": 21})
    assert first["weights"] == second["weights"]
    assert first["results"] == second["results"]


@pytest.mark.holds("training-8", "bugs-12")
def test_a_nan_loss_stops_the_run_with_step_rank_and_value(two_ranks: Ranks, tmp_path: Path) -> None:
    fields = {"params": {"nan_at_step": 5, "nan_rank": 1, "samples": 40}, "log_interval": 1, "epoch_end": 3}
    with pytest.raises(RankFailed) as caught:
        two_ranks.run(train, str(tmp_path), **fields)
    last = str(caught.value).strip().splitlines()[-1]
    for word in ("NonFiniteLossError", "the loss is nan", "step 5", "rank 1", "non_finite=skip"):
        assert word in last


@pytest.mark.holds("training-8")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_skip_leaves_the_step_out_on_all_ranks_and_goes_on(
    precision: str, two_ranks: Ranks, tmp_path: Path
) -> None:
    params = {"nan_at_step": 1, "nan_rank": 1, "samples": 40}
    fields: dict[str, Any] = {
        "non_finite": "skip",
        "precision": precision,
        "epoch_end": 2,
        "ema_decay": 0.5,
        "run_name": precision,
    }
    first, second = two_ranks.run(trained, str(tmp_path), params=params, **fields)
    assert first["error"] is None and second["error"] is None
    assert first["weights"] == second["weights"]
    assert all(math.isfinite(weight) for weight in first["weights"])
    assert all(math.isfinite(x) for value in first["ema"] for x in torch.tensor(value).flatten().tolist())
    assert math.isfinite(first["results"][0]["train"]["loss"])
    assert first["counters"][1] == 8
    assert first["scale"] == second["scale"]
    if precision == "fp32":
        assert first["scale"] == 1.0


@pytest.mark.holds("training-3")
def test_an_fp16_overflow_is_skipped_on_all_ranks_and_the_scale_recovers(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    first, second = two_ranks.run(overflowing, str(tmp_path))
    assert first == second
    scales, moved = first["scales"], first["moved"]
    assert scales[2] == scales[1] / 2  # an overflow on rank 1 alone
    assert moved == [True, True, False, True, True, True, True, True]
    assert scales[-1] > scales[2]  # grown again


def overflowing(root: str) -> dict[str, Any]:
    """Scale after each step, and whether it moved the weights; rank 1's gradients overflow in step 2."""

    class Scaled(SmallRunner):
        def train_epoch(self, split: str = "train") -> Any:
            if self.steps == 0:
                scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
                self.training_state.shared["scalers"].load({"optimizer": scaler.state_dict()})
            return super().train_epoch(split)

    runner = Scaled(config(root, precision="fp16", epoch_end=2, params={"samples": 40}))
    scales, moved = [], []
    backward, before = runner.backward, weights(runner)

    def spiked(loss: torch.Tensor) -> None:
        backward(loss * 1e38 if runner.steps == 2 and runner.rank == 1 else loss)

    def watched() -> None:
        nonlocal before
        scales.append(runner.training_state.shared["scalers"].save()["optimizer"]["scale"])
        moved.append(weights(runner) != before)
        before = weights(runner)

    runner.backward, runner.after_step = spiked, watched  # type: ignore[method-assign]
    runner.train()
    return {"scales": scales, "moved": moved, "weights": weights(runner)}


# what requires gradients, and what is trained, changes while training ---------------------------------------


class Layers(SmallRunner):
    """Two layers and a head of its own, with the same weights everywhere, and nothing that looks at a batch."""

    trained: tuple[str, ...] = ("model.0", "model.1", "head")
    frozen: tuple[str, ...] = ()

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        self.head = nn.Linear(2, 2)
        parts = [*self.model.parameters(), *self.head.parameters()]
        with torch.no_grad():
            for number, parameter in enumerate(parts, 1):
                parameter.copy_(torch.linspace(-1, number, parameter.numel()).reshape(parameter.shape))
        for name in self.frozen:
            self.layer(name).requires_grad_(False)
        held = [p for name in self.trained for p in self.layer(name).parameters()]
        self.optimizer = torch.optim.SGD(held, lr=0.1, momentum=0.9)

    def layer(self, name: str) -> Any:
        place, _, number = name.partition(".")
        module = self.unwrap(getattr(self, place))
        return module[int(number)] if number else module

    def train_step(self, data: Any) -> Any:
        self.change()
        pred = self.head(self.model(data[0]))
        loss = self.criterion(pred, data[1])
        self.update_metrics(pred, data[1])
        self.advance(loss)
        return pred, loss

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def change(self) -> None:
        """Called before each step."""


class Unfreezes(Layers):
    frozen = ("model.0",)

    def change(self) -> None:
        if self.steps == 1:
            self.layer("model.0").requires_grad_(True)


class UnfreezesLast(Unfreezes):
    def change(self) -> None:
        if self.steps == 3:
            self.layer("model.0").requires_grad_(True)


class Freezes(Layers):
    def change(self) -> None:
        if self.steps == 1:
            self.layer("model.0").requires_grad_(False)


class AddsGroup(Layers):
    """Trains one more layer from the second epoch on, in a group of its own."""

    trained = ("model.0", "head")
    frozen: tuple[str, ...] = ("model.1",)
    added = "model.1"

    def train_epoch(self, split: str = "train") -> Any:
        if self.epochs == 1 and len(self.optimizer.param_groups) == 1:
            layer = self.layer(self.added).requires_grad_(True)
            self.optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.05})
        return super().train_epoch(split)


class AddsHead(AddsGroup):
    trained = ("model.0", "model.1")
    frozen: tuple[str, ...] = ("head",)
    added = "head"


class AddsOpenHead(AddsHead):
    """Its head requires gradients from the start, so that nothing says when it is to be wrapped."""

    frozen = ()


def changing(root: str, kind: type[Layers], batch_size: int = 5, **fields: Any) -> tuple[str, int, list[Any]]:
    """Train without shuffling; return the error, the steps made and all weights."""
    loader = {"batch_size": batch_size, "shuffle": False}
    runner, error = kind(config(root, params={"samples": 40}, dataloader=loader, **fields)), ""
    try:
        runner.train()
    except RanksDiffer as caught:
        error = str(caught)
    parts = [runner.unwrap(module) for module in (runner.model, runner.head)]
    return error, runner.steps, [p.tolist() for part in parts for p in part.parameters()]


@pytest.mark.parametrize(
    ("kind", "name", "steps"),
    [
        (Unfreezes, "model.0.weight", 4),
        (UnfreezesLast, "model.0.weight", 4),
        (AddsOpenHead, "head.weight", 8),
    ],
)
def test_a_parameter_whose_gradient_is_suddenly_wanted_is_refused_by_its_name(
    two_ranks: Ranks, tmp_path: Path, kind: type[Layers], name: str, steps: int
) -> None:
    for error, made, _ in two_ranks.run(changing, str(tmp_path), kind):
        assert f"parameter {name!r} differs between the ranks after step {steps}" in error
        assert "Nothing is saved" in error and made == steps
    saved = [int(path.name.partition("-")[0]) for path in tmp_path.rglob("records/*.json")]
    assert all(step < steps for step in saved)


@pytest.mark.parametrize(
    ("kind", "fields"), [(AddsGroup, {}), (AddsHead, {}), (Freezes, {"find_unused_parameters": True})]
)
def test_layers_that_come_and_go_while_training_have_the_weights_of_one_rank(
    two_ranks: Ranks, tmp_path: Path, kind: type[Layers], fields: dict[str, Any]
) -> None:
    first, second = two_ranks.run(changing, str(tmp_path / "two"), kind, epoch_end=3, **fields)
    alone = changing(str(tmp_path / "one"), kind, 10, epoch_end=3)
    assert first == second and first[:2] == alone[:2] == ("", 12)
    for found, wanted in zip(first[2], alone[2], strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.holds("training-11")
@pytest.mark.long
@pytest.mark.timeout(600)  # the first compilation takes minutes on a busy machine
def test_a_compiled_model_trains_to_the_same_losses(tmp_path: Path) -> None:
    wanted = SmallRunner(config(tmp_path / "a", params={"width": 4})).train()
    found = SmallRunner(config(tmp_path / "b", params={"width": 4}, compile=True)).train()
    assert found[1]["train"]["loss"] == pytest.approx(wanted[1]["train"]["loss"], rel=1e-4)
