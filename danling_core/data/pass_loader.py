"""A torch DataLoader that can begin any pass, anywhere in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from danling_core.data.fetch import PassClock
from danling_core.data.given import BatchShardSampler, GroupedBatchSampler, set_epoch
from danling_core.data.iterable import StreamShards
from danling_core.data.samplers import GlobalBatchSampler, ShardBatchSampler
from danling_core.data.seeded import derive_seed
from danling_core.data.workers import start_worker, starting_workers
from danling_core.errors import DataError
from danling_core.parallel.shared_memory import why_unusable


class PassLoader(DataLoader[Any]):
    """A torch `DataLoader` whose passes are functions of (seed, pass, rank), and can begin anywhere.

    Made by `build_train_loader` and `build_evaluate_loader`. Making an iterator draws nothing from the global
    generators, and `set_epoch` of the data set is called for each pass.
    """

    def __init__(self, dataset: Any, *, seed: int, rank: int, clock: PassClock, **options: Any) -> None:
        self._key = seed, rank
        self._clock = clock
        super().__init__(dataset, generator=torch.Generator(), worker_init_fn=start_worker, **options)
        self.set_pass(0)

    @property
    def global_batches(self) -> GlobalBatchSampler | GroupedBatchSampler | None:
        """Return the sampler that knows all counts; None for iterable data and for evaluation."""
        sampler = self.batch_sampler
        return sampler if isinstance(sampler, (GlobalBatchSampler, GroupedBatchSampler)) else None

    def __iter__(self) -> Any:
        try:
            with starting_workers():
                iterator = super().__iter__()
        except OSError as error:
            if (reason := why_unusable(error)) is None:
                raise
            raise DataError(
                f"the loader's workers cannot be started: {reason}, or set num_workers=0"
            ) from error
        return self._whole(iterator)

    def _whole(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches that the sampler says are due.

        Raises:
            DataError: the data ended before them.
        """
        number, batches = 0, self.global_batches
        for number, batch in enumerate(iterator, 1):  # noqa: B007
            yield batch
        if isinstance(self.dataset, StreamShards) or self.batch_sampler is None:
            return
        due = len(self) - (0 if batches is None else batches.first)
        if number < due:
            raise DataError(
                f"the data gave {number} of {due} batches: its __getitem__ or the collate_fn raised StopIteration, "
                "which is taken for the end; let it raise another error"
            )

    def counts(self) -> Iterator[int] | None:
        """Yield the samples in each batch of an evaluation, as the sampler cuts them; None for iterable data."""
        sampler = self.batch_sampler
        return sampler.counts() if isinstance(sampler, ShardBatchSampler | BatchShardSampler) else None

    @property
    def global_batch_size(self) -> int:
        """Return samples of a full global batch, or 0 where batches have no common size."""
        sampler = self.batch_sampler
        if isinstance(self.dataset, StreamShards):
            return self.dataset.batch_size * self.dataset.world_size
        return sampler.global_batch_size if isinstance(sampler, GlobalBatchSampler) else 0

    @property
    def can_skip(self) -> bool:
        """Return whether `set_pass` obeys `skip`: all but data sets that split themselves."""
        return not (isinstance(self.dataset, StreamShards) and self.dataset.sharded)

    def set_pass(self, number: int, skip: int = 0) -> None:
        """Choose the pass that the next iterator makes, beginning at global batch `skip`. On every rank."""
        assert isinstance(self.generator, torch.Generator)
        seed, rank = self._key
        self.generator.manual_seed(derive_seed("loader", seed, number, rank))
        self._clock.set(number, skip)
        if isinstance(self.dataset, StreamShards):
            self.dataset.forget()
        if self.global_batches is not None:
            self.global_batches.set_pass(number)
            self.global_batches.skip(skip)
        set_epoch(self.dataset, number)
