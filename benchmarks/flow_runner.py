"""The runner that `flow_overhead` times: epochs of a given length, whatever the machine."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from torch import nn

import danling_core as dl


class EpochParams(dl.Params):
    """How long an epoch takes, and what it does meanwhile."""

    epoch_seconds: float
    work: Literal["wait", "compute"]


class EpochRunner(dl.TorchRunner):
    """A few real steps; for the rest of the epoch's time waiting, as for a GPU, or keeping a core busy."""

    params: EpochParams

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        inputs = torch.randn(320, 64, generator=torch.Generator().manual_seed(0))
        self.datasets["train"] = (inputs, inputs.sum(dim=1).gt(0).long())
        self.model = nn.Linear(64, 2)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def train_epoch(self, split: str = "train") -> dict[str, Any]:
        """The epoch, stretched to `epoch_seconds`."""
        ends_at = time.monotonic() + self.params.epoch_seconds
        result = super().train_epoch(split)
        while self.params.work == "compute" and time.monotonic() < ends_at:
            torch.mm(self._square, self._square)
        time.sleep(max(0.0, ends_at - time.monotonic()))
        return result

    _square = torch.ones(64, 64)
