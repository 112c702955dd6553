"""Loaders: what they fetch and how, from every kind of data, with and without workers."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, get_worker_info

from danling_core.data import batch_size_of, build_evaluate_loader, build_train_loader, to_device
from danling_core.data.seeded import RandomStream, derive_seed
from danling_core.errors import ConfigError


def options(batch_size: int = 2, **changes: Any) -> SimpleNamespace:
    fields: dict[str, Any] = dict.fromkeys(
        ("shuffle", "drop_last", "pin_memory", "persistent_workers", "prefetch_factor")
    )
    return SimpleNamespace(batch_size=batch_size, **{**fields, "num_workers": 0, **changes})


class Noisy(Dataset):
    """Each sample is its index, and what three generators draw for it."""

    def __init__(self, length: int = 11) -> None:
        self.length = length
        self.epoch = -1

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> torch.Tensor:
        draws = random.random(), float(np.random.rand()), torch.rand(()).item()
        return torch.tensor([index, self.epoch, *draws], dtype=torch.float64)


class Ready(Dataset):
    """`__getitems__` that returns a ready batch."""

    def __len__(self) -> int:
        return 5

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(indices)}

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("is to be read by batch")


class Counting(IterableDataset):
    def __init__(self, length: int, shuffle: bool = False) -> None:
        self.length = length
        self.shuffle = shuffle

    def __iter__(self):
        values = list(range(self.length))
        if self.shuffle:
            random.shuffle(values)
        return iter(values)


class SplitsOverWorkers(Counting):
    """As torch's manual teaches: each worker yields its own part."""

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter(range(first, self.length, step))


class SplitsItself(SplitsOverWorkers):
    sharded = True


def values(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def generators() -> tuple[Any, ...]:
    return random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()


X = torch.arange(14).reshape(7, 2)
Y = torch.arange(7)


class OddTensors(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return tuple(tensor[index] + 1 for tensor in self.tensors)


# -- by batch --


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("data", [TensorDataset(X, Y), (X, Y), Subset(TensorDataset(X, Y), list(range(7)))])
def test_whole_tensors_give_the_batches_of_a_stock_loader_without_collating(data, workers, monkeypatch):
    expected = list(DataLoader(TensorDataset(X, Y), batch_size=3))
    monkeypatch.setattr("danling_core.data.fetch.default_collate", None)
    batches = list(build_train_loader(data, options(3, shuffle=False, num_workers=workers)))
    assert [type(batch) for batch in batches] == [list] * 3
    for batch, other in zip(batches, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


def test_a_tensor_or_a_mapping_of_tensors_is_read_by_batch():
    assert values(build_evaluate_loader(Y, options(4))) == [[0, 1, 2, 3], [4, 5, 6]]
    (first, *_) = build_evaluate_loader({"x": X, "y": Y}, options(4))
    assert list(first) == ["x", "y"] and first["x"].shape == (4, 2)


def test_a_subset_of_a_subset_of_tensors_picks_the_right_rows():
    data = Subset(Subset(TensorDataset(Y), [6, 4, 2, 0]), [3, 0, 1])
    assert [batch[0].tolist() for batch in build_evaluate_loader(data, options(2))] == [[0, 6], [4]]


def test_a_tensor_data_set_with_its_own_reading_is_read_its_own_way():
    (batch,) = build_evaluate_loader(OddTensors(Y), options(7))
    assert batch[0].tolist() == list(range(1, 8))


def test_batches_are_copies_of_the_data():
    (batch,) = build_evaluate_loader(Y, options(7))
    batch += 1
    assert Y[0] == 0


def test_tensors_of_unequal_length_are_refused():
    with pytest.raises(ConfigError, match=r"equal first dimensions, found \[7, 6\]"):
        build_train_loader((X, Y[:6]), options())


@pytest.mark.parametrize("workers", [0, 1])
def test_getitems_may_return_a_ready_batch(workers):
    batches = list(build_evaluate_loader(Ready(), options(3, num_workers=workers)))
    assert [batch["x"].tolist() for batch in batches] == [[0, 1, 2], [3, 4]]


def test_a_users_collate_gets_samples_also_of_tensors():
    loader = build_evaluate_loader(TensorDataset(Y), options(4), collate_fn=lambda samples: len(samples))
    assert list(loader) == [4, 3]


# -- what a user may give --


def test_a_list_is_a_map_style_data_set():
    assert values(build_evaluate_loader([3, 1, 2], options(2))) == [[3, 1], [2]]


def test_a_users_sampler_and_batches_are_respected():
    assert values(build_train_loader(Y, options(2), sampler=[5, 5, 1])) == [[5, 5], [1]]
    assert values(build_train_loader(Y, options(2), sampler=[[5, 5, 1], [0]])) == [[5, 5, 1], [0]]
    ranks = [
        build_evaluate_loader(Y, options(2), sampler=[[5], [1], [0]], rank=r, world_size=2) for r in (0, 1)
    ]
    assert [values(loader) for loader in ranks] == [[[5], [1]], [[0]]]


@pytest.mark.parametrize("data", [[], Y[:0], TensorDataset(Y[:0])])
def test_empty_data_is_refused_when_the_loader_is_built(data):
    for build in (build_train_loader, build_evaluate_loader):
        with pytest.raises(ConfigError, match="empty"):
            build(data, options())


def test_drop_last_that_leaves_nothing_is_refused():
    with pytest.raises(ConfigError, match="no training batch: 7 samples, batch_size 4 on 2"):
        build_train_loader(Y, options(4, drop_last=True), world_size=2)


def test_what_is_no_data_set_is_refused():
    with pytest.raises(ConfigError, match="object is no data set"):
        build_train_loader(object(), options())
    with pytest.raises(ConfigError, match="a sampler picks samples by index"):
        build_train_loader(Counting(3), options(), sampler=[0])


def test_evaluation_ignores_shuffle_and_drop_last_and_may_leave_a_rank_without_batches():
    asked = options(2, shuffle=True, drop_last=True)
    ranks = [values(build_evaluate_loader(Y[:3], asked, rank=r, world_size=4)) for r in range(4)]
    assert ranks == [[[0]], [[1]], [[2]], []]


# -- random state --


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


def noisy(loader: Any, number: int, skip: int = 0) -> dict[int, list[float]]:
    loader.set_pass(number, skip)
    return {int(row[0]): row.tolist() for batch in loader for row in batch}


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


def test_without_workers_augmentation_draws_from_the_ranks_own_generators():
    loader = build_train_loader(Noisy(), options())
    torch.manual_seed(1)
    first = noisy(loader, 0)
    second = noisy(loader, 0)
    assert first[0][4] != second[0][4]
    assert first[0][1] == 0


def test_a_random_stream_goes_on_where_it_was_and_leaves_no_trace():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    one, other = RandomStream(3), RandomStream(3)
    before = generators()
    with one:
        expected = [draw(), draw()]
    with other:
        found = [draw()]
    assert generators() == before
    draw()
    with other:
        found.append(draw())
    assert found == expected


def test_seeds_are_pinned_and_their_keys_do_not_collide():
    assert derive_seed("order", 0, 1) == derive_seed("order", 0, 1) < 2**63
    assert len({derive_seed("a", 1, 11), derive_seed("a", 11, 1), derive_seed("b", 1, 11)}) == 3


# -- iterable data --


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


def test_a_step_of_iterable_data_does_not_depend_on_the_world_size():
    one = values(build_train_loader(Counting(20, shuffle=True), options(4)))
    random.seed(99)
    two = [
        values(build_train_loader(Counting(20, shuffle=True), options(2), rank=r, world_size=2))
        for r in (0, 1)
    ]
    assert [a + b for a, b in zip(*two, strict=True)] == one
    assert sum(one, []) != list(range(20))


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


def test_drop_last_of_iterable_data_leaves_out_the_smaller_global_batch_on_all_ranks():
    ranks = [
        values(build_train_loader(Counting(7), options(2, drop_last=True), rank=r, world_size=2))
        for r in (0, 1)
    ]
    assert ranks == [[[0, 1]], [[2, 3]]]


def test_a_plain_iterable_will_do():
    class Lines:
        def __iter__(self):
            return iter([1, 2, 3])

    assert values(build_train_loader(Lines(), options(2))) == [[1, 2], [3]]


# -- workers and signals --


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
    (worker,) = iterator._workers  # type: ignore[attr-defined]
    loader._iterator = None
    iterator._shutdown_workers()  # type: ignore[attr-defined]
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


# -- batches --


class Pair(NamedTuple):
    x: torch.Tensor
    name: str


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    label: Any = None


class Movable:
    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def to(self, device: torch.device) -> Movable:
        return Movable(str(device))


@pytest.mark.parametrize(
    "batch", [X, [X, 1], (None, {"x": X}), {"n": 3, "x": [X]}, Pair(X, "a"), Record(X), [torch.tensor(1), X]]
)
def test_the_size_of_a_batch_is_the_first_dimension_of_its_first_tensor(batch):
    assert batch_size_of(batch) == 7


def test_a_batch_without_a_tensor_has_no_known_size():
    with pytest.raises(ConfigError, match="batch of type dict"):
        batch_size_of({"text": ["a"]})


def test_moving_to_a_cpu_is_the_identity():
    batch = object()
    assert to_device(batch, torch.device("cpu")) is batch


def test_moving_goes_into_every_container_and_keeps_its_type():
    meta = torch.device("meta")
    batch = {"pair": Pair(X, "a"), "list": [X, 1, None], "record": Record(X, ("b", X)), "own": Movable()}
    moved = to_device(batch, meta)
    assert type(moved["pair"]) is Pair and moved["pair"].x.device == meta and moved["pair"].name == "a"
    assert moved["list"][0].device == meta and moved["list"][1:] == [1, None]
    assert type(moved["record"]) is Record and moved["record"].label[1].device == meta
    assert moved["own"].device == "meta"
    assert batch["list"][0] is X and batch["record"].x is X
