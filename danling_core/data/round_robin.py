"""A user's own loader for evaluation: its batches go to the ranks in turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from danling_core.data.seeded import derive_seed
from danling_core.data.user_loader import begin_pass, whole
from danling_core.errors import ConfigError


class RoundRobinBatches:
    """Batch `i` of a loader belongs to rank `i % world_size`, so that every sample counts once.

    Every rank reads the whole loader, begun from the same seed: a shuffling one gives all ranks the same
    order. What the loader leaves out (`drop_last`) stays left out, since its maker said so. Data that splits
    itself and says so with a true attribute `sharded` (see `StreamShards`) is not split again.

    Raises:
        ConfigError: the loader's sampler splits its data over ranks: such samplers repeat samples to even the
            parts.
    """

    def __init__(self, loader: Iterable[Any], *, rank: int, world_size: int, seed: int) -> None:
        for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
            if (getattr(sampler, "num_replicas", None) or 1) > 1:
                raise ConfigError(
                    f"the loader's {type(sampler).__name__} splits its data over ranks and may repeat samples: give "
                    "the data set, or a loader without it, and the runner evaluates each sample once"
                )
        self.loader = loader
        self.is_sharded = bool(getattr(getattr(loader, "dataset", None), "sharded", False))
        self._share = (0, 1) if self.is_sharded else (rank, world_size)
        self._seed = derive_seed("evaluate", seed)

    def __iter__(self) -> Iterator[Any]:
        first, step = self._share
        batches = whole(begin_pass(self.loader, 0, self._seed), self.loader)
        return islice(batches, first, None, step)
