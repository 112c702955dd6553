"""A runner small enough to compute by hand, and what tests of the runner share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import danling_core as dl
from danling_core.config import Config
from danling_core.metrics import Accuracy, MetricGroup

# Stated, so that no test asks git.
EXPERIMENT_ID = "e" * 40


class SmallParams(dl.Params):
    samples: int = 20
    val_samples: int = 7
    width: int = 0
    batch_norm: bool = False
    dropout: float = 0.0
    kind: str = "sized"
    nan_at_step: int | None = None
    nan_rank: int = 0
    spike_at_step: int | None = None


class Stream(IterableDataset[Any]):
    """The same samples without a length."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.samples = list(zip(inputs, targets, strict=True))

    def __iter__(self) -> Any:
        return iter(self.samples)


class SmallRunner(dl.TorchRunner):
    """Classifies points of a plane; keeps what a test may want to look at."""

    params: SmallParams

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        params = self.params
        inputs, targets = points(params.samples + params.val_samples)
        cut = params.samples
        self.datasets["train"] = self.made(inputs[:cut], targets[:cut])
        self.datasets["val"] = self.made(inputs[cut:], targets[cut:])
        torch.manual_seed(3)
        self.model = model(params)
        self.criterion = nn.CrossEntropyLoss()
        if self.config.optim is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.metrics = MetricGroup(accuracy=Accuracy())
        self.gradients: list[list[float]] = []
        self.step_losses: list[float] = []
        self.rates: list[float] = []

    def made(self, inputs: torch.Tensor, targets: torch.Tensor) -> Any:
        return Stream(inputs, targets) if self.params.kind == "stream" else TensorDataset(inputs, targets)

    def train_step(self, data: Any) -> tuple[Any, torch.Tensor]:
        if self.params.nan_at_step == self.steps and self.rank == self.params.nan_rank:
            data = data[0] * float("nan"), data[1]
        if self.params.spike_at_step == self.steps and self.rank == self.params.nan_rank:
            data = data[0] * 1e30, data[1]
        pred, loss = super().train_step(data)
        self.step_losses.append(float(loss.detach()))
        if self.current_step.ends_window:
            self.after_step()
        return pred, loss

    def after_step(self) -> None:
        """Called after each optimizer step; for a test to replace."""

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        if self.current_step.ends_window:
            grads = [p.grad.flatten() for p in self.unwrap(self.model).parameters() if p.grad is not None]
            self.gradients.append(torch.cat(grads).tolist())
            self.rates.append(self.optimizer.param_groups[0]["lr"])


def points(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(count, 2, generator=torch.Generator().manual_seed(11))
    return inputs, (inputs[:, 0] + 0.3 * inputs[:, 1] > 0).long()


def model(params: SmallParams) -> nn.Module:
    if not params.width:
        return nn.Linear(2, 2)
    norm = [nn.BatchNorm1d(params.width)] if params.batch_norm else []
    return nn.Sequential(
        nn.Linear(2, params.width), *norm, nn.ReLU(), nn.Dropout(params.dropout), nn.Linear(params.width, 2)
    )


def config(root: Path | str, **fields: Any) -> Config:
    """4 batches of 5 in an epoch on one rank, 2 epochs, unless told otherwise."""
    known: dict[str, Any] = {
        "experiment_id": EXPERIMENT_ID,
        "project_root": os.fspath(root),
        "nproc_per_node": "auto",
        "device": "cpu",
        "dataloader": {"batch_size": 5},
        "progress_bar": False,
        "sanity_batches": 0,  # runners here fail on purpose; tests/whole/test_look.py looks
    }
    if not {"step_end", "iter_end", "epoch_end"} & set(fields):
        known["epoch_end"] = 2
    return Config.from_dict({**known, **fields})


def events(runner: Any, kind: str | None = None) -> list[dict[str, Any]]:
    lines = Path(runner.dir, "events.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return found if kind is None else [event for event in found if event["event"] == kind]


def weights(runner: Any) -> list[float]:
    state = runner.unwrap(runner.model).state_dict()
    return torch.cat([value.double().flatten() for value in state.values()]).tolist()


def train(root: str, **fields: Any) -> None:
    """Train a `SmallRunner` on this rank; raises what that raises."""
    SmallRunner(config(root, **fields)).train()


def trained(root: str, **fields: Any) -> dict[str, Any]:
    """Train a `SmallRunner` on this rank; what it came to, in plain values."""
    runner = SmallRunner(config(root, **fields))
    error = None
    try:
        runner.train()
    except dl.DanLingError as caught:
        error = f"{type(caught).__name__}: {caught}"
    return {
        "results": runner.results,
        "weights": weights(runner),
        "gradients": runner.gradients,
        "counters": (runner.iters, runner.steps, runner.epochs),
        "ends": (runner.iter_end, runner.step_end, runner.epoch_end),
        "progress": runner.progress,
        "error": error,
        "scale": runner.state_dict()["scalers"].get("optimizer", {}).get("scale"),
        "ema": None if runner.ema is None else [v.tolist() for v in runner.ema.module.state_dict().values()],
        "rates": runner.rates,
    }
