"""Data loaders for one rank, from a data set and a split's settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset

from danling_core.data.fetch import PassClock, SeededSamples, as_tensor_batches, collate_samples, ready
from danling_core.data.given import (
    BatchShardSampler,
    Given,
    GroupedBatchSampler,
    OrderedBatchSampler,
    OrderedShardSampler,
    is_batch_sampler,
    set_epoch,
)
from danling_core.data.iterable import StreamShards
from danling_core.data.samplers import GlobalBatchSampler, ShardBatchSampler
from danling_core.data.seeded import derive_seed
from danling_core.data.workers import start_worker
from danling_core.errors import ConfigError

Collate = Callable[[Any], Any]


class LoaderOptions(Protocol):
    """The settings of one split, as the config resolves them. None leaves the choice to the loader."""

    @property
    def batch_size(self) -> int: ...
    @property
    def num_workers(self) -> int: ...
    @property
    def shuffle(self) -> bool | None: ...
    @property
    def drop_last(self) -> bool | None: ...
    @property
    def pin_memory(self) -> bool | None: ...
    @property
    def persistent_workers(self) -> bool | None: ...
    @property
    def prefetch_factor(self) -> int | None: ...


class PassLoader(DataLoader[Any]):
    """A torch `DataLoader` of which every pass is a function of (seed, pass, rank), and can begin in its
    middle.

    Making an iterator draws nothing from the global generators. `batch_sampler` is a `GlobalBatchSampler` (or
    keeps its promises) for training on sized data.
    """

    def __init__(self, dataset: Any, *, seed: int, rank: int, clock: PassClock, **options: Any) -> None:
        self._key = seed, rank
        self._clock = clock
        super().__init__(dataset, generator=torch.Generator(), worker_init_fn=start_worker, **options)
        self.set_pass(0)

    def set_pass(self, number: int, skip: int = 0) -> None:
        """Choose the pass that the next iterator makes, beginning at global batch `skip`. Called on every
        rank."""
        assert isinstance(self.generator, torch.Generator)
        self.generator.manual_seed(derive_seed("loader", self._key[0], number, self._key[1]))
        self._clock.set(number, skip)
        sampler = self.batch_sampler
        if isinstance(sampler, (GlobalBatchSampler, GroupedBatchSampler)):
            sampler.set_pass(number)
            sampler.skip(skip)
        set_epoch(getattr(self.dataset, "dataset", self.dataset), number)

    @property
    def can_skip(self) -> bool:
        """Whether `set_pass` obeys `skip`: all but data sets that split themselves."""
        return not (isinstance(self.dataset, StreamShards) and self.dataset.sharded)


def build_train_loader(
    dataset: Any,
    options: LoaderOptions,
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    collate_fn: Collate | None = None,
    sampler: Iterable[Any] | None = None,
    device_type: str = "cpu",
) -> DataLoader[Any]:
    """A loader of this rank's part of every global batch: shuffled, keeping the last batch, unless told
    otherwise.

    Args:
        dataset: map-style or iterable data, a tensor, a tuple or mapping of whole tensors, or a user's own
            `DataLoader`, which is returned as it is.
        seed: the run's seed, without the rank's bias.
        sampler: a user's sampler or batch sampler, which takes the place of shuffling.
        device_type: where batches go; memory is pinned for "cuda" unless the settings say otherwise.

    With `num_workers` > 0 what a sample draws at random is a function of (seed, pass, index). With 0 it draws
    from the rank's own generators, whose state belongs to the checkpoint. Either way a resumed run sees the
    same batches.

    Raises:
        ConfigError: the data is empty, or `drop_last` leaves nothing of it.
    """
    if isinstance(dataset, DataLoader):
        return dataset
    shuffle = True if options.shuffle is None else options.shuffle
    drop_last = bool(options.drop_last)
    if not _is_sized(dataset):
        return _build_iterable(dataset, options, rank, world_size, seed, collate_fn, device_type, drop_last)
    build = _Build(dataset, options, rank, seed, collate_fn, device_type)
    place: dict[str, Any] = {"rank": rank, "world_size": world_size}
    batches: GlobalBatchSampler | GroupedBatchSampler
    if sampler is None:
        batches = GlobalBatchSampler(
            build.length,
            options.batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            as_tensors=build.as_tensors,
            **place,
        )
    elif is_batch_sampler(sampler):
        batches = GroupedBatchSampler(Given(sampler, seed), **place)
    else:
        batches = OrderedBatchSampler(
            Given(sampler, seed),
            options.batch_size,
            drop_last=drop_last,
            as_tensors=build.as_tensors,
            **place,
        )
    if len(batches) == 0:
        raise ConfigError(
            f"no training batch: {build.length} samples, batch_size {options.batch_size} on {world_size} "
            f"rank(s), drop_last {drop_last}; lower batch_size, keep the last batch, or look at the sampler"
        )
    return build.loader(batches)


def build_evaluate_loader(
    dataset: Any,
    options: LoaderOptions,
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    collate_fn: Collate | None = None,
    sampler: Iterable[Any] | None = None,
    device_type: str = "cpu",
) -> DataLoader[Any]:
    """A loader of this rank's exact part: nothing shuffled, dropped, or read twice, at any world size.

    Arguments as for `build_train_loader`; `shuffle` and `drop_last` of the settings are not looked at. Sized
    data comes in contiguous parts: the ranks' outputs in rank order are in data set order. Iterable data
    comes in chunks: batch 0 of every rank in rank order, then batch 1 of every rank, is data set order. Ranks
    may have unequal numbers of batches, also none.

    Raises:
        ConfigError: the data is empty.
    """
    if isinstance(dataset, DataLoader):
        return dataset
    if not _is_sized(dataset):
        return _build_iterable(dataset, options, rank, world_size, seed, collate_fn, device_type, False)
    build = _Build(dataset, options, rank, seed, collate_fn, device_type)
    place: dict[str, Any] = {"rank": rank, "world_size": world_size}
    batches: ShardBatchSampler | BatchShardSampler
    if sampler is None:
        batches = ShardBatchSampler(build.length, options.batch_size, as_tensors=build.as_tensors, **place)
    elif is_batch_sampler(sampler):
        batches = BatchShardSampler(Given(sampler, seed), **place)
    else:
        batches = OrderedShardSampler(
            Given(sampler, seed), options.batch_size, as_tensors=build.as_tensors, **place
        )
    return build.loader(batches)


class _Build:
    """How a sized data set is fetched: as whole tensors, or sample by sample."""

    def __init__(
        self,
        dataset: Any,
        options: LoaderOptions,
        rank: int,
        seed: int,
        collate_fn: Collate | None,
        device_type: str,
    ) -> None:
        tensors = as_tensor_batches(dataset) if collate_fn is None else None
        self.length = len(dataset) if tensors is None else len(tensors)
        if self.length == 0:
            raise ConfigError(f"the data set is empty: {type(dataset).__name__} of length 0")
        self.options, self.rank, self.seed, self.device_type = options, rank, seed, device_type
        self.clock = PassClock(shared=options.num_workers > 0)
        self.as_tensors = tensors is not None and options.num_workers == 0
        self.collate = collate_fn or (ready if tensors is not None else collate_samples)
        if tensors is None and options.num_workers > 0:
            dataset = SeededSamples(dataset, seed, self.clock)
        self.dataset = dataset if tensors is None else tensors

    def loader(self, batch_sampler: Any) -> PassLoader:
        return PassLoader(
            self.dataset,
            seed=self.seed,
            rank=self.rank,
            clock=self.clock,
            batch_sampler=batch_sampler,
            collate_fn=self.collate,
            **_transport(self.options, self.device_type),
        )


def _build_iterable(
    dataset: Any,
    options: LoaderOptions,
    rank: int,
    world_size: int,
    seed: int,
    collate_fn: Collate | None,
    device_type: str,
    drop_last: bool,
) -> PassLoader:
    clock = PassClock(shared=options.num_workers > 0)
    shards = StreamShards(
        dataset,
        options.batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        clock=clock,
        drop_last=drop_last,
    )
    return PassLoader(
        shards,
        seed=seed,
        rank=rank,
        clock=clock,
        batch_size=options.batch_size,
        collate_fn=collate_fn,
        **_transport(options, device_type),
    )


def _is_sized(dataset: Any) -> bool:
    if isinstance(dataset, IterableDataset):
        return False
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return True
    if hasattr(dataset, "__iter__"):
        return False
    raise ConfigError(
        f"{type(dataset).__name__} is no data set: it needs __getitem__ and __len__, or __iter__ "
        "(see torch.utils.data)"
    )


def _transport(options: LoaderOptions, device_type: str) -> dict[str, Any]:
    workers = options.num_workers
    pin = device_type == "cuda" if options.pin_memory is None else options.pin_memory
    settings: dict[str, Any] = {"num_workers": workers, "pin_memory": pin}
    if workers > 0:
        persistent = options.persistent_workers
        settings["persistent_workers"] = True if persistent is None else persistent
        settings["prefetch_factor"] = options.prefetch_factor
    return settings
