"""Conversion of iters, steps and epochs into each other, where the length of a pass is known."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lengths:
    """The length of one pass over the training data.

    A pass whose batches do not fill its last accumulation window ends with a shorter one, so that iters are
    not simply steps times `accum_steps`.

    Args:
        iters: batches of a pass; None where the data is unsized.
        steps: accumulation windows of a pass; None where the data is unsized.
        accum_steps: iters in a full window.
        steps_per_epoch: what the config says an epoch is; None: a pass.
    """

    iters: int | None
    steps: int | None
    accum_steps: int
    steps_per_epoch: int | None = None

    @property
    def epoch_steps(self) -> int | None:
        """Return steps in an epoch, None where that is not known."""
        return self.steps if self.steps_per_epoch is None else self.steps_per_epoch

    def steps_to_iters(self, steps: int) -> int:
        """Return iters that so many steps take, from the beginning; of unsized data, as if every window were full."""
        if self.iters is None or not self.steps:
            return steps * self.accum_steps
        passes, rest = divmod(steps, self.steps)
        return passes * self.iters + min(rest * self.accum_steps, self.iters)

    def iters_to_steps(self, iters: int) -> int:
        """Return steps that so many iters make, a last and shorter window included."""
        if not self.iters or self.steps is None:
            return -(-iters // self.accum_steps)
        passes, rest = divmod(iters, self.iters)
        return passes * self.steps + min(-(-rest // self.accum_steps), self.steps)
