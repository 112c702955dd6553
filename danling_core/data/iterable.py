"""Iterable data spread over ranks and loader workers, in the order of global batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from danling_core.data.fetch import PassClock
from danling_core.data.generators import (
    Kinds,
    find_generators,
    first_seed,
    generator_state,
    random_state,
    restore_generator,
    resumed_stream,
    seed_generator,
)
from danling_core.data.given import set_epoch
from danling_core.data.seeded import RandomStream, derive_seed, seed_generators


class StreamShards(IterableDataset[Any]):
    """The rank's share of an iterable data set: its contiguous chunk of every `batch_size * world_size`
    samples.

    Every rank and worker reads through the whole stream and keeps its own, so a step's samples do not depend
    on the world size. Data that is heavy to read should split itself and say so with a true attribute
    `sharded`: then each rank and worker reads its own (by rank from the environment, by worker from torch's
    `get_worker_info`).

    The data set's `__iter__` runs with random generators of its own: seeded by (seed, pass), the same
    everywhere, so that a shuffle gives all ranks one order and neither disturbs nor depends on the training's
    random state; so do generators that the data set holds. A data set that splits itself gets other seeds on each rank
    and worker.

    Args:
        drop_last: leave out the last global batch when it is smaller.
        clock: the pass to read, and the global batches to skip in it (read through, not collated).
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        clock: PassClock,
        drop_last: bool = False,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.sharded = bool(getattr(dataset, "sharded", False))
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.clock = clock
        self.drop_last = drop_last
        self._worker: tuple[int, int] | None = None
        self._in_worker = False
        self._generators: list[tuple[Kinds, int]] | None = None
        self.random: RandomStream | None = None
        """Random numbers of the pass under way."""
        self._begins_with: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return where the data set is, which has a `state_dict`, and its random generators; read in this process."""
        return {
            "source": self.dataset.state_dict(),
            "random": None if self.random is None else random_state(self.random),
            "generators": [generator_state(each) for each, _ in self._generators or ()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next iteration begin where `state` was taken, at the global batch that the clock says."""
        self._begins_with = state

    def forget(self) -> None:
        """Have the next iteration begin as any pass does."""
        self._begins_with = self.random = None

    def first_samples(self, count: int) -> list[Any]:
        """Return what the data set's first pass begins with, as it is read for training; at most `count` samples."""
        self.clock.set(0)
        key = ("stream", self.seed, 0, *((self.rank, 0) if self.sharded else ()))
        random_stream, samples = self._open(*key)
        with random_stream:
            return list(itertools.islice(samples, count))

    def __iter__(self) -> Iterator[Any]:
        return self._own_stream() if self.sharded else self._common_stream()

    def _common_stream(self) -> Iterator[Any]:
        number, skip = self.clock.read()
        worker, workers = self._hidden_worker()
        group_size = self.batch_size * self.world_size
        first = 0 if self._begins_with is None else skip
        random_stream, samples = self._open("stream", self.seed, number)
        for group in itertools.count(first):
            wanted = group >= skip and (group - skip) % workers == worker
            with random_stream:
                chunk, size = self._read_group(samples, wanted)
            if size < group_size and (size == 0 or self.drop_last):
                break
            self._seed_collate(number, group)
            yield from chunk
            if size < group_size:
                break
        self.random = None

    def _own_stream(self) -> Iterator[Any]:
        number, _ = self.clock.read()
        info = get_worker_info()
        worker = 0 if info is None else info.id
        self._in_worker = info is not None
        random_stream, samples = self._open("stream", self.seed, number, self.rank, worker)
        for group in itertools.count():
            with random_stream:
                chunk = list(itertools.islice(samples, self.batch_size))
            if len(chunk) < self.batch_size and (not chunk or self.drop_last):
                break
            self._seed_collate(number, group)
            yield from chunk
        self.random = None

    def _open(self, *key: int | str) -> tuple[RandomStream, Iterator[Any]]:
        set_epoch(self.dataset, self.clock.read()[0])
        if self._generators is None:
            self._generators = [(each, first_seed(each)) for each in find_generators(self.dataset).values()]
        for generator, first in self._generators:
            seed_generator(generator, derive_seed(first, *key))
        random_stream = RandomStream(derive_seed(*key))
        state, self._begins_with = self._begins_with, None
        if state is not None:
            self.dataset.load_state_dict(state["source"])
        with random_stream:
            samples = iter(self.dataset)
        if state is not None and state["random"] is not None:  # inside a pass
            random_stream = resumed_stream(state["random"])
            for (generator, _), was in zip(self._generators, state["generators"], strict=False):
                restore_generator(generator, was)
        self.random = random_stream
        return random_stream, samples

    def _read_group(self, samples: Iterator[Any], wanted: bool) -> tuple[list[Any], int]:
        """Read one global batch; returns this rank's chunk (empty unless wanted) and the size of the
        whole."""
        before = self.rank * self.batch_size
        after = (self.world_size - self.rank - 1) * self.batch_size
        size = _discard(samples, before)
        chunk = list(itertools.islice(samples, self.batch_size))
        size += len(chunk) + _discard(samples, after)
        return (chunk if wanted else []), size

    def _hidden_worker(self) -> tuple[int, int]:
        """Return this worker and their number. From here on torch's worker info is hidden from the data set: one
        that splits itself over workers, as torch's manual teaches, would otherwise be split twice."""
        if self._worker is None:
            info = get_worker_info()
            self._worker = (0, 1) if info is None else (info.id, info.num_workers)
            self._in_worker = info is not None
            torch_worker._worker_info = None
        return self._worker

    def _seed_collate(self, number: int, group: int) -> None:
        if self._in_worker:
            seed_generators(derive_seed("collate", self.seed, number, self.rank, group))


def _discard(samples: Iterator[Any], count: int) -> int:
    return sum(1 for _ in itertools.islice(samples, count))
