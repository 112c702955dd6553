"""Loaders: what they fetch and how, from every kind of data, with and without workers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

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


class Counting(IterableDataset):
    def __init__(self, length: int, shuffle: bool = False) -> None:
        self.length = length
        self.shuffle = shuffle

    def __iter__(self):
        values = list(range(self.length))
        if self.shuffle:
            random.shuffle(values)
        return iter(values)


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


def noisy(loader: Any, number: int, skip: int = 0) -> dict[int, list[float]]:
    loader.set_pass(number, skip)
    return {int(row[0]): row.tolist() for batch in loader for row in batch}


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


def test_a_step_of_iterable_data_does_not_depend_on_the_world_size():
    one = values(build_train_loader(Counting(20, shuffle=True), options(4)))
    random.seed(99)
    two = [
        values(build_train_loader(Counting(20, shuffle=True), options(2), rank=r, world_size=2))
        for r in (0, 1)
    ]
    assert [a + b for a, b in zip(*two, strict=True)] == one
    assert sum(one, []) != list(range(20))


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
