"""The hot loop of training: one pass of Python per iter, nothing that waits for the device."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import time
from typing import TYPE_CHECKING, Any, Literal

from danling_core.data import TrainStream, to_device
from danling_core.errors import ConfigError, DanLingError, NonFiniteLossError

_TELL_SECONDS = 0.2

if TYPE_CHECKING:
    from danling_core.runner.torch_runner import TorchRunner


def train_segment(runner: TorchRunner, stream: TrainStream) -> None:
    """Train until the epoch, or in step mode the segment, ends; says in `runner._epoch_is_over` which it was.

    Raises:
        RunInterrupted: all ranks agreed to stop; everything up to here counts.
    """
    began, empty_passes = runner._iters_at_split, 0  # of the segment, which a resume may have taken up inside
    while True:
        stream.accum_steps = min(runner.accum_steps, _iters_left(runner))
        end = _train_pass(runner, stream)
        if end == "segment":
            return
        if end == "short window":
            continue
        runner._epoch_is_over = runner.config.steps_per_epoch is None
        if runner._epoch_is_over and runner.iters > began and runner.config.evaluate_interval_steps is None:
            return
        empty_passes = empty_passes + 1 if runner.iters == began else 0
        if empty_passes > 1:
            raise ConfigError(f"split {runner.split!r} gives no batch: its data is empty")
        # the segment goes on, or the one before ended with the last batch of its pass
        if runner._epoch_is_over:
            runner._count_epoch()


def _train_pass(runner: TorchRunner, stream: TrainStream) -> Literal["segment", "pass", "short window"]:
    """Train on what is left of the stream's pass; returns what ended."""
    progress, config, stopping = runner._progress, runner.config, runner._stopping
    device, moves, beat = runner.device, runner.device.type != "cpu", runner._beat
    train_step, log_interval = runner.train_step, config.log_interval
    save_every, segment_ends = config.save_interval_steps, _segment_end(runner)
    clock, timings = time.perf_counter, runner._timings
    iter_end = sys.maxsize if config.iter_end is None else config.iter_end
    stopping.check(progress.steps)
    ended = clock()
    for window in stream.windows():
        beat(progress.steps)
        counts, weights, last = window.counts, window.weights, len(window.counts) - 1
        for i, batch in enumerate(window.batches):
            timings.data_wait_seconds += clock() - ended
            if moves:
                batch = to_device(batch, device, non_blocking=True)
            runner._weight, runner._count, runner._last_iter = weights[i], counts[i], i == last
            if i == last and counts[i]:
                train_step(batch)
            else:
                _step_aside(runner, batch)
            ended = clock()
        logged = progress.iters // log_interval
        progress.iters += last + 1
        progress.steps += 1
        progress.steps_in_epoch += 1
        if progress.iters // log_interval != logged:
            log_progress(runner)
        if segment_ends(progress):
            if config.steps_per_epoch is None and stream.is_at_end:
                stream.end_pass()
                runner._epoch_is_over = True
            return "segment"
        if save_every is not None and progress.steps % save_every == 0:
            runner.save_checkpoint(save_best=False)
        stopping.check(progress.steps)
        if iter_end - progress.iters < stream.accum_steps:
            return "short window"
        ended = clock()
    return "pass"


def _step_aside(runner: TorchRunner, batch: Any) -> None:
    """The rarer kinds of iter: inside an accumulation window, or a batch that only keeps this rank in step."""
    metrics, train_metrics = runner.metrics, runner.train_metrics
    if runner._count == 0:  # weight 0, and nothing counted
        runner.metrics, runner.train_metrics = copy.deepcopy(metrics), copy.deepcopy(train_metrics)
    try:
        with contextlib.nullcontext() if runner._last_iter else runner._no_sync():
            runner.train_step(batch)
    finally:
        runner.metrics, runner.train_metrics = metrics, train_metrics


def _iters_left(runner: TorchRunner) -> int:
    """Iters before `iter_end`, so that its last accumulation window is weighted by what it really holds."""
    end = runner.config.iter_end
    return sys.maxsize if end is None else end - runner.iters


def _segment_end(runner: TorchRunner) -> Any:
    """A test of the progress after a step: does the segment end here?"""
    config = runner.config
    step_end = math.inf if config.step_end is None else config.step_end
    iter_end = math.inf if config.iter_end is None else config.iter_end
    per_epoch = math.inf if config.steps_per_epoch is None else config.steps_per_epoch
    every = config.evaluate_interval_steps if config.epoch_end is None else None

    def ends(progress: Any) -> bool:
        epoch_is_over = progress.steps_in_epoch >= per_epoch
        runner._epoch_is_over = epoch_is_over
        if progress.steps >= step_end or progress.iters >= iter_end:
            return True
        if every is not None:
            if epoch_is_over:
                runner._count_epoch()
                runner._epoch_is_over = False
            return progress.steps % every == 0
        return epoch_is_over

    return ends


def log_progress(runner: TorchRunner) -> None:
    """Bring the losses to the host and tell the writers how far the run is: at most a few times a second, since
    to tell costs as much as several short steps."""
    flush_losses(runner)
    if runner._files is not None:
        runner._files.saver.check()
    now = time.monotonic()
    if now - runner._told_at < _TELL_SECONDS:
        return
    runner._told_at = now
    samples, since = runner._samples_logged, runner._logged_at
    runner._samples_logged, runner._logged_at = runner.meters.count, now
    rate = (
        (runner.meters.count - samples) * runner.world_size / (now - since) if since and now > since else None
    )
    runner.emit(
        "progress",
        epoch=runner.epochs,
        step=runner.steps,
        iter=runner.iters,
        progress=runner.progress,
        loss=runner.meters.latest,
        samples_per_second=rate,
        timings=runner._timings.of_log(runner.device, runner.steps),
    )


def flush_losses(runner: TorchRunner) -> None:
    """Read the pending losses; the policy for those that are not finite is applied here.

    Raises:
        NonFiniteLossError: names the step, the rank and the value.
    """
    try:
        runner.meters.flush()
    except NonFiniteLossError as error:
        raise located(runner, error) from None


def located(runner: TorchRunner, error: NonFiniteLossError) -> NonFiniteLossError:
    """The same error, with the step and the rank, and what to do; or the one before it, where a save that is
    under way finds that the weights were not finite already."""
    try:
        if runner._files is not None:
            runner._files.saver.drain()
    except NonFiniteLossError as earlier:
        return earlier
    except DanLingError as unsaved:
        runner.logger.error("besides, a checkpoint was not saved: %s", unsaved)
    step = runner._steps_at_split + (runner.meters.iters - 1) // runner.accum_steps
    return NonFiniteLossError(
        f"{error} (step {step}, rank {runner.rank}, split {runner.split!r}): nothing was saved since; "
        "lower the learning rate, clip gradients, or set non_finite=skip"
    )
