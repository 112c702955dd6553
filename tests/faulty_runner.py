"""A runner for tests whose ranks die, stop or hang where the environment, and not the config, says so."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import danling_core as dl
from danling_core.config import Config
from danling_core.metrics import Accuracy, MetricGroup

FAULT = "DANLING_TEST_FAULT"


class FaultyParams(dl.Params):
    width: int = 8
    samples: int = 60
    dropout: float = 0.2
    batch_norm: bool = False
    overflows_at: int | None = None
    """A training sample whose loss is infinite."""
    step_seconds: float = 0.0
    memory: bool = False
    """Keep the inputs of the last step, of each rank's own, and add them to those of the next."""
    logs: bool = False
    """Log values in every way."""


class Memory:
    """State of a user's own, which differs between ranks."""

    def __init__(self) -> None:
        self.last: torch.Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last = state["last"]

    def mixed(self, inputs: torch.Tensor) -> torch.Tensor:
        last, self.last = self.last, inputs
        return inputs if last is None else inputs + 0.1 * last[: len(inputs)].sum()


class Slowing(dl.Callback):
    """Lowers the learning rate with the steps that it has seen."""

    def __init__(self, by: float = 0.9) -> None:
        self.by = by
        self.seen = 0

    def on_step_end(self, runner: Any) -> None:
        self.seen += 1
        for group in runner.optimizer.param_groups:
            group["lr"] = 0.02 * self.by**self.seen

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Noisy(Dataset):
    """Inputs with noise from all three generators, as an augmentation draws it."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, overflows_at: int | None) -> None:
        self.inputs, self.targets, self.overflows_at = inputs, targets, overflows_at

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(4) + random.random() + numpy.random.random()
        scale = float("inf") if index == self.overflows_at else 1.0
        return (self.inputs[index] + 0.1 * noise) * scale, self.targets[index]


class FaultyRunner(dl.TorchRunner):
    params: FaultyParams

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        params = self.params
        generator = torch.Generator().manual_seed(7)
        inputs = torch.randn(params.samples + 30, 4, generator=generator)
        targets = (inputs.sum(1) > 0).long()
        self.datasets["train"] = Noisy(inputs[:-30], targets[:-30], params.overflows_at)
        self.datasets["val"] = TensorDataset(inputs[-30:], targets[-30:])
        norm = [nn.BatchNorm1d(params.width)] if params.batch_norm else []
        hidden = [nn.Linear(4, params.width), *norm, nn.ReLU(), nn.Dropout(params.dropout)]
        self.model = nn.Sequential(*hidden, nn.Linear(params.width, 2))
        self.criterion = nn.CrossEntropyLoss()
        self.metrics = MetricGroup(accuracy=Accuracy())
        self.memory = Memory()
        if params.memory:
            self.training_state.register("memory", self.memory)
        self._fault: dict[str, Any] = json.loads(os.environ.get(FAULT, "{}"))

    def train_step(self, data: Any) -> Any:
        time.sleep(self.params.step_seconds)
        if self._fault:
            self.run_session.files.drain()  # so that no save gives way, and a test knows where its run resumes
        self._fail("train")
        if self._is_due("nan", "train"):
            data = data[0] * float("nan"), data[1]
        if self.params.memory:
            data = self.memory.mixed(data[0]), data[1]
        pred, loss = super().train_step(data)
        if self.params.logs:
            self.log("confidence", pred.softmax(-1).amax(-1))
            self.log("largest", pred, reduction="max")
            self.log("rows", len(pred), reduction="sum")
            self.log(f"last_of_{self.rank}", loss, reduction="last")
        return pred, loss

    def evaluate_step(self, data: Any) -> Any:
        self._fail("evaluate")
        return super().evaluate_step(data)

    def emit(self, kind: str, **fields: Any) -> None:
        self._fail(kind)
        super().emit(kind, **fields)

    def _is_due(self, how: str, place: str) -> bool:
        fault = self._fault
        return bool(
            fault
            and fault["how"] == how
            and (fault["place"], fault["step"], fault["rank"]) == (place, self.steps, self.rank)
            and (fault["attempt"] is None or fault["attempt"] == self.run_session.attempt)
        )

    def _fail(self, place: str) -> None:
        for name in ("SIGKILL", "SIGTERM", "SIGSTOP"):
            if self._is_due(name, place):
                self._wait_for_saves()
                os.kill(os.getpid(), signal.Signals[name])
        if self._is_due("breakpoint", place):
            breakpoint()
        if self._is_due("raise", place):
            raise ValueError("mine, and told")
        if self._is_due("sleep", place):
            sleep_forever()
        if self._is_due("small files", place):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        if self._is_due("delete folder", place):
            while os.path.exists(self.run_session.work_dir):  # a save may be putting new files there
                shutil.rmtree(self.run_session.work_dir, ignore_errors=True)

    def _wait_for_saves(self) -> None:
        """Let rank 0 commit what was saved before this step."""
        every, deadline = self.config.save_interval_steps, time.monotonic() + 10.0
        records = Path(self.run_session.work_dir, "checkpoints", "records")
        due = self.steps // every * every if every is not None else 0
        while due and time.monotonic() < deadline:
            if any(int(path.name.partition("-")[0]) >= due for path in records.glob("0*.json")):
                return
            time.sleep(0.005)


def sleep_forever() -> None:
    while True:
        time.sleep(1.0)
