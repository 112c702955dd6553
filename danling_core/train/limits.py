"""Beginning and end of a run in iters, steps and epochs, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from danling_core.config import Config
from danling_core.train.progress import Progress

if TYPE_CHECKING:
    from danling_core.data.lengths import Lengths


class Limits:
    """The one end that the config states, in all three units.

    Args:
        config: states `epoch_end`, `step_end` or `iter_end`.
        progress: the counters.
        lengths: returns the length of a pass, as far as it is known. Asked again each time.
    """

    def __init__(self, config: Config, progress: Progress, lengths: Callable[[], Lengths]) -> None:
        self._config = config
        self._progress = progress
        self._lengths = lengths

    @property
    def steps_per_epoch(self) -> int | None:
        return self._lengths().epoch_steps

    @property
    def step_end(self) -> int | None:
        config, per_epoch = self._config, self.steps_per_epoch
        if config.step_end is not None:
            return config.step_end
        if config.iter_end is not None:
            return self._lengths().iters_to_steps(config.iter_end)
        return None if config.epoch_end is None or per_epoch is None else config.epoch_end * per_epoch

    @property
    def iter_end(self) -> int | None:
        if self._config.iter_end is not None:
            return self._config.iter_end
        return None if self.step_end is None else self._lengths().steps_to_iters(self.step_end)

    @property
    def epoch_end(self) -> int | None:
        if self._config.epoch_end is not None:
            return self._config.epoch_end
        if self.step_end is None or not self.steps_per_epoch:
            return None
        return -(-self.step_end // self.steps_per_epoch)

    @property
    def total_iters(self) -> int | None:
        return _distance(self._progress.iter_begin, self.iter_end)

    @property
    def total_steps(self) -> int | None:
        return _distance(self._progress.step_begin, self.step_end)

    @property
    def total_epochs(self) -> int | None:
        return _distance(self._progress.epoch_begin, self.epoch_end)

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return self._progress.fraction(self.steps_per_epoch)


def _distance(begin: int, end: int | None) -> int | None:
    return None if end is None else end - begin
