"""A loader that the user made: begun the same way each time, and measured where it can be."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import chain, islice
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils.data import DataLoader, IterableDataset

from danling_core.data.generators import Beginning, held_by
from danling_core.data.given import set_epoch
from danling_core.data.iterable import StreamShards
from danling_core.data.seeded import RandomStream
from danling_core.errors import DataError

_BEGINNINGS: WeakKeyDictionary[Any, list[Beginning]] = WeakKeyDictionary()


def source_of(loader: Any) -> Any | None:
    """Return what can say where a loader is, by `state_dict` and `load_state_dict`: the loader itself, or iterable data
    that it reads in this process. None where there is no such thing."""
    dataset = getattr(loader, "dataset", None)
    is_read_here = isinstance(dataset, IterableDataset) and getattr(loader, "num_workers", 1) == 0
    has_state = _has_state(dataset.dataset if isinstance(dataset, StreamShards) else dataset)
    if _has_state(loader):
        return loader
    return dataset if is_read_here and has_state else None


def _has_state(value: Any) -> bool:
    return all(callable(getattr(type(value), name, None)) for name in ("state_dict", "load_state_dict"))


@contextlib.contextmanager
def putting_back(loader: Any) -> Iterator[None]:
    """Put back what reading a loader inside the block moves in this process: data that goes on where it was.

    A `DataLoader` begins anew each time; the iterable data that it reads here may not.
    """
    shards = loader.dataset if isinstance(getattr(loader, "dataset", None), StreamShards) else None
    data: Any = loader
    if isinstance(loader, DataLoader):
        data = shards.dataset if shards is not None else loader.dataset
        if not isinstance(loader.dataset, IterableDataset) or loader.num_workers > 0:
            data = None
    if not _has_state(data):
        yield
        return
    before, random = copy.deepcopy(data.state_dict()), None if shards is None else shards.random
    try:
        yield
    finally:
        data.load_state_dict(before)
        if shards is not None:
            shards.random = random


def begin_pass(
    loader: Iterable[Any], number: int, seed: int, source_state: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """Yield the batches of pass `number`. What is drawn from the global generators while it begins (the order of a
    `RandomSampler`, the seeds of workers, a shuffle of files before the first batch) depends on `seed` alone.

    `set_epoch` is called on the loader, its data set and its samplers, where they have it. A generator of theirs keeps
    its seed in the first pass, and has one derived from it in each later pass.

    Args:
        source_state: where `source_of(loader)` was; the pass goes on from there.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
    informed: list[Any] = []
    for part in parts:
        if not any(part is other for other in informed):
            set_epoch(part, number)
            informed.append(part)
    for beginning in _beginnings(loader, informed):
        beginning.begin_pass(number)
    if source_state is not None:
        source_of(loader).load_state_dict(source_state)  # type: ignore[union-attr]
    with RandomStream(seed):
        iterator = iter(loader)
        if source_state is not None:
            return iterator
        first = list(islice(iterator, 1))  # here, since a generator may shuffle when it is first asked
    return chain(first, iterator)


def _beginnings(loader: Iterable[Any], samplers: list[Any]) -> list[Beginning]:
    """Return the generators of a loader and its samplers, as they were when first seen."""
    held = {id(generator): generator for each in (loader, *samplers) for generator in held_by(each)}
    try:
        if loader not in _BEGINNINGS:
            _BEGINNINGS[loader] = [Beginning(generator) for generator in held.values()]
        return _BEGINNINGS[loader]
    except TypeError:  # no weak reference to it can be kept, as to a list
        return []


def whole(iterator: Iterator[Any], loader: Iterable[Any], skipped: int = 0) -> Iterator[Any]:
    """Yield the batches of a loader, of which so many were taken already.

    Raises:
        DataError: a torch DataLoader over sized data ended before the length that it states.
    """
    number = skipped
    for number, batch in enumerate(iterator, skipped + 1):  # noqa: B007
        yield batch
    due = length_of(loader) if _states_its_length(loader) else None
    if due is not None and number < due:
        raise DataError(
            f"the loader gave {number} of {due} batches: the __getitem__ of its data raised StopIteration, which is "
            "taken for the end; let it raise another error"
        )


def _states_its_length(loader: Iterable[Any]) -> bool:
    """Return whether the length is that of torch's own samplers, and no estimate."""
    samplers = (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    are_torchs = all(each is None or type(each).__module__.startswith("torch.") for each in samplers)
    return isinstance(loader, DataLoader) and are_torchs


def length_of(loader: Iterable[Any]) -> int | None:
    """Return batches of a loader that can tell. What an iterable data set says of its length is not trusted."""
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        return None
    if not isinstance(loader, Sized):
        return None
    try:
        return len(loader)
    except TypeError:  # a DataLoader has a length only where its sampler has one
        return None
