"""Data of libraries that people use: `datasets`, WebDataset, torchdata; and iterables of one's own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from tests.small_runner import SmallRunner, points

SAMPLES = 40


def rows() -> list[dict[str, Any]]:
    inputs, targets = points(SAMPLES)
    pairs = zip(inputs.tolist(), targets.tolist(), strict=True)
    return [{"input": row, "target": target} for row, target in pairs]


def hugging_face() -> Any:
    import datasets

    return datasets.Dataset.from_list(rows()).with_format("torch")


def streamed() -> Any:
    return hugging_face().to_iterable_dataset(num_shards=4)


def shuffled_stream() -> Any:
    return streamed().shuffle(seed=3, buffer_size=12)


def shards(folder: Path, name: str = "x.json") -> str:
    """Write the samples into four archives; return their names as WebDataset wants them."""
    import webdataset

    for shard in range(4):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as archive:
            for index, row in list(enumerate(rows()))[shard::4]:
                value = np.array(row["input"], np.float32) if name.endswith("npy") else row["input"]
                archive.write({"__key__": f"{index:03}", name: value, "y.cls": row["target"]})
    return f"{folder}/{{0..3}}.tar"


def _as_pair(pair: tuple[Any, Any]) -> tuple[torch.Tensor, int]:
    return torch.tensor(pair[0]), pair[1]


def web(folder: Path, **shuffle: Any) -> Any:
    import webdataset

    data = webdataset.WebDataset(shards(folder), shardshuffle=4, detshuffle=True, seed=1, nodesplitter=None)
    return data.shuffle(8, **shuffle).decode().to_tuple("x.json", "y.cls").map(_as_pair)


def seeded_web(folder: Path) -> Any:
    return web(folder, rng=random.Random(0))


class Died(Exception):
    """Stands for a kill: nothing is saved."""


class Dropped:
    """Turns every other sample or so into zeros, by a random number."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        row = self.data[index]
        return {**row, "input": row["input"] * (torch.rand(()) < 0.5)}


def stateful(workers: int = 0, *, draws: bool = False) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = Dropped(hugging_face()) if draws else hugging_face()
    return StatefulDataLoader(data, batch_size=4, shuffle=True, num_workers=workers)


class Own(IterableDataset[Any]):
    """Goes on where it was, and counts its passes: no `set_epoch`, but a state."""

    def __init__(self, *, is_whole: bool = True) -> None:
        self.samples = [(torch.tensor(row["input"]), row["target"]) for row in rows()]
        self.pass_number, self.position = 0, 0
        self.is_whole = is_whole

    def __iter__(self) -> Iterator[Any]:
        order = random.Random(self.pass_number).sample(range(SAMPLES), SAMPLES)
        while self.position < SAMPLES:
            self.position += 1
            yield self.samples[order[self.position - 1]]
        self.pass_number, self.position = self.pass_number + 1, 0

    def state_dict(self) -> dict[str, int]:
        state = {"pass": self.pass_number, "position": self.position}
        return state if self.is_whole else {**state, "position": self.position // 8 * 8}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.pass_number, self.position = state["pass"], state["position"]


@dataclass
class Batch:
    """A batch that is neither a mapping nor a tuple."""

    input: torch.Tensor
    target: torch.Tensor

    def __len__(self) -> int:
        return len(self.target)


def as_batch(samples: list[Any]) -> Batch:
    """Collate rows to a `Batch`."""
    rows = [(row["input"], row["target"]) if isinstance(row, dict) else row for row in samples]
    return Batch(torch.stack([torch.as_tensor(x) for x, _ in rows]), torch.tensor([int(y) for _, y in rows]))


class ForeignRunner(SmallRunner):
    """Trains on what `make` returns: a data set, or a loader."""

    make: Any = None
    spoils = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.datasets = {"val": self.datasets["val"]}
        data = type(self).make()
        where = self.dataloaders if isinstance(data, DataLoader) else self.datasets
        where["train"] = data
        self.seen: list[list[float]] = []
        self.dies_at: int | None = None

    def train_step(self, data: Any) -> Any:
        if self.steps == self.dies_at:
            raise Died
        if isinstance(data, Batch):
            data = data.input, data.target
        self.seen.append((data["input"] if isinstance(data, dict) else data[0])[:, 0].tolist())
        result = super().train_step(data)
        if self.spoils:  # as a user's own step may
            (data["input"] if isinstance(data, dict) else data[0]).mul_(0.0)
        return result

    def evaluate_step(self, data: Any) -> Any:
        return super().evaluate_step((data.input, data.target) if isinstance(data, Batch) else data)
