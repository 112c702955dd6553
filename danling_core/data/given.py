"""Samplers and batch samplers given by the user: their order is kept, and spread over the ranks."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Sampler

from danling_core.data.generators import Beginning, held_by
from danling_core.data.samplers import GlobalBatchSampler, ShardBatchSampler, share
from danling_core.data.seeded import RandomStream, derive_seed
from danling_core.errors import ConfigError

_MOST_ENTRIES = 1 << 26


class Given:
    """A user's sampler, made a function of (seed, pass) that is equal on all ranks.

    A sampler without a generator draws from a stream seeded by (seed, pass); one with a generator, of torch, NumPy or
    Python, keeps the user's seed in the first pass, and continues with a seed derived from it. `set_epoch` is called
    where there is one.

    Raises:
        ConfigError: the sampler already splits its data over ranks.
    """

    def __init__(self, sampler: Iterable[Any], seed: int) -> None:
        inner = getattr(sampler, "sampler", None)
        if max(getattr(sampler, "num_replicas", None) or 1, getattr(inner, "num_replicas", None) or 1) > 1:
            raise ConfigError(
                f"{type(sampler).__name__} splits its data over ranks itself, and the runner does that too: "
                "give the sampler that it wraps, or a DataLoader of your own"
            )
        self.sampler = sampler
        self.seed = seed
        self._sources = [sampler] if inner is None else [sampler, inner]
        held = {id(generator): generator for source in self._sources for generator in held_by(source)}
        self._generators = [Beginning(generator) for generator in held.values()]
        self._cached: tuple[int, list[Any]] | None = None

    def entries(self, number: int) -> list[Any]:
        """Return the entries that the sampler yields in pass `number`."""
        if self._cached is None or self._cached[0] != number:
            for beginning in self._generators:
                beginning.begin_pass(number)
            for source in self._sources:
                set_epoch(source, number)
            with RandomStream(derive_seed("given", self.seed, number)):
                self._cached = number, self._drawn()
        return self._cached[1]

    def _drawn(self) -> list[Any]:
        entries = list(islice(self.sampler, None if hasattr(self.sampler, "__len__") else _MOST_ENTRIES))
        if len(entries) == _MOST_ENTRIES:
            raise ConfigError(
                f"{type(self.sampler).__name__} gave {_MOST_ENTRIES} entries, has no length, and does not seem to end: "
                "a sampler gives the entries of one pass"
            )
        return entries

    @property
    def yields_batches(self) -> bool:
        """Return whether this is a batch sampler: its entries are lists of indices.

        Raises:
            ConfigError: its entries are neither lists nor integers.
        """
        entries = self.entries(0)
        if not entries or isinstance(entries[0], list):
            return bool(entries)
        if isinstance(entries[0], tuple) and hasattr(self.sampler, "batch_size"):
            return True
        try:
            operator.index(entries[0])
        except TypeError as error:
            raise ConfigError(
                f"{type(self.sampler).__name__} gives {entries[0]!r}: a sampler gives integers, and a batch sampler "
                "lists of them; for other keys give a DataLoader of your own"
            ) from error
        return False


def set_epoch(target: object, number: int) -> None:
    """Tell a data set or a sampler which pass comes, where it wants to know; also those that it wraps."""
    while target is not None:
        method = getattr(target, "set_epoch", None)
        if callable(method):
            method(number)
        for stage in _stages(target):  # of WebDataset, which count the passes that they begin
            if type(getattr(stage, "epoch", None)) is int:
                stage.epoch = number - 1
        target = getattr(target, "dataset", None)


def _stages(target: object) -> list[Any]:
    stages = getattr(target, "pipeline", None)
    return stages if isinstance(stages, list) else []


class OrderedBatchSampler(GlobalBatchSampler):
    """Global batches of what a user's sampler yields. Its length may change from pass to pass."""

    def __init__(self, given: Given, batch_size: int, **options: Any) -> None:
        super().__init__(len(given.entries(0)), batch_size, seed=given.seed, **options)
        self.given = given

    def set_pass(self, number: int) -> None:
        super().set_pass(number)
        self.length = len(self.given.entries(number))

    def order(self) -> torch.Tensor:
        return torch.tensor(self.given.entries(self._pass), dtype=torch.int64)


class OrderedShardSampler(ShardBatchSampler):
    """Exact contiguous shards of what a user's sampler yields in its first pass."""

    def __init__(self, given: Given, batch_size: int, **options: Any) -> None:
        super().__init__(len(given.entries(0)), batch_size, **options)
        self.given = given

    def order(self) -> torch.Tensor:
        return torch.tensor(self.given.entries(0), dtype=torch.int64)


class GroupedBatchSampler(Sampler[list[Any]]):
    """A user's batches for training: `world_size` consecutive ones are a global batch, one for each rank.

    The last group may be short; a rank without a batch gets two samples of the group's first as a dummy that
    counts 0.
    """

    full = 0

    def __init__(self, given: Given, *, rank: int, world_size: int) -> None:
        self.given = given
        self.rank = rank
        self.world_size = world_size
        self._pass = 0
        self.first = 0

    def set_pass(self, number: int) -> None:
        """Choose the pass that the next iteration makes, from its beginning."""
        self._pass = number
        self.first = 0

    def skip(self, count: int) -> None:
        """Let iterations begin at global batch `count` until `set_pass`."""
        self.first = count

    def __len__(self) -> int:
        return -(-len(self.given.entries(self._pass)) // self.world_size)

    def counts(self, index: int) -> tuple[int, int]:
        """Return samples of global batch `index`: `(on this rank, over all ranks)`. A dummy is not counted."""
        group = self._group(index)
        local = len(group[self.rank]) if self.rank < len(group) else 0
        return local, sum(len(batch) for batch in group)

    def __iter__(self) -> Iterator[list[Any]]:
        for index in range(self.first, len(self)):
            group = self._group(index)
            yield list(group[self.rank]) if self.rank < len(group) else list(group[0][:2])

    def _group(self, index: int) -> list[list[Any]]:
        return self.given.entries(self._pass)[index * self.world_size : (index + 1) * self.world_size]


class BatchShardSampler(Sampler[list[Any]]):
    """A user's batches for evaluation: each rank reads one contiguous part of them."""

    def __init__(self, given: Given, *, rank: int, world_size: int) -> None:
        entries = given.entries(0)
        start, stop = share(len(entries), rank, world_size)
        self.batches = [list(batch) for batch in entries[start:stop]]

    def __len__(self) -> int:
        return len(self.batches)

    def counts(self) -> Iterator[int]:
        """Yield the samples in each batch of this rank."""
        return (len(batch) for batch in self.batches)

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.batches)
