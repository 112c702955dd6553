"""Search for the largest batch: how fast training is with each size, and what memory it takes."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from danling_core.config import Config
from danling_core.errors import ConfigError, DanLingError
from danling_core.runner.resolve import import_runner
from danling_core.tools.tune.trial import config_of, runner_for_trial, steps

_WARM_UP = 1
_HEADROOM = 0.9
_CLOSE = 1.125  # the search ends with a size that fits, and one up to so much larger that does not
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class BatchTrial:
    """Trial of one batch size.

    Args:
        batch_size: samples of a rank in an iter.
        samples_per_second: of one rank; None where it failed.
        memory_bytes: the most that was allocated on the GPU, or resident in the process; None where it failed.
        failed: why it cannot be trained with: there is no memory.
    """

    batch_size: int
    samples_per_second: float | None = None
    memory_bytes: int | None = None
    failed: str | None = None


def batch_search(
    file: str,
    overrides: Sequence[str] = (),
    *,
    largest: int | None = None,
    count: int = 5,
    watch: Callable[[BatchTrial], None] = lambda trial: None,
) -> list[BatchTrial]:
    """Double the batch size from the config's until it does not fit, then look between; each in a process of its own.

    Half of the config's size is tried as well.

    On a CPU, where too much memory gets a process killed, it ends before a size that would take more than nine tenths
    of what is available. A size that the data set has no full batch of is not tried.

    Args:
        largest: try no larger size.
        count: steps of each trial that are timed.
        watch: called with each trial.

    Returns:
        the trials, by their size.

    Raises:
        ConfigError: the config cannot be trained, also with its own batch size.
    """
    config = config_of(file, overrides).replace(accum_steps=1)
    import_runner(str(config.runner))  # once, before the forks
    trials: dict[int, BatchTrial] = {}

    def attempt(size: int) -> BatchTrial:
        expected = _expected(trials, size)
        available = None if is_on_gpu else _available_bytes()
        if expected is not None and available is not None and expected > available * _HEADROOM:
            trial = BatchTrial(size, failed=f"would take {expected / 1e9:.1f} of {available / 1e9:.1f} GB")
        else:
            trial = _tried(config, size, count, is_first=not any(t.failed is None for t in trials.values()))
        trials[size] = trial
        watch(trial)
        return trial

    size, most = config.dataloader.batch_size, _samples(config, largest)
    is_on_gpu = _in_a_process(_on_gpu, config)
    if attempt(size).failed is not None:
        raise ConfigError(
            f"dataloader.batch_size={size}, which the search begins with, does not fit: {trials[size].failed}; "
            "begin with a smaller one"
        )
    if size > 1:  # two sizes tell what a larger one will take
        attempt(size // 2)
    while size * 2 <= most and attempt(size * 2).failed is None:
        size *= 2
    if size * 2 in trials:
        _narrow(size, size * 2, attempt)
    return [trials[size] for size in sorted(trials)]


def _narrow(fits: int, too_large: int, attempt: Callable[[int], BatchTrial]) -> None:
    while too_large / fits > _CLOSE and too_large - fits > 1:
        middle = (fits + too_large) // 2
        if attempt(middle).failed is None:
            fits = middle
        else:
            too_large = middle


def _on_gpu(config: Config, folder: str) -> bool:
    return bool(runner_for_trial(config, folder).device.type != "cpu")


def _samples(config: Config, largest: int | None) -> int:
    """Return the largest size to try: the samples of the data set, where it says how many it has.

    Raises:
        ConfigError: the trained split has a batch size of its own, which the search would not change.
    """
    answer = _in_a_process(_count_samples, config)
    known = [number for number in (answer, largest) if number is not None]
    return min(known, default=sys.maxsize)


def _count_samples(config: Config, folder: str) -> int | None:
    runner = runner_for_trial(config, folder)
    split = next(name for name in runner.datasets | runner.dataloaders if name.startswith("train"))
    if split not in runner.datasets:
        raise ConfigError(f"the runner makes the loader of split {split!r} itself, and so its batch size")
    if runner.batch_size != config.dataloader.batch_size:
        raise ConfigError(
            f"dataloader.{split}.batch_size is stated, and the search changes dataloader.batch_size: state that alone"
        )
    try:
        return len(runner.datasets[split])
    except TypeError:
        return None


def _tried(config: Config, size: int, count: int, *, is_first: bool) -> BatchTrial:
    sized = config.replace(dataloader={**config.canonical().get("dataloader", {}), "batch_size": size})
    try:
        rate, memory = _in_a_process(_time, sized, count)
    except MemoryError as error:
        return BatchTrial(size, failed=str(error))
    except DanLingError as error:
        if is_first:
            raise
        return BatchTrial(size, failed=str(error))  # what trained with a smaller size, and not with this one
    return BatchTrial(size, rate, memory)


def _time(config: Config, folder: str, count: int) -> tuple[float, int]:
    import torch

    torch.set_num_threads(config.threads_per_rank)
    runner = runner_for_trial(config, folder)
    is_cuda = runner.device.type == "cuda"
    began, samples, counted = 0.0, 0, 0
    for index, _ in enumerate(steps(runner, _WARM_UP + count), 1):
        if is_cuda:
            torch.cuda.synchronize()
        made = runner.meters.count - counted if runner.meters.count >= counted else runner.meters.count
        counted = runner.meters.count
        if index == _WARM_UP:
            began = time.perf_counter()
        elif index > _WARM_UP:
            samples += made  # a last batch is a smaller one
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    return samples / seconds, torch.cuda.max_memory_allocated() if is_cuda else peak


def _in_a_process(work: Callable[..., Any], config: Config, *values: Any) -> Any:
    """Return what `work` returns in a fork of this process, which has used no GPU: whatever it takes is free again.

    Raises:
        MemoryError: there was none left.
        DanLingError: what `work` raised.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, work, config, values), daemon=False)
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = None
    process.join()
    if answer is None:
        raise MemoryError(f"the process was killed (exit code {process.exitcode}): no memory")
    if isinstance(answer, BaseException):
        raise answer
    return answer[0]


def _answer(pipe: Connection, work: Callable[..., Any], config: Config, values: Sequence[Any]) -> None:
    import torch

    try:
        with tempfile.TemporaryDirectory(prefix="danling-") as folder:
            pipe.send([work(config, folder, *values)])
    except (torch.cuda.OutOfMemoryError, MemoryError):
        pipe.send(MemoryError("out of memory"))
    except DanLingError as error:
        pipe.send(error)
    except Exception as error:
        if "can't allocate memory" in str(error):  # torch's allocator on CPUs
            pipe.send(MemoryError("out of memory"))
        else:
            pipe.send(ConfigError(f"training was tried, and failed: {type(error).__name__}: {error}"))


def _expected(trials: dict[int, BatchTrial], size: int) -> float | None:
    """Return the memory that a size should take, by the two largest that were tried; None without these."""
    known = sorted((t.batch_size, t.memory_bytes) for t in trials.values() if t.memory_bytes is not None)
    if len(known) < 2:
        return None
    (small, less), (large, more) = known[-2:]
    return more + max(more - less, 0) / (large - small) * (size - large)


def _available_bytes() -> int | None:
    """Return what memory this machine has left for a process, or None where it does not say."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
