"""The runner that `flow_overhead` times: epochs with the same work in each, however long it takes."""

from __future__ import annotations

from time import perf_counter, sleep
from typing import Any

import torch
from torch import nn

import danling_core as dl

_SQUARE = torch.ones(64, 64)


class EpochParams(dl.Params):
    """Work of an epoch beside its steps; nothing of it gets shorter when something else takes longer."""

    wait_seconds: float
    products: int
    """Of two square matrices."""


class EpochRunner(dl.TorchRunner):
    """A few real steps; then a wait, as for a GPU, or work that keeps a core busy."""

    params: EpochParams

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        inputs = torch.randn(320, 64, generator=torch.Generator().manual_seed(0))
        self.datasets["train"] = (inputs, inputs.sum(dim=1).gt(0).long())
        self.model = nn.Linear(64, 2)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def train_epoch(self, split: str = "train") -> dict[str, Any]:
        result = super().train_epoch(split)
        multiply(self.params.products)
        sleep(self.params.wait_seconds)
        return result


def multiply(products: int) -> None:
    """About 20 us of one core each."""
    for _ in range(products):
        torch.mm(_SQUARE, _SQUARE)


def products_in(seconds: float) -> int:
    """Return how many products keep a core of this machine busy for about that long."""
    torch.set_num_threads(1)
    multiply(1000)
    began = perf_counter()
    multiply(1000)
    return round(1000 * seconds / (perf_counter() - began))
