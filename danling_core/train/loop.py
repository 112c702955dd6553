"""The hot loop of training: one pass of Python per iter, nothing that waits for the device."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Literal

import torch

from danling_core.config import Config
from danling_core.data.batches import to_device
from danling_core.data.stream import TrainStream, Window
from danling_core.errors import ConfigError
from danling_core.train.epoch import EpochState
from danling_core.train.progress import Progress
from danling_core.train.step import Step
from danling_core.train.timing import Timings

Ended = Literal["segment", "pass", "short window"]


class TrainLoop:
    """The windows of one split, until the epoch ends, or in step mode the segment.

    Iterate over it to get windows, and over each window to get `(batch, step)`. A window is one optimizer step; it
    counts as done when the next one is asked for.

    Args:
        stream: the split's data.
        config: with the ends of the run, its intervals, and `accum_steps`.
        progress: counted here.
        state: learns in `is_whole` whether the segment ended a pass.
        device: where batches go.
        timings: gets the seconds that the loop waited for data.
        check_stop: called before each step with the count of completed ones; raises RunInterrupted at the agreed one.
        beat: called at each step with the count of completed ones, to show that this rank is alive.
        count_epoch: called where a pass ends inside a segment.
        after_window: called once a window is counted.
        log: called every `log_interval` iters.
        save: called every `save_interval_steps` steps.
    """

    def __init__(
        self,
        stream: TrainStream,
        config: Config,
        progress: Progress,
        state: EpochState,
        *,
        device: torch.device,
        timings: Timings,
        check_stop: Callable[[int], None],
        beat: Callable[[int], None],
        count_epoch: Callable[[], None],
        after_window: Callable[[], None],
        log: Callable[[], None],
        save: Callable[[], None],
    ) -> None:
        self._stream = stream
        self._config = config
        self._progress = progress
        self._state = state
        self._device = device
        self._timings = timings
        self._check_stop = check_stop
        self._beat = beat
        self._count_epoch = count_epoch
        self._after_window = after_window
        self._log = log
        self._save = save
        self._step_end = math.inf if config.step_end is None else config.step_end
        self._iter_end = sys.maxsize if config.iter_end is None else config.iter_end
        self._steps_per_epoch = math.inf if config.steps_per_epoch is None else config.steps_per_epoch
        self._evaluate_every = config.evaluate_interval_steps if config.epoch_end is None else None
        self._step_ended = 0.0
        self._known_steps: tuple[Sequence[float], Sequence[int], list[Step]] = ((), (), [])

    def __iter__(self) -> Iterator[Iterator[tuple[Any, Step]]]:
        """Yield the windows that are left.

        Raises:
            RunInterrupted: all ranks agreed to stop; everything up to here counts.
            ConfigError: the data is empty.
        """
        config, progress, state = self._config, self._progress, self._state
        began = state.iters_before  # of the segment, which a resume may have taken up inside
        empty_passes = 0
        while True:
            self._stream.accum_steps = min(config.accum_steps, self._iter_end - progress.iters)
            ended = yield from self._pass()
            if ended == "segment":
                return
            if ended == "short window":
                continue
            state.is_whole = config.steps_per_epoch is None
            if state.is_whole and progress.iters > began and config.evaluate_interval_steps is None:
                return
            empty_passes = empty_passes + 1 if progress.iters == began else 0
            if empty_passes > 1:
                raise ConfigError(f"split {state.split!r} gives no batch: its data is empty")
            # the segment goes on, or the one before ended with the last batch of its pass
            if state.is_whole:
                self._count_epoch()

    def _pass(self) -> Generator[Iterator[tuple[Any, Step]], None, Ended]:
        """Yield the windows that are left of the stream's pass; return what ended."""
        progress, stream, state = self._progress, self._stream, self._state
        log_interval = self._config.log_interval or sys.maxsize
        save_interval = self._config.save_interval_steps
        check_stop, beat, clock = self._check_stop, self._beat, time.perf_counter
        check_stop(progress.steps)
        self._step_ended = clock()
        for window in stream.windows():
            beat(progress.steps)
            logged = progress.iters // log_interval
            yield self._batches(window)
            progress.end_window()
            self._after_window()
            if progress.iters // log_interval != logged:
                self._log()
            if self._ends_segment():
                if self._config.steps_per_epoch is None and stream.is_at_end:
                    stream.end_pass()
                    state.is_whole = True
                return "segment"
            if save_interval is not None and progress.steps % save_interval == 0:
                self._save()
            check_stop(progress.steps)
            if self._iter_end - progress.iters < stream.accum_steps:
                return "short window"
            self._step_ended = clock()
        return "pass"

    def _batches(self, window: Window) -> Iterator[tuple[Any, Step]]:
        device, moves, timings = self._device, self._device.type != "cpu", self._timings
        clock, progress = time.perf_counter, self._progress
        for batch, step in zip(window.batches, self._steps_of(window), strict=True):
            timings.data_wait_seconds += clock() - self._step_ended
            if moves:
                batch = to_device(batch, device, non_blocking=True)
            yield batch, step
            progress.count_iter()
            self._step_ended = clock()

    def _steps_of(self, window: Window) -> list[Step]:
        """Return a step for each batch; the same ones again for a window of the same weights and counts."""
        weights, counts, steps = self._known_steps
        if window.counts != counts or window.weights != weights:
            last = len(window.counts) - 1
            pairs = enumerate(zip(window.weights, window.counts, strict=True))
            steps = [Step(weight, count, ends_window=i == last) for i, (weight, count) in pairs]
            self._known_steps = window.weights, window.counts, steps
        return steps

    def _ends_segment(self) -> bool:
        progress, state = self._progress, self._state
        state.is_whole = progress.steps_in_epoch >= self._steps_per_epoch
        if progress.steps >= self._step_end or progress.iters >= self._iter_end:
            return True
        if self._evaluate_every is None:
            return state.is_whole
        if state.is_whole:
            self._count_epoch()
            state.is_whole = False
        return progress.steps % self._evaluate_every == 0
