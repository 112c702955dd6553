"""The runner that `step_overhead` times: each of its epochs is followed, or preceded, by a bare one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import danling_core as dl

BATCH_SIZE = 32
Batch = tuple[Tensor, Tensor]
Data = Literal["ready", "logged", "loader"]


class StepParams(dl.Params):
    """Parameters of one case of the benchmark."""

    data: Data
    steps: int
    world: int


class ReadyBatches(Dataset[Batch]):
    """Batches that lie ready, read through a loader: whatever is asked for, the next one is handed out."""

    def __init__(self, batches: Sequence[Batch], world: int) -> None:
        self.batches = batches
        self.length = len(batches) * BATCH_SIZE * world
        self._next = 0

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        batch = self.batches[self._next]
        self._next = (self._next + 1) % len(self.batches)
        return batch


class StepRunner(dl.TorchRunner):
    """Trains a twin of its model in a bare loop, by turns with itself, and keeps the times of both."""

    params: StepParams

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.times: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
        tensors = self._tensors(self.params.steps * BATCH_SIZE * self.params.world)
        own = (tensor[: self.params.steps * BATCH_SIZE].split(BATCH_SIZE) for tensor in tensors)
        batches = list(zip(*own, strict=True))
        if self.params.data == "loader":
            self.datasets["train"] = TensorDataset(*tensors)
        elif self.params.world == 1:
            self.dataloaders["train"] = batches
        else:  # sized, so that the ranks need not tell each other how many samples they have
            self.datasets["train"] = ReadyBatches(batches, self.params.world)
        self.model, self.criterion = _mlp(), nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self._bare = self._bare_side(tensors, batches)
        if self.params.data == "logged":
            self.train_step = self._logging_step  # type: ignore[method-assign]

    def train_epoch(self, split: str = "train") -> dict[str, Any]:
        """Both sides once; the one that goes first alternates."""
        result: dict[str, Any] = {}

        def ours() -> None:
            result.update(super(StepRunner, self).train_epoch(split))

        sides = {"ours": ours, "bare": self._bare}
        for side in sorted(sides, reverse=self.epochs % 2 == 0):
            self._settle()
            self.times[side].append(timed(self.params.steps, sides[side]))
        return result

    def _logging_step(self, data: Batch) -> tuple[Tensor, Tensor]:
        pred, loss = super().train_step(data)
        for name in ("first", "second", "third"):
            self.log(name, loss)
        return pred, loss

    def _settle(self) -> None:
        """Let what the last epoch left to do in the background end before either is timed."""
        self.run_session.files.drain()
        if self.distributed:
            torch.distributed.barrier()

    def _bare_side(self, tensors: tuple[Tensor, Tensor], batches: list[Batch]) -> Any:
        model: nn.Module = _mlp()
        if self.distributed:
            model = DistributedDataParallel(model)
        criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.01)
        if self.params.data != "loader":
            return lambda: bare_epoch(model, criterion, optimizer, batches)
        data = TensorDataset(*tensors)
        sampler: DistributedSampler[Batch] | None = DistributedSampler(data) if self.distributed else None
        loader = DataLoader(data, BATCH_SIZE, shuffle=sampler is None, sampler=sampler)

        def epoch() -> None:
            if sampler is not None:
                sampler.set_epoch(self.epochs)
            bare_epoch(model, criterion, optimizer, loader)

        return epoch

    @staticmethod
    def _tensors(length: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(length, 64, generator=generator), torch.randint(10, (length,), generator=generator)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def timed(steps: int, work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds (of all threads) of one step of `work`, which makes `steps` of them."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def bare_epoch(model: Any, criterion: Any, optimizer: Any, batches: Iterable[tuple[Any, Any]]) -> None:
    """Train an epoch as a careful user writes it: no sync with the host, no gradient kept."""
    for inputs, targets in batches:
        loss = criterion(model(inputs), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
