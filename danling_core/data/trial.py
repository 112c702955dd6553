"""A trial of data before training: whether it can be read twice alike, and whether its state leads back."""

from __future__ import annotations

import random
from copy import deepcopy
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from danling_core.data.facts import hash_of
from danling_core.data.iterable import StreamShards
from danling_core.data.pass_loader import PassLoader
from danling_core.data.seeded import RandomStream, derive_seed
from danling_core.data.stream import TrainStream
from danling_core.data.user_loader import begin_pass, source_of

_SAMPLES = 16
_BATCHES = 2
_SEED = derive_seed("trial")


def needs_trial(loader: Any) -> bool:
    """Return whether nothing but a trial can tell what a loader's data gives: iterable data, and loaders of the user's
    own that are more than a `DataLoader` over a map-style data set. An iterator, which is read once, is left alone."""
    if isinstance(loader, PassLoader):
        return isinstance(loader.dataset, StreamShards)
    is_plain = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
    return not (is_plain or isinstance(loader, list | tuple) or hasattr(type(loader), "__next__"))


def counts_its_passes(loader: Any) -> bool:
    """Return whether data knows only by itself which pass it is in: iterable data, or a loader of the user's own, that
    has no `set_epoch`."""
    data = getattr(loader, "dataset", None)
    data = data.dataset if isinstance(data, StreamShards) else data
    if isinstance(loader, DataLoader) and not isinstance(data, IterableDataset):
        return False
    told = data if isinstance(loader, DataLoader) else loader
    return not callable(getattr(told, "set_epoch", None)) and not hasattr(told, "pipeline")


def is_common(loader: Any) -> bool:
    """Return whether all ranks read the same data and each keeps its part: data that does not split itself."""
    if isinstance(loader, PassLoader):
        return not loader.dataset.sharded  # type: ignore[attr-defined]
    return not getattr(getattr(loader, "dataset", None), "sharded", False)


def read_twice(loader: Any, seed: int) -> dict[str, Any]:
    """Read the beginning of a loader's first pass twice: `{content: its hash or None, varies: whether it differed}`.

    Changes the data: to be called in a process of its own.

    Args:
        loader: of `build_train_loader`, or of the user's own.
        seed: as for the pass itself.
    """
    source = source_of(loader)
    if isinstance(source, DataLoader):  # which begins anew each time
        source = None
    before = None if source is None else deepcopy(source.state_dict())
    found = []
    for _ in range(2):
        if source is not None:
            source.load_state_dict(deepcopy(before))
        with RandomStream(_SEED):
            found.append(hash_of(_beginning(loader, seed)))
    return {"content": found[0] if found[0] == found[1] else None, "varies": found[0] != found[1]}


def _beginning(loader: Any, seed: int) -> list[Any]:
    if isinstance(loader, PassLoader):
        return loader.dataset.first_samples(_SAMPLES)  # type: ignore[attr-defined]
    return list(islice(begin_pass(loader, 0, seed), _BATCHES))


def state_leads_back(stream: TrainStream) -> bool:
    """Return whether batches after the first are the same where the state of the source is taken up before them.

    Changes the data: to be called in a process of its own.

    Args:
        stream: with a `source`.
    """

    def alone() -> TrainStream:
        made = TrainStream(stream.loader, rank=stream.rank, size_of=lambda batch: 1, seed=stream.seed)
        made.go_by_state()
        return made

    first, again = alone(), alone()
    with RandomStream(_SEED):
        _read(first)
        position, state = first.state_dict(), deepcopy(first.source_state())
    if state is None:
        return False
    with RandomStream(_SEED):
        expected, drawn = _read(first), _draw()
    with RandomStream(_SEED):
        again.load_state_dict(position)
        is_same = again.leads_back(state)
    with RandomStream(_SEED):
        return is_same and hash_of(_read(again)) == hash_of(expected) and _draw() == drawn


def _read(stream: TrainStream) -> list[Any]:
    return [list(window.batches) for window in islice(stream.windows(), _BATCHES)]


def _draw() -> tuple[float, ...]:
    """Return the next number of each global generator: whether as much was drawn from them."""
    return random.random(), float(torch.rand(())), float(np.random.rand())
