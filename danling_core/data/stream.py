"""A resumable view of training data: passes, cut into accumulation windows with exact weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from danling_core.data.batches import batch_size_of
from danling_core.data.pass_loader import PassLoader
from danling_core.data.recall import Recall
from danling_core.data.samplers import GlobalBatchSampler
from danling_core.data.seeded import derive_seed
from danling_core.data.user_loader import begin_pass, length_of, putting_back, source_of, whole
from danling_core.errors import CheckpointError, ConfigError

Reduce = Callable[[list[float]], Sequence[float]]
logger = logging.getLogger("danling")


class Window:
    """The batches of one optimizer step on this rank.

    Attributes:
        batches: the micro-batches, equally many on all ranks; to be read once, in full, before the next
            window.
        weights: what to multiply each micro-batch's mean loss by. With DDP's mean over the ranks, the
            accumulated gradient is that of the mean over all `total` samples. 0 for a batch that only keeps
            this rank in step.
        counts: samples of this rank in each micro-batch.
        total: samples in the window over all ranks.
    """

    __slots__ = ("batches", "counts", "total", "weights")

    def __init__(
        self, batches: Iterable[Any], weights: Sequence[float], counts: Sequence[int], total: int
    ) -> None:
        self.batches = batches
        self.weights = weights
        self.counts = counts
        self.total = total

    def __len__(self) -> int:
        """Return micro-batches (iters) in this window."""
        return len(self.counts)


class TrainStream:
    """Training data without end, in passes, that can be left anywhere between two windows and taken up again.

    Sized data built by `build_train_loader` costs no collective: all counts are the sampler's arithmetic, and
    a resume skips by index. Other data (iterable, or a loader of the user's own) is fetched a window ahead of
    its use, and with several ranks its counts are summed by one `reduce` for each window. A rank that runs
    out of data goes on with its last batch at weight 0 until no rank has any.

    Args:
        loader: what `build_train_loader` returned, or any iterable of batches that can be iterated again.
        accum_steps: micro-batches in a window.
        reduce: sums a short list of floats over the ranks; called at the same points on all of them.
        size_of: samples (or tokens) in a batch, where the first tensor's first dimension is not it. Weights
            and counts are then in its unit, also for sized data, at the cost of the `reduce`.
        seed: the run's seed; fixes what a user's loader draws when it begins a pass.
        batches_are_copied: steps get copies of the batches, on another device, and cannot change these.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        accum_steps: int = 1,
        world_size: int = 1,
        rank: int = 0,
        reduce: Reduce | None = None,
        size_of: Callable[[Any], int] | None = None,
        seed: int = 0,
        batches_are_copied: bool = False,
    ) -> None:
        self.loader = loader
        self.accum_steps = accum_steps
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self._ours = loader if isinstance(loader, PassLoader) else None
        self._sampler = self._ours.global_batches if self._ours is not None else None
        self._by_index = self._sampler is not None and size_of is None
        self._reduce = reduce
        self._size_of = size_of or batch_size_of
        self.limit: int | None = None
        """The most micro-batches of a pass; None for all."""
        self._pass = 0
        self._position = 0
        self._is_moved = False
        self._is_exhausted = False
        self._batches_are_copied = batches_are_copied
        self._iterator: Iterator[Any] | None = None
        self._last: list[Any] = []
        self.source = source_of(loader)
        """What can say where it is in the data, or None."""
        self.recall: Recall | None = None
        """What leads a resume back by the state of `source`; None: it reads a pass up to the position."""
        if world_size > 1 and reduce is None and not self._by_index:
            raise ConfigError(
                "data of unknown size on several ranks needs `reduce`, which sums over the ranks"
            )
        self._global_batch = self._ours.global_batch_size if self._ours is not None else 0
        self._length = self._common_length() if self._ours is None else None

    @property
    def batches_per_pass(self) -> int | None:
        """Return micro-batches in a pass, equal on all ranks; None where the data does not say."""
        length = self._length if self._sampler is None else len(self._sampler)
        return length if length is None or self.limit is None else min(length, self.limit)

    @property
    def is_at_end(self) -> bool:
        """Return whether the pass is known to have no window left, by its length; the next one is of the next pass."""
        length = self.batches_per_pass or self.limit
        return length is not None and self._position > 0 and self._position >= length

    def state_dict(self) -> dict[str, int]:
        """Return the stream's position, equal on all ranks. A window counts as consumed once it is yielded, so take
        this after its optimizer step. `position` is the number of global batches (of `global_batch` samples)
        of pass `pass`."""
        return {"pass": self._pass, "position": self._position, "global_batch": self._global_batch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to where `state` was taken, once `take_up` is called or a window is asked for.

        With another global batch size the position is rounded down to the nearest global batch of the new
        size.
        """
        self._pass = state["pass"]
        self._iterator = None
        position = self._rescaled(state["position"], state.get("global_batch", 0))
        length = self.batches_per_pass
        if length is not None and position > length:
            raise CheckpointError(
                f"the checkpoint was taken after {position} batches of a pass, and the data has {length} now: give the "
                "data that the run began with, or begin anew with --fresh"
            )
        self._position = position
        self._is_moved = position != state["position"]

    def go_by_state(self, is_reliable: bool = True) -> None:
        """Have a resume take up the state of `source`, instead of reading a pass up to the position; or no longer."""
        self.recall = None
        if is_reliable and self.source is not None:
            self.recall = Recall(
                self.source, draws_here=self._ours is None, hashes_late=self._batches_are_copied
            )

    def source_state(self) -> dict[str, Any] | None:
        """Return where this rank's source is, to save beside `state_dict`; None: a resume reads up to the position."""
        return None if self.recall is None else self.recall.state_dict()

    def leads_back(self, source_state: Mapping[str, Any]) -> bool:
        """Return whether the last window before the position is the same again, from where `source_state` says.

        Changes the data: to be called in a process of its own, with the position of `load_state_dict`.
        """
        return self.source is not None and not self._is_moved and self._go_back(source_state)

    def take_up(self, source_state: Mapping[str, Any] | None = None) -> bool:
        """Make the iterator where `load_state_dict` said, in the middle of a pass, or of a source that goes by state.

        Making it may draw from the global generators (data read without workers): restore their state *after* this.

        Args:
            source_state: of this rank, for which `leads_back` was true; without it the data is read up to the position.

        Returns:
            whether the data is where it was, as far as can be told.
        """
        if source_state is not None:
            return self._go_back(source_state)
        self._iterator = self._begin() if self._position else None
        return True

    def _go_back(self, source_state: Mapping[str, Any]) -> bool:
        """Go to where `source_state` was taken, over the window that it knows, and on to the position; return whether
        that window is the same."""
        number, position = self._pass, self._position
        self.go_by_state()
        assert self.recall is not None
        self._pass, self._position = source_state["pass"], source_state["position"] - source_state["iters"]
        self._iterator = self._begin(source_state["source"])
        batches, is_same = self.recall.redraw(source_state, self._iterator)
        self._last, self._position = batches[-1:], source_state["position"]
        if source_state["ended"] is None:  # on a rank without a batch since, there may be none ahead
            self._discard(self._iterator, position - self._position)
            is_same = is_same and self._pass == number and self._position <= position
        else:
            if source_state["ended"] == "exhausted":
                is_same = next(self._iterator, self) is self and is_same
            self.end_pass()
            is_same = is_same and self._pass == number
        self._pass, self._position = number, position
        if source_state["ended"] is not None:
            self._iterator = self._begin() if position else None
        return is_same

    def pass_seed(self, number: int) -> int:
        """Return the seed of what a loader of the user's own draws when it begins pass `number` on this rank."""
        return derive_seed("pass", self.seed, number, self.rank)

    def first_batch(self) -> Any:
        """Return the first batch of the data, for a trial: what is read for training begins with it all the same."""
        with putting_back(self.loader):
            return next(iter(self.loader), None)

    def windows(self) -> Iterator[Window]:
        """Yield the remaining windows of the current pass; the next call after its end begins the next pass.

        Breaking out does not end the pass: the next call goes on with the window after.

        Raises:
            ConfigError: the data is empty, or some rank has none while others have. Raised on all ranks
                alike.
        """
        if self._iterator is None:
            self._iterator = self._begin()
        if self._by_index:
            yield from self._indexed_windows(self._iterator)
        elif self.world_size == 1 and self.accum_steps == 1 and self.recall is None:
            yield from self._single_windows(self._iterator)
        else:
            yield from self._drawn_windows(self._iterator)
        self.end_pass()

    def end_pass(self) -> None:
        """Leave the rest of the current pass; the next window is the first of the next pass. On all ranks
        alike."""
        if self.recall is not None:
            self.recall.ended("exhausted" if self._is_exhausted else "left")
        self._is_exhausted = False
        self._iterator = None
        self._last = []
        self._pass += 1
        self._position = 0

    # -- the three ways to make windows --

    def _indexed_windows(self, iterator: Iterator[Any]) -> Iterator[Window]:
        sampler, accum = self._sampler, self.accum_steps
        assert sampler is not None
        length = self.batches_per_pass
        assert length is not None
        full = min(sampler.full, length)
        if full >= accum:
            local, size = sampler.counts(0)
            weights, counts, total = (1 / accum,) * accum, (local,) * accum, size * accum
            last = full - accum
            while self._position <= last:
                self._position += accum
                yield Window(islice(iterator, accum), weights, counts, total)
        while self._position < length:
            stop = min(self._position + accum, length)
            pairs = [sampler.counts(index) for index in range(self._position, stop)]
            self._position = stop
            yield self._window(islice(iterator, len(pairs)), [n for n, _ in pairs], sum(n for _, n in pairs))

    def _single_windows(self, iterator: Iterator[Any]) -> Iterator[Window]:
        size_of, weights = self._size_of, (1.0,)
        for batch in islice(iterator, self._left(self._position)):
            self._position += 1
            size = size_of(batch)
            yield Window((batch,), weights, (size,), size)
        self._refuse_empty()

    def _drawn_windows(self, iterator: Iterator[Any]) -> Iterator[Window]:
        while True:
            is_noted = self.recall is not None and self._position > 0
            if is_noted:
                self.recall.before()  # type: ignore[union-attr]
            left = self._left(self._position, self.accum_steps)
            batches = list(islice(iterator, left))
            counts = [self._count(batch, index) for index, batch in enumerate(batches, self._position)]
            self._last = batches[-1:] or self._last
            iters, total = self._agree(counts)
            if iters == 0:
                self._is_exhausted = left != 0
                break
            missing = iters - len(batches)
            self._position += iters
            if is_noted and batches:
                self.recall.after(batches, self._pass, self._position, iters)  # type: ignore[union-attr]
            yield self._window(batches + self._last * missing, counts + [0] * missing, total)
        self._refuse_empty()

    def _left(self, position: int, most: int | None = None) -> int | None:
        """Return how many batches of the pass are left after `position`, at most `most`; None for all there are."""
        if self.limit is None:
            return most
        left = max(self.limit - position, 0)
        return left if most is None else min(left, most)

    def _window(self, batches: Iterable[Any], counts: list[int], total: int) -> Window:
        weights = tuple(count * self.world_size / total if total else 0.0 for count in counts)
        return Window(batches, weights, tuple(counts), total)

    def _count(self, batch: Any, index: int) -> int:
        if self._sampler is not None and self._sampler.counts(index)[0] == 0:
            return 0
        return self._size_of(batch)

    def _agree(self, counts: list[int]) -> tuple[int, int]:
        """Return micro-batches of the window (the most that any rank has), and its samples over all ranks."""
        if self._reduce is None:
            return len(counts), sum(counts)
        has = [float(index < len(counts)) for index in range(self.accum_steps)]
        starved = float(not self._last)
        total, *holders, starving = self._reduce([float(sum(counts)), *has, starved])
        iters = sum(holder > 0 for holder in holders)
        if iters and starving:
            raise ConfigError(
                f"{int(starving)} of {self.world_size} ranks have no training data in pass {self._pass}, "
                "while others have: lower batch_size or the number of ranks, or split the data more evenly"
            )
        return iters, int(total)

    def _refuse_empty(self) -> None:
        if self._position == 0:
            again = (
                "; an iterator can be read only once, give something to iterate again" if self._pass else ""
            )
            raise ConfigError(f"the training data is empty: pass {self._pass} has no batch{again}")

    # -- beginning a pass --

    def _begin(self, source_state: Mapping[str, Any] | None = None) -> Iterator[Any]:
        ours, position = self._ours, self._position
        if ours is None:
            iterator = begin_pass(self.loader, self._pass, self.pass_seed(self._pass), source_state)
            if source_state is None:
                self._discard(iterator, position)
            return whole(iterator, self.loader, position)
        if source_state is not None:
            ours.set_pass(self._pass, position)
            self.source.load_state_dict(source_state)  # type: ignore[union-attr]
            return iter(ours)
        # of a stream the last batch consumed is drawn again, since a rank may have to repeat it
        ahead = position if self._sampler is not None else max(position - 1, 0) if ours.can_skip else 0
        ours.set_pass(self._pass, ahead)
        iterator = iter(ours)
        self._discard(iterator, position - ahead)
        return iterator

    def _discard(self, iterator: Iterator[Any], count: int) -> None:
        if count <= 0:
            return
        if count > 1:
            logger.info("skipping %d batches of pass %d by reading them", count, self._pass)
        for batch in islice(iterator, count):
            self._last = [batch]

    def _rescaled(self, position: int, global_batch: int) -> int:
        ours = self._global_batch
        if position == 0 or not global_batch or not ours or ours == global_batch:
            return position
        samples = position * global_batch
        if isinstance(self._sampler, GlobalBatchSampler) and samples >= self._sampler.length:
            return len(self._sampler)
        if samples % ours:
            logger.warning("the global batch size has changed: %d samples will be seen twice", samples % ours)
        return samples // ours

    def _common_length(self) -> int | None:
        """Return batches of the longest rank. Collective where there are several ranks."""
        length = length_of(self.loader)
        if self._reduce is None or self.world_size == 1:
            return length
        own = [0.0] * self.world_size
        own[self.rank] = float("nan") if length is None else float(length)
        lengths = self._reduce(own)
        return None if any(value != value for value in lengths) else int(max(lengths))
