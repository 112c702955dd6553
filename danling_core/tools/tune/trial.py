"""Steps of a config's training in this process, for a trial: nothing is evaluated, saved or scheduled."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from danling_core.config import Config
from danling_core.errors import ConfigError
from danling_core.tools.apart import runner_apart

_ENDLESS: dict[str, Any] = {
    "epoch_end": 1_000_000_000,
    **dict.fromkeys(
        ("step_end", "iter_end", "steps_per_epoch", "evaluate_interval_steps", "fast_dev_run", "patience")
    ),
}
_PLAIN: dict[str, Any] = {
    **_ENDLESS,
    "average": None,
    "callbacks": (),
    "checkpoint": None,
    "compile": False,
    "ema_decay": None,
    "max_seconds": None,
    "profile": None,
    "sanity_batches": 0,
    "scheduler": None,
}


def config_of(file: str, overrides: Any) -> Config:
    """Return the config in a file, for a trial of its training on one rank.

    Where it asks for several ranks, as many batches make a step here: the gradient is that of all ranks.

    Raises:
        ConfigError: it names no runner.
    """
    stated = Config.load(file, overrides)
    if stated.runner is None:
        raise ConfigError(
            "runner is missing: name your class as 'package.module:Class' or 'path/to/file.py:Class'"
        )
    ranks = 1 if stated.nproc_per_node == "auto" else stated.nproc_per_node
    return stated.replace(accum_steps=stated.accum_steps * ranks * stated.nnodes, nnodes=1)


def runner_for_trial(config: Config, folder: str, **fields: Any) -> Any:
    """Return a runner whose training can be tried; `folder` is a temporary one."""
    runner = runner_apart(config, folder, **{**_PLAIN, **fields})
    runner.callbacks = []
    return runner


def steps(
    runner: Any, count: int, begin: Callable[[int], None] = lambda index: None
) -> Generator[float, None, None]:
    """Make optimizer steps on the first trained split, over several passes if need be; yield the loss of each.

    Args:
        count: of the steps.
        begin: called with the number of the step before each.

    Raises:
        ConfigError: there is nothing to train on.
    """
    split = next((name for name in runner.datasets | runner.dataloaders if name.startswith("train")), None)
    if split is None:
        raise ConfigError("the runner has no split to train on")
    done = 0
    while done < count:
        with runner.training(split) as loop:
            meter = runner.meters
            for window in loop:
                begin(done)
                total, samples = meter.total, meter.count
                for batch, step in window:
                    with runner.in_step(step):
                        runner.train_step(batch)
                meter.flush()
                yield (meter.total - total) / max(meter.count - samples, 1)
                done += 1
                if done >= count:
                    break
