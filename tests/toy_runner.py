"""A tiny runner for tests: an MLP on made-up data, which can be slow, fail, or hang where a test asks."""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset

import danling_core as dl
from danling_core.metrics import Accuracy, MetricGroup


class ToyParams(dl.Params):
    width: int = 8
    lr: float = 0.1
    samples: int = 70
    sleep_seconds: float = 0.0
    fail_at_epoch: int | None = None
    fail_rank: int = 0
    kill_at_step: int | None = None
    sigterm_at_step: int | None = None
    fails_in_constructor: bool = False
    sigterm_when_told: bool = False
    leaves_at_the_end: bool = False


class Loud(ValueError):
    """A SIGTERM comes while it is told, as from a launcher that saw another rank end."""

    def __str__(self) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return "the toy fails loudly"


class ToyRunner(dl.TorchRunner):
    params: ToyParams

    def __init__(self, config: object) -> None:
        super().__init__(config)
        generator = torch.Generator().manual_seed(7)
        inputs = torch.randn(self.params.samples, 4, generator=generator)
        targets = (inputs.sum(1) > 0).long()
        split = self.params.samples * 5 // 7
        self.datasets["train"] = TensorDataset(inputs[:split], targets[:split])
        self.datasets["val"] = TensorDataset(inputs[split:], targets[split:])
        width = self.params.width
        self.model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
        self.criterion = nn.CrossEntropyLoss()
        if self.config.optim is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.params.lr, momentum=0.9)
        self.metrics = MetricGroup(accuracy=Accuracy())
        if self.params.fails_in_constructor and self.rank == self.params.fail_rank:
            raise Loud if self.params.sigterm_when_told else ValueError("the toy fails in its constructor")

    def run(self, stages: object = None) -> object:
        status = super().run(stages)  # type: ignore[arg-type]
        if self.params.leaves_at_the_end and self.rank == 1:
            os._exit(0)
        return status

    def train_step(self, data: object) -> tuple[object, torch.Tensor]:
        params = self.params
        if params.sleep_seconds:
            time.sleep(params.sleep_seconds)
        if self.rank == params.fail_rank:
            if params.fail_at_epoch == self.epochs:
                raise ValueError(f"the toy fails in epoch {self.epochs}, as asked")
            first_attempt = self.run_session.attempt == "1.0"
            if params.kill_at_step == self.steps and first_attempt:
                os.kill(os.getpid(), signal.SIGKILL)
            if params.sigterm_at_step == self.steps and first_attempt:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().train_step(data)
