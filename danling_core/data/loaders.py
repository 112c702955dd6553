"""Data loaders for one rank, from a data set and a split's settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from danling_core.config.sections import LoaderOptions
from danling_core.data.fetch import PassClock, SeededSamples, as_tensor_batches, collate_samples, ready
from danling_core.data.given import (
    BatchShardSampler,
    Given,
    GroupedBatchSampler,
    OrderedBatchSampler,
    OrderedShardSampler,
)
from danling_core.data.iterable import StreamShards
from danling_core.data.pass_loader import PassLoader
from danling_core.data.samplers import GlobalBatchSampler, ShardBatchSampler
from danling_core.errors import ConfigError

Collate = Callable[[Any], Any]


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
    """Return a loader of this rank's part of every global batch: shuffled, and with its last batch, unless set
    otherwise.

    Args:
        dataset: map-style or iterable data, a tensor, or a tuple or mapping of whole tensors.
        seed: the run's seed, without the rank's bias.
        collate_fn: gets a list of samples. Without one, whole tensors and ready batches of `__getitems__` are
            not collated at all.
        sampler: a user's sampler or batch sampler, which takes the place of shuffling.
        device_type: where batches go; memory is pinned for "cuda" and "xpu" unless the settings say otherwise.

    With `num_workers` > 0 what a sample draws at random is a function of (seed, pass, index). With 0 it draws
    from the rank's own generators, whose state belongs to the checkpoint. Either way a resumed run sees the
    same batches.

    Raises:
        ConfigError: the data is empty, or `drop_last` leaves nothing of it.
    """
    maker = _Maker(options, rank, world_size, seed, collate_fn, device_type)
    if not _is_sized(dataset):
        return maker.streamed(_unsampled(dataset, sampler), drop_last=bool(options.drop_last))
    source = maker.source(dataset)
    batches = _train_batches(source, options, rank, world_size, seed, sampler)
    if len(batches) == 0:
        raise ConfigError(
            f"no training batch: {source.length} samples, batch_size {options.batch_size} on {world_size} "
            f"rank(s), drop_last {options.drop_last}; lower batch_size, keep the last batch, or look at "
            "the sampler"
        )
    return maker.indexed(source, batches)


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
    """Return a loader of this rank's exact part: nothing shuffled, dropped, or read twice, at any world size.

    Arguments as for `build_train_loader`; `shuffle` and `drop_last` of the settings are not looked at. Ranks
    may have unequal numbers of batches, also none.

    Sized data comes in contiguous parts: the ranks' batches in rank order are in the data set's order. Of
    iterable data each rank has a chunk of every global batch: batch 0 of all ranks in rank order, then batch
    1 of all ranks, and so on, are in the data set's order.

    Raises:
        ConfigError: the data is empty.
    """
    maker = _Maker(options, rank, world_size, seed, collate_fn, device_type)
    if not _is_sized(dataset):
        return maker.streamed(_unsampled(dataset, sampler), drop_last=False)
    source = maker.source(dataset)
    return maker.indexed(
        source, _evaluate_batches(source, options.batch_size, rank, world_size, seed, sampler)
    )


@dataclass(frozen=True)
class _Source:
    """A sized data set as it will be fetched."""

    dataset: Any
    length: int
    collate: Collate
    as_tensors: bool
    on_cpu: bool
    clock: PassClock


@dataclass(frozen=True)
class _Maker:
    options: LoaderOptions
    rank: int
    world_size: int
    seed: int
    collate_fn: Collate | None
    device_type: str

    def source(self, dataset: Any) -> _Source:
        clock = self._clock()
        tensors = as_tensor_batches(dataset) if self.collate_fn is None else None
        length = len(dataset) if tensors is None else len(tensors)
        if length == 0:
            raise ConfigError(f"the data set is empty: {type(dataset).__name__} of length 0")
        workers = self.options.num_workers > 0
        if tensors is not None:
            return _Source(tensors, length, ready, not workers, tensors.device.type == "cpu", clock)
        fetched = SeededSamples(dataset, self.seed, clock) if workers else dataset
        return _Source(fetched, length, self.collate_fn or collate_samples, False, True, clock)

    def indexed(self, source: _Source, batch_sampler: Any) -> PassLoader:
        return PassLoader(
            source.dataset,
            seed=self.seed,
            rank=self.rank,
            clock=source.clock,
            batch_sampler=batch_sampler,
            collate_fn=source.collate,
            **self._transport(source.on_cpu),
        )

    def streamed(self, dataset: Any, drop_last: bool) -> PassLoader:
        clock, size = self._clock(), self.options.batch_size
        place: dict[str, Any] = {"rank": self.rank, "seed": self.seed, "clock": clock}
        shards = StreamShards(dataset, size, world_size=self.world_size, drop_last=drop_last, **place)
        settings = self._transport(on_cpu=True)
        return PassLoader(shards, batch_size=size, collate_fn=self.collate_fn, **place, **settings)

    def _clock(self) -> PassClock:
        return PassClock(shared=self.options.num_workers > 0)

    def _transport(self, on_cpu: bool) -> dict[str, Any]:
        options = self.options
        pin = options.pin_memory
        if pin is None:
            pin = self.device_type in ("cuda", "xpu") and on_cpu
        settings: dict[str, Any] = {"num_workers": options.num_workers, "pin_memory": pin}
        if options.num_workers > 0:
            persistent = options.persistent_workers
            settings["persistent_workers"] = True if persistent is None else persistent
            settings["prefetch_factor"] = options.prefetch_factor
        return settings


def _train_batches(
    source: _Source,
    options: LoaderOptions,
    rank: int,
    world_size: int,
    seed: int,
    sampler: Iterable[Any] | None,
) -> GlobalBatchSampler | GroupedBatchSampler:
    place: dict[str, Any] = {"rank": rank, "world_size": world_size}
    cut: dict[str, Any] = {"drop_last": bool(options.drop_last), "as_tensors": source.as_tensors}
    if sampler is None:
        shuffle = True if options.shuffle is None else options.shuffle
        return GlobalBatchSampler(
            source.length, options.batch_size, shuffle=shuffle, seed=seed, **cut, **place
        )
    given = Given(sampler, seed)
    if given.yields_batches:
        return GroupedBatchSampler(given, **place)
    return OrderedBatchSampler(given, options.batch_size, **cut, **place)


def _evaluate_batches(
    source: _Source, batch_size: int, rank: int, world_size: int, seed: int, sampler: Iterable[Any] | None
) -> ShardBatchSampler | BatchShardSampler:
    place: dict[str, Any] = {"rank": rank, "world_size": world_size}
    if sampler is None:
        return ShardBatchSampler(source.length, batch_size, as_tensors=source.as_tensors, **place)
    given = Given(sampler, seed)
    if given.yields_batches:
        return BatchShardSampler(given, **place)
    return OrderedShardSampler(given, batch_size, as_tensors=source.as_tensors, **place)


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


def _unsampled(dataset: Any, sampler: Iterable[Any] | None) -> Any:
    if sampler is not None:
        raise ConfigError(
            f"a sampler picks samples by index, which {type(dataset).__name__}, being iterable, does not "
            "have: leave the sampler out, or give map-style data"
        )
    return dataset
