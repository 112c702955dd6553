"""Moments of a training at which a callback is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Callback:
    """Base of callbacks: override the moments that you want.

    Every rank calls every callback, in the order in which they are listed: those of the config first. One with
    `state_dict` and `load_state_dict` is saved with every checkpoint, each rank's own state, and restored by a resume.
    `runner` is the runner; whatever it offers may be used. What a moment raises ends the run, and names the callback.
    """

    def on_fit_start(self, runner: Any) -> None:
        """Begin: set up and resumed, before the first step of this process."""

    def on_fit_end(self, runner: Any) -> None:
        """End: training is over. Not called where it was stopped or has failed."""

    def on_epoch_start(self, runner: Any) -> None:
        """Begin epoch `runner.epochs`, or in step mode a segment; again where a resume goes on inside one."""

    def on_epoch_end(self, runner: Any, result: Mapping[str, Any]) -> None:
        """End epoch `runner.epochs`, or a segment, before it is counted and saved.

        `result` is `{split: {metric: value}}`, equal on all ranks; `runner.is_best` and `runner.scores` know of it.
        `runner.end_training(reason)` makes it the last one.
        """

    def on_step_end(self, runner: Any) -> None:
        """End an optimizer step: `runner.steps` counts it already. Whatever it does is done in every step."""

    def on_evaluate_start(self, runner: Any, split: str) -> None:
        """Begin to evaluate a split: `runner.model` is the one that is evaluated, in eval mode."""

    def on_evaluate_end(self, runner: Any, split: str, result: Mapping[str, Any]) -> None:
        """End the evaluation of a split; `result` is `{metric: value}` over all ranks."""

    def on_save(self, runner: Any, names: Sequence[str]) -> None:
        """Begin a save: the state is taken when this returns. `names` are the pointers that will move to it."""

    def on_exception(self, runner: Any, error: BaseException) -> None:
        """Take note of what ends training early: an error, a stop (`RunInterrupted`), a Ctrl-C. It goes on up."""
