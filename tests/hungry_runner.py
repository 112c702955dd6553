"""Runners for `danling tune`: whose batches take memory, of negative losses, which scales its rate, and slow."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import danling_core as dl
from tests.toy_runner import ToyRunner


class Hungry(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input * input.new_ones(len(input), 4_000_000)[:, :2])


class HungryRunner(dl.TorchRunner):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.datasets["train"] = TensorDataset(torch.randn(4096, 2), torch.zeros(4096, dtype=torch.long))
        self.model, self.criterion = Hungry(2, 2), nn.CrossEntropyLoss()


class Lowered(ToyRunner):
    """Has a loss below zero."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.criterion = lambda prediction, target: nn.functional.cross_entropy(prediction, target) - 5


class Scaled(ToyRunner):
    """Trains with eight times the rate of its params."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=8 * self.params.lr)


class Slow(ToyRunner):
    """Takes two milliseconds for each sample."""

    def train_step(self, data: Any) -> Any:
        time.sleep(0.002 * len(data[0]))
        return super().train_step(data)
