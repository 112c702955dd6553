"""A loader that the user made: begun the same way each time, and measured where it can be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import chain, islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from danling_core.data.given import set_epoch
from danling_core.data.seeded import RandomStream


def begin_pass(loader: Iterable[Any], number: int, seed: int) -> Iterator[Any]:
    """Yield the batches of pass `number`. What is drawn from the global generators while it begins (the order of a
    `RandomSampler`, the seeds of workers, a shuffle of files before the first batch) depends on `seed` alone.

    `set_epoch` is called on the loader, its data set and its samplers, where they have it.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
    informed: list[Any] = []
    for part in parts:
        if not any(part is other for other in informed):
            set_epoch(part, number)
            informed.append(part)
    with RandomStream(seed):
        iterator = iter(loader)
        first = list(islice(iterator, 1))  # here, since a generator may shuffle when it is first asked
    return chain(first, iterator)


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
