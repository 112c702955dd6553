"""A runner whose batches take memory: sixteen megabytes for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import danling_core as dl


class Hungry(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input * input.new_ones(len(input), 4_000_000)[:, :2])


class HungryRunner(dl.TorchRunner):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.datasets["train"] = TensorDataset(torch.randn(4096, 2), torch.zeros(4096, dtype=torch.long))
        self.model, self.criterion = Hungry(2, 2), nn.CrossEntropyLoss()
