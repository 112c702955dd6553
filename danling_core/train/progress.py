"""Counters of completed work, and the one end that drives the loop."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from danling_core.config import Config

Unit = Literal["iter", "step", "epoch"]


@dataclass
class Progress:
    """Counters of completed work. They live in the run's state, never in its config, and survive a resume.

    An *iter* is one forward and backward, a *step* one optimizer update (attempted), an *epoch* one pass over
    the data (or `steps_per_epoch` steps). All count completed work.

    Args:
        unit: which of the three drives the loop.
        end: where that one ends.
        is_step_counted: the step of the window under way is counted already.
    """

    unit: Unit
    end: int
    iters: int = 0
    steps: int = 0
    epochs: int = 0
    iter_begin: int = 0
    step_begin: int = 0
    epoch_begin: int = 0
    steps_in_epoch: int = 0
    seconds: float = 0.0
    is_step_counted: bool = False

    @classmethod
    def of(cls, config: Config) -> Self:
        """Make the counters of a new run, with the one end that its config states."""
        ends: dict[Unit, int | None] = {
            "epoch": config.epoch_end,
            "step": config.step_end,
            "iter": config.iter_end,
        }
        return cls(*next((unit, end) for unit, end in ends.items() if end is not None))

    @property
    def by_epoch(self) -> bool:
        """Return whether results are numbered by epochs; else, in step mode, by completed steps."""
        return self.unit == "epoch"

    def count_iter(self) -> None:
        """Count one forward and backward pass."""
        self.iters += 1

    def count_step(self) -> None:
        """Count the optimizer step of the window under way; a second call for the same one does nothing."""
        if not self.is_step_counted:
            self.steps += 1
            self.steps_in_epoch += 1
            self.is_step_counted = True

    def end_window(self) -> None:
        """End the window: its step counts, also where `train_step` left it out."""
        self.count_step()
        self.is_step_counted = False

    def count_epoch(self) -> None:
        """Count one pass over the data."""
        self.epochs += 1
        self.steps_in_epoch = 0

    @property
    def done(self) -> int:
        """Completed work in the unit that drives the loop."""
        return {"iter": self.iters, "step": self.steps, "epoch": self.epochs}[self.unit]

    @property
    def begin(self) -> int:
        return {"iter": self.iter_begin, "step": self.step_begin, "epoch": self.epoch_begin}[self.unit]

    @property
    def finished(self) -> bool:
        return self.done >= self.end

    @property
    def total(self) -> int:
        return self.end - self.begin

    def fraction(self, steps_per_epoch: int | None = None) -> float:
        """Share of the run that is done, in [0, 1]; finer than an epoch where the epoch's length is known."""
        if self.total <= 0:
            return 1.0
        within = 0.0
        if self.unit == "epoch" and steps_per_epoch:
            within = self.steps_in_epoch / steps_per_epoch
        return min(max((self.done + within - self.begin) / self.total, 0.0), 1.0)

    def state_dict(self) -> dict[str, Any]:
        state = asdict(self)
        for name in ("unit", "end", "is_step_counted"):
            del state[name]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the counters; the end stays what the config says, so that a run may be extended."""
        for name, value in state.items():
            setattr(self, name, value)
