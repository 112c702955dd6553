"""Which samples make up each batch: global batches for training, exact shards for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from danling_core.data.seeded import derive_seed


def share(length: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the rank's contiguous, balanced part `[start, stop)` of `length` things: the first ranks get the larger
    parts."""
    base, extra = divmod(length, world_size)
    start = rank * base + min(rank, extra)
    return start, start + base + (rank < extra)


class GlobalBatchSampler(Sampler[Any]):
    """Training batches, cut from *global* batches that do not depend on how they are spread over ranks.

    Each pass has one order of the data, a function of (seed, pass) alone. A global batch is the next
    `batch_size * world_size` entries of it, split contiguously and evenly over the ranks. So batch 64 on one
    rank, 32 on two, and 16 on two with two accumulation steps, see the same samples in every optimizer step.

    In the last, smaller global batch a rank may be without a sample. It then gets two samples of the data (or
    the only one) as a dummy, so that it takes part in every collective, and BatchNorm has a variance; `counts`
    says 0 for it, and its loss must weigh nothing.

    Args:
        length: samples in the data set.
        batch_size: samples of one rank in one (micro-)batch.
        drop_last: leave the last, smaller global batch out.
        as_tensors: yield index tensors instead of lists: for whole-tensor data without loader workers.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        as_tensors: bool = False,
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.as_tensors = as_tensors
        self.global_batch_size = batch_size * world_size
        self._pass = 0
        self.first = 0

    def set_pass(self, number: int) -> None:
        """Choose the pass that the next iteration makes, from its beginning."""
        self._pass = number
        self.first = 0

    def skip(self, count: int) -> None:
        """Let iterations begin at global batch `count`, without fetching those before it, until
        `set_pass`."""
        self.first = count

    @property
    def full(self) -> int:
        """Number of leading global batches that are full: for these, `counts` is `(batch_size,
        global_batch_size)`."""
        return self.length // self.global_batch_size

    def __len__(self) -> int:
        """Global batches in a pass: the same on every rank."""
        return self.full if self.drop_last else -(-self.length // self.global_batch_size)

    @property
    def smallest_share(self) -> int:
        """Return samples in the smallest batch of a pass that any rank has and that counts."""
        last = self.length - self.full * self.global_batch_size
        if self.drop_last or not last:
            return self.batch_size
        return max(last // self.world_size, 1)

    def counts(self, index: int) -> tuple[int, int]:
        """Return samples of global batch `index`: `(on this rank, over all ranks)`. A dummy is not counted."""
        start, stop, size = self._bounds(index)
        return stop - start, size

    def __iter__(self) -> Iterator[Any]:
        return self._batches(self.order(), self.first)

    def order(self) -> torch.Tensor:
        """Return the order of this pass: indices into the data set, shape `(length,)`; equal on all ranks."""
        if not self.shuffle:
            return torch.arange(self.length)
        generator = torch.Generator()
        generator.manual_seed(derive_seed("order", self.seed, self._pass))
        return torch.randperm(self.length, generator=generator)

    def _batches(self, order: torch.Tensor, first: int) -> Iterator[Any]:
        step, size, as_tensors = self.global_batch_size, self.batch_size, self.as_tensors
        offset = self.rank * size
        for start in range(first * step + offset, self.full * step + offset, step):
            batch = order[start : start + size]
            yield batch if as_tensors else batch.tolist()
        for index in range(max(first, self.full), len(self)):
            start, stop, _ = self._bounds(index)
            if start == stop:
                start = max(min(index * step, self.length - 2), 0)
                stop = min(start + 2, self.length)
            batch = order[start:stop]
            yield batch if as_tensors else batch.tolist()

    def _bounds(self, index: int) -> tuple[int, int, int]:
        begin = index * self.global_batch_size
        size = min(self.global_batch_size, self.length - begin)
        start, stop = share(size, self.rank, self.world_size)
        return begin + start, begin + stop, size


class ShardBatchSampler(Sampler[Any]):
    """Evaluation batches: each rank reads one contiguous part of the data, in order, every sample exactly
    once.

    Nothing is shuffled, padded or dropped: what the ranks yield, concatenated in rank order, is the data set.
    Parts differ by at most one sample, a rank may have no batch at all, and ranks may have unequal numbers of
    batches.
    """

    def __init__(
        self, length: int, batch_size: int, *, rank: int = 0, world_size: int = 1, as_tensors: bool = False
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.start, self.stop = share(length, rank, world_size)
        self.as_tensors = as_tensors

    def __len__(self) -> int:
        """Return batches on this rank."""
        return -(-(self.stop - self.start) // self.batch_size)

    def counts(self) -> Iterator[int]:
        """Yield the samples in each batch of this rank."""
        for start in range(self.start, self.stop, self.batch_size):
            yield min(self.batch_size, self.stop - start)

    def order(self) -> torch.Tensor | None:
        """Return indices in the order to evaluate, or None for the data set's own."""
        return None

    def __iter__(self) -> Iterator[Any]:
        order = self.order()
        for start in range(self.start, self.stop, self.batch_size):
            stop = min(start + self.batch_size, self.stop)
            batch = torch.arange(start, stop) if order is None else order[start:stop]
            yield batch if self.as_tensors else batch.tolist()
