"""Real processes for what tests/unit/test_data_loaders.py tries without them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, get_worker_info

from danling_core.data import build_evaluate_loader, build_train_loader
from tests.unit.test_data_loaders import Counting, Noisy, X, Y, generators, noisy, options, values


class Ready(Dataset):
    """`__getitems__` that returns a ready batch."""

    def __len__(self) -> int:
        return 5

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(indices)}

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("is to be read by batch")


class SplitsOverWorkers(Counting):
    """As torch's manual teaches: each worker yields its own part."""

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter(range(first, self.length, step))


class SplitsItself(SplitsOverWorkers):
    sharded = True


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("data", [TensorDataset(X, Y), (X, Y), Subset(TensorDataset(X, Y), list(range(7)))])
def test_whole_tensors_give_the_batches_of_a_stock_loader_without_collating(data, workers, monkeypatch):
    expected = list(DataLoader(TensorDataset(X, Y), batch_size=3))
    monkeypatch.setattr("danling_core.data.fetch.default_collate", None)
    batches = list(build_train_loader(data, options(3, shuffle=False, num_workers=workers)))
    assert [type(batch) for batch in batches] == [list] * 3
    for batch, other in zip(batches, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_getitems_may_return_a_ready_batch(workers):
    batches = list(build_evaluate_loader(Ready(), options(3, num_workers=workers)))
    assert [batch["x"].tolist() for batch in batches] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", [TensorDataset(Y), Counting(7, shuffle=True)])
def test_neither_building_nor_iterating_draws_from_the_global_generators(data, workers):
    before = generators()
    loader = build_train_loader(data, options(2, num_workers=workers))
    iterator = iter(loader)
    next(iterator)
    loader.set_pass(1)  # type: ignore[attr-defined]
    list(loader)
    assert generators() == before


@pytest.mark.parametrize("persistent", [True, False])
def test_in_workers_a_sample_is_a_function_of_seed_pass_and_index(persistent):
    def build(batch_size: int = 2, workers: int = 2, **where: int) -> Any:
        settings = options(batch_size, num_workers=workers, persistent_workers=persistent)
        return build_train_loader(Noisy(), settings, seed=1, **where)

    loader = build()
    passes = [noisy(loader, number) for number in range(3)]
    assert [len(samples) for samples in passes] == [11, 11, 11]
    assert all(passes[0][i][2:] != passes[1][i][2:] for i in range(11))
    assert all(row[1] == number for number, samples in enumerate(passes) for row in samples.values())
    assert len({row[2] for row in passes[0].values()}) == 11

    assert noisy(loader, 1) == passes[1]  # the same workers, back to an earlier pass
    assert noisy(build(), 2) == passes[2]  # fresh workers
    assert noisy(build(batch_size=3, workers=1), 2) == passes[2]  # other batches, other workers
    ranks = [noisy(build(rank=rank, world_size=2), 2) for rank in range(2)]
    assert {**ranks[0], **ranks[1]} == passes[2]
    rest = noisy(loader, 2, skip=3)
    assert len(rest) == 5 and rest.items() <= passes[2].items()


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kind", [Counting, SplitsOverWorkers])
@pytest.mark.parametrize(("length", "world_size"), [(7, 1), (7, 2), (17, 3), (2, 2)])
def test_iterable_data_is_counted_once_in_the_order_of_global_batches(kind, length, world_size, workers):
    ranks = [
        values(
            build_evaluate_loader(kind(length), options(num_workers=workers), rank=r, world_size=world_size)
        )
        for r in range(world_size)
    ]
    steps = max(len(batches) for batches in ranks)
    seen = [v for step in range(steps) for batches in ranks if step < len(batches) for v in batches[step]]
    assert seen == list(range(length))


@pytest.mark.parametrize("workers", [0, 2])
def test_iterable_data_has_a_new_order_each_pass_and_can_begin_in_its_middle(workers):
    loader: Any = build_train_loader(Counting(20, shuffle=True), options(3, num_workers=workers))
    first = values(loader)
    loader.set_pass(1)
    second = values(loader)
    loader.set_pass(1, skip=4)
    assert values(loader) == second[4:] and first != second
    loader.set_pass(0)
    assert values(loader) == first


def test_data_that_splits_itself_is_left_to_it():
    loaders = [
        build_train_loader(SplitsItself(6), options(num_workers=2), rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    assert [values(loader) for loader in loaders] == [[[0, 2], [1, 3], [4], [5]]] * 2


class Pids(IterableDataset):
    def __iter__(self):
        while True:
            yield os.getpid()


def test_workers_ignore_the_signals_of_their_group_and_obey_their_rank():
    loader = build_train_loader(Pids(), options(1, num_workers=1, prefetch_factor=1))
    iterator = iter(loader)
    pid = next(iterator).item()
    os.kill(pid, signal.SIGINT)
    stranger = os.fork()
    if stranger == 0:
        os.kill(pid, signal.SIGTERM)
        os._exit(0)
    os.waitpid(stranger, 0)
    for _ in range(5):
        assert next(iterator).item() == pid
    (worker,) = [child for child in multiprocessing.active_children() if child.pid == pid]
    loader._iterator = None
    iterator.close()
    assert not worker.is_alive()


def test_workers_end_when_their_rank_is_killed():
    reader, writer = os.pipe()
    rank = os.fork()
    if rank == 0:
        iterator = iter(build_train_loader(Pids(), options(1, num_workers=1)))
        next(iterator)
        os.write(writer, b"ready")
        time.sleep(600)
        os._exit(1)
    os.read(reader, 32)
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    os.close(writer)
    assert os.read(reader, 1) == b""  # its last holder, the worker, has ended
