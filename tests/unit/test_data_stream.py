"""The training stream: windows, weights, ranks with unequal data, and a resume anywhere."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from danling_core.data import TrainStream, build_train_loader
from danling_core.errors import ConfigError


def options(batch_size: int = 2, **changes: Any) -> SimpleNamespace:
    fields: dict[str, Any] = dict.fromkeys(
        ("shuffle", "drop_last", "pin_memory", "persistent_workers", "prefetch_factor")
    )
    return SimpleNamespace(batch_size=batch_size, **{**fields, "num_workers": 0, **changes})


class Ranks:
    """Threads that play ranks: `reduce` sums over them, and fails when they fall out of step.

    One thread runs at a time, since they share the global generators that real ranks have each for itself.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=30)
        self.turn = threading.Lock()
        self.slots: list[list[float]] = [[] for _ in range(world_size)]
        self.calls = 0

    def reducer(self, rank: int) -> Callable[[list[float]], Sequence[float]]:
        def reduce(values: list[float]) -> list[float]:
            self.slots[rank] = values
            self.turn.release()
            self.barrier.wait()
            sums = [sum(column) for column in zip(*self.slots, strict=True)]
            is_first = self.barrier.wait() == 0
            self.turn.acquire()
            self.calls += is_first
            return sums

        return reduce

    def run(self, body: Callable[[int, Any], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.world_size) as pool:
            return [*pool.map(lambda rank: self._rank(rank, body), range(self.world_size))]

    def _rank(self, rank: int, body: Callable[[int, Any], Any]) -> Any:
        with self.turn:
            return body(rank, self.reducer(rank))


class Numbers(IterableDataset):
    """0, 1, 2, ... in an order drawn from Python's generator, with noise from torch's."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self):
        values = list(range(self.length))
        random.shuffle(values)
        for value in values:
            yield torch.tensor([value, torch.rand(()).item()])


class Noisy(Dataset):
    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(()).item()])


def windows_per_pass(stream: TrainStream) -> int | None:
    batches = stream.batches_per_pass
    return None if batches is None else -(-batches // stream.accum_steps)


def read(stream: TrainStream) -> list[tuple[list[Any], tuple[float, ...], tuple[int, ...], int]]:
    """One pass: `(batches, weights, counts, total)` of each window."""
    return [
        ([batch.tolist() for batch in w.batches], tuple(w.weights), tuple(w.counts), w.total)
        for w in stream.windows()
    ]


def counted(windows: Sequence[Any]) -> list[list[Any]]:
    """The samples of each window that count."""
    return [
        [sample for batch, count in zip(batches, counts, strict=True) for sample in batch[:count]]
        for batches, _, counts, _ in windows
    ]


# -- sized data --

X = torch.arange(100)


@pytest.mark.parametrize("length", [100, 7, 64, 65, 1])
@pytest.mark.parametrize(
    ("batch_size", "world_size", "accum"), [(64, 1, 1), (32, 2, 1), (16, 2, 2), (4, 3, 2)]
)
def test_weights_make_the_accumulated_gradient_that_of_the_whole_window(
    length, batch_size, world_size, accum
):
    torch.manual_seed(0)
    data, weight = torch.randn(length, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    streams = [
        TrainStream(
            build_train_loader(data, options(batch_size), rank=rank, world_size=world_size),
            accum_steps=accum,
            world_size=world_size,
            rank=rank,
        )
        for rank in range(world_size)
    ]
    whole = TrainStream(build_train_loader(data, options(batch_size * world_size * accum)))
    for ranks, (one,) in zip(
        zip(*(stream.windows() for stream in streams), strict=True),
        (window.batches for window in whole.windows()),
        strict=True,
    ):
        gradients = [
            sum(w * (2 * weight * x * x).mean() for w, x in zip(window.weights, window.batches, strict=True))
            for window in ranks
        ]
        torch.testing.assert_close(sum(gradients) / world_size, (2 * weight * one * one).mean())
        assert {window.total for window in ranks} == {len(one)}
        assert sum(map(sum, (window.weights for window in ranks))) == pytest.approx(world_size)
        assert len({len(window) for window in ranks}) == 1


def test_an_optimizer_step_sees_the_same_samples_however_it_is_spread():
    def steps(batch_size: int, world_size: int, accum: int) -> list[list[set[int]]]:
        ranks = []
        for rank in range(world_size):
            loader = build_train_loader(X, options(batch_size), rank=rank, world_size=world_size, seed=7)
            stream = TrainStream(loader, accum_steps=accum, world_size=world_size, rank=rank)
            assert windows_per_pass(stream) == 2
            ranks.append([counted(read(stream)) for _ in range(3)])
        return [[set().union(*parts) for parts in zip(*p, strict=True)] for p in zip(*ranks, strict=True)]

    expected = steps(64, 1, 1)
    assert steps(32, 2, 1) == steps(16, 2, 2) == expected
    assert [[len(step) for step in steps] for steps in expected] == [[64, 36]] * 3
    assert expected[0] != expected[1]


def test_a_full_window_shares_its_constants():
    windows = list(TrainStream(build_train_loader(X, options(10)), accum_steps=2).windows())
    assert (
        len({id(window.weights) for window in windows}) == len({id(window.counts) for window in windows}) == 1
    )
    assert windows[0].weights == (0.5, 0.5) and windows[0].counts == (10, 10) and windows[0].total == 20


def test_sized_data_needs_no_collective():
    def refuse(values: list[float]) -> list[float]:
        raise AssertionError("a collective")

    loader = build_train_loader(X, options(8), rank=1, world_size=3)
    stream = TrainStream(loader, accum_steps=2, world_size=3, rank=1, reduce=refuse)
    assert len(read(stream)) == windows_per_pass(stream) == 3


def test_tokens_can_be_counted_instead_of_samples():
    ranks = Ranks(2)

    def body(rank: int, reduce: Any) -> Any:
        loader = build_train_loader(X[:7], options(2, shuffle=False), rank=rank, world_size=2)
        stream = TrainStream(
            loader, world_size=2, rank=rank, reduce=reduce, size_of=lambda batch: int(batch.sum())
        )
        return read(stream)

    one, two = ranks.run(body)
    assert [(counts, total) for _, _, counts, total in one] == [((1,), 6), ((9,), 15)]
    assert [(weights, counts) for _, weights, counts, _ in two] == [((10 / 6,), (5,)), ((12 / 15,), (6,))]


# -- resume --

SOURCES: dict[str, Callable[[], Any]] = {
    "tensors": lambda: build_train_loader(X[:21], options(2), seed=3),
    "workers": lambda: build_train_loader(Noisy(), options(2, num_workers=2), seed=3),
    "no workers": lambda: build_train_loader(Noisy(), options(2), seed=3),
    "iterable": lambda: build_train_loader(Numbers(21), options(2), seed=3),
    "iterable, workers": lambda: build_train_loader(Numbers(21), options(2, num_workers=2), seed=3),
    "list": lambda: [torch.tensor([i]) for i in range(11)],
    "user's loader": lambda: DataLoader(TensorDataset(X[:21]), 2, shuffle=True, collate_fn=tensor_of),
    "user's workers": lambda: DataLoader(Noisy(), 2, shuffle=True, num_workers=2),
    "user's samples": lambda: build_train_loader(
        X[:21], options(2), sampler=torch.utils.data.RandomSampler(X[:21])
    ),
    "user's batches": lambda: build_train_loader(X[:21], options(2), sampler=[[i] for i in range(11)]),
}


def tensor_of(samples: list[Any]) -> torch.Tensor:
    return torch.stack([sample[0] for sample in samples])


def step(window: Any) -> list[Any]:
    torch.rand(3)  # dropout
    return [batch.tolist() for batch in window.batches]


def test_a_resume_of_sized_data_fetches_nothing_of_what_it_skips():
    class Watched(Noisy):
        fetched: list[int] = []

        def __getitem__(self, index: int) -> torch.Tensor:
            self.fetched.append(index)
            return super().__getitem__(index)

    stream = TrainStream(build_train_loader(Watched(), options(2, shuffle=False)))
    stream.load_state_dict({"pass": 0, "position": 8})
    assert len(read(stream)) == 3 and Watched.fetched == [16, 17, 18, 19, 20]


def test_between_passes_the_state_names_the_next_pass():
    stream = TrainStream(build_train_loader(X[:4], options(2)))
    states = [stream.state_dict() for _ in range(2) for _ in stream.windows()]
    assert [(state["pass"], state["position"]) for state in states] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert stream.state_dict() == {"pass": 2, "position": 0, "global_batch": 2}
    stream.load_state_dict(states[1])
    assert read(stream) == []  # the pass was over, its end was not
    assert stream.state_dict()["pass"] == 1


def test_breaking_out_of_a_pass_does_not_end_it():
    for source in ("tensors", "iterable", "list"):
        stream, other = TrainStream(SOURCES[source]()), TrainStream(SOURCES[source]())
        first = [[batch.tolist() for batch in next(stream.windows()).batches] for _ in range(2)]
        whole = [batches for batches, *_ in read(other)]
        assert first + [batches for batches, *_ in read(stream)] == whole


def test_a_resume_with_another_global_batch_size_goes_to_the_same_sample(caplog):
    def stream(batch_size: int) -> TrainStream:
        return TrainStream(build_train_loader(X[:21], options(batch_size, shuffle=False)))

    state = {"pass": 0, "position": 3, "global_batch": 4}
    for batch_size, first in ((2, 12), (6, 12), (5, 10)):
        other = stream(batch_size)
        other.load_state_dict(state)
        assert counted(read(other))[0][0] == first
    assert [record.args for record in caplog.records] == [(2,)]
    other = stream(5)
    other.load_state_dict({**state, "position": 6})
    assert read(other) == []


# -- data of unknown size --


@pytest.mark.parametrize("accum", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(4, 4), (5, 2), (1, 7, 3)])
def test_ranks_with_unequal_batches_stay_in_step_and_count_each_sample_once(lengths, accum):
    ranks = Ranks(len(lengths))

    def body(rank: int, reduce: Any) -> Any:
        loader = [torch.full((rank + 1,), 10 * rank + i) for i in range(lengths[rank])]
        stream = TrainStream(loader, accum_steps=accum, world_size=len(lengths), rank=rank, reduce=reduce)
        assert windows_per_pass(stream) == -(-max(lengths) // accum)
        return [read(stream) for _ in range(2)]

    found = ranks.run(body)
    windows = -(-max(lengths) // accum)
    assert ranks.calls == 1 + 2 * (windows + 1)  # the length, then one for each window and one for each end
    for passes in zip(*found, strict=True):
        for rank, of_rank in enumerate(passes):
            assert sum(map(len, counted(of_rank))) == lengths[rank] * (rank + 1)
        for parts in zip(*passes, strict=True):
            assert {total for *_, total in parts} == {sum(sum(counts) for _, _, counts, _ in parts)}
            assert sum(sum(weights) for _, weights, _, _ in parts) == pytest.approx(len(lengths))
            assert len({len(batches) for batches, *_ in parts}) == 1
            for batches, weights, counts, _ in parts:
                assert len(batches) == len(weights) == len(counts)
                assert [w == 0 for w in weights] == [count == 0 for count in counts]


def test_a_rank_that_ran_out_repeats_its_last_batch_also_after_a_resume():
    ranks = Ranks(2)

    def body(rank: int, reduce: Any) -> Any:
        loader = [torch.tensor([rank, i]) for i in range((4, 1)[rank])]
        whole = TrainStream(loader, world_size=2, rank=rank, reduce=reduce)
        resumed = TrainStream(loader, world_size=2, rank=rank, reduce=reduce)
        resumed.load_state_dict({"pass": 0, "position": 2})
        return read(whole), read(resumed)

    _, (whole, resumed) = ranks.run(body)
    assert [batches for batches, *_ in whole] == [[[1, 0]]] * 4
    assert resumed == whole[2:]


def test_a_rank_without_data_while_others_have_some_is_an_error_on_all_ranks():
    ranks = Ranks(2)

    def body(rank: int, reduce: Any) -> str:
        stream = TrainStream([X] * rank, world_size=2, rank=rank, reduce=reduce)
        with pytest.raises(ConfigError) as caught:
            read(stream)
        return str(caught.value)

    assert all("1 of 2 ranks have no training data in pass 0" in message for message in ranks.run(body))


def test_empty_data_is_an_error_and_not_an_endless_loop():
    with pytest.raises(ConfigError, match="the training data is empty: pass 0"):
        read(TrainStream(build_train_loader(Numbers(0), options())))
    stream = TrainStream(iter([X]), accum_steps=2)
    read(stream)
    with pytest.raises(ConfigError, match="read only once"):
        read(stream)


def test_several_ranks_with_data_of_unknown_size_need_a_reduce():
    with pytest.raises(ConfigError, match="needs `reduce`"):
        TrainStream([X], world_size=2)


# -- the user's own loader --


def test_the_length_of_a_users_loader_is_known_where_it_can_be():
    assert windows_per_pass(TrainStream(DataLoader(X, 8), accum_steps=2)) == 7
    assert windows_per_pass(TrainStream(DataLoader(Numbers(3)))) is None
    assert windows_per_pass(TrainStream(iter([X]))) is None


def test_set_epoch_reaches_the_samplers_and_the_data_of_a_users_loader():
    class Told(TensorDataset):
        epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    sampler = DistributedSampler(Told(X[:8]), num_replicas=2, rank=0, seed=1)
    stream = TrainStream(DataLoader(Told(X[:8]), 2, sampler=sampler))
    orders = []
    for number in range(2):
        orders.append([batch[0].tolist() for window in stream.windows() for batch in window.batches])
        assert sampler.epoch == number
    assert orders[0] != orders[1] and sorted(set(Told.epochs)) == [0, 1]


def test_beginning_a_pass_of_a_users_loader_leaves_the_generators_as_they_were():
    before = torch.get_rng_state(), random.getstate()
    passes = [read(TrainStream(DataLoader(X, 4, shuffle=True), seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert passes[0] == passes[1] != passes[2]
