"""Data that loader workers read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from danling_core.errors import DataError
from danling_core.runs.folder import RunFolder
from tests.small_runner import SmallRunner, config, weights
from tests.unit.test_data_and_bits import Augmented, Noisy, Short
from tests.unit.test_resume_here import Stopped, in_peace, resumed


@pytest.fixture(autouse=True)
def ended_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End all loader workers with the test: a garbage collection would wait 5 s for each."""
    made, make = [], DataLoader._get_iterator

    def kept(loader: DataLoader[Any]) -> Any:
        made.append(make(loader))
        return made[-1]

    monkeypatch.setattr(DataLoader, "_get_iterator", kept)
    yield
    for iterator in made:
        getattr(iterator, "_shutdown_workers", lambda: None)()


class OpensLate(Noisy):
    """Opens its file at the first sample, as HDF5 must be in each process of its own."""

    opened_by: int | None = None

    def __getitem__(self, index: int) -> Any:
        self.opened_by = self.opened_by or os.getpid()
        assert self.opened_by == os.getpid(), "a file that was opened before the fork"
        return super().__getitem__(index)


class WithWorkers(Augmented):
    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.datasets["train"] = OpensLate()


def test_samples_of_loader_workers_are_read_by_them_alone_and_survive_a_resume(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"epoch_end": 3, "dataloader": {"batch_size": 5, "train": {"num_workers": 2}}}
    peace, again = (
        in_peace(tmp_path, WithWorkers, **fields),
        resumed(tmp_path, ("train", 6), WithWorkers, **fields),
    )
    assert len(set(peace.noises)) == 60
    assert again.noises == peace.noises[-len(again.noises) :] and weights(again) == weights(peace)


class OwnWorkers(Stopped):
    """Has a loader of its own, whose worker reads data without generators."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.dataloaders["train"] = DataLoader(self.datasets.pop("train"), batch_size=5, num_workers=1)


class OwnNoisyWorkers(Augmented):
    """Has a loader of its own, in whose worker the generators of the data draw."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.dataloaders["train"] = DataLoader(self.datasets.pop("train"), batch_size=5, num_workers=1)


def test_generators_that_draw_in_workers_of_the_users_own_are_named_by_a_resume(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"epoch_end": 2, "dataloader": {"val": {"batch_size": 5}}}
    again = resumed(tmp_path, ("train", 5), OwnNoisyWorkers, **fields)
    status = RunFolder(again.dir).read_status()
    assert status is not None and not again.bitwise and not status.bitwise
    names = "train.generator, train.python, train.transform.rng"
    assert status.not_bitwise == f"{names} draws in loader workers of your own, and nobody saves what it drew"
    plain = resumed(tmp_path / "plain", ("train", 5), OwnWorkers, **fields)
    assert plain.bitwise and weights(plain) == weights(in_peace(tmp_path / "plain", OwnWorkers, **fields))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_stop_iteration_in_a_worker_is_an_error_and_not_the_end_of_the_split(
    tmp_path: Path, split: str, own: bool, workers: int
) -> None:
    options = {"batch_size": 4, "num_workers": workers, "shuffle": False}
    runner = SmallRunner(config(tmp_path, dataloader={} if own else {split: options}))
    if own:
        runner.dataloaders[split] = DataLoader(Short(), batch_size=4, num_workers=workers)
        runner.datasets.pop(split)
    else:
        runner.datasets[split] = Short()
    with pytest.raises(DataError, match=r"gave 4 of 16 batches.*raised StopIteration"):
        runner.train()
    assert runner.epochs == 0 and runner.results == {}
