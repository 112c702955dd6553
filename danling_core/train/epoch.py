"""The epochs of a run, as the training loop sees them, and where training stands inside one.

In step mode an epoch here is a *segment*: the stretch between two evaluations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from danling_core.config import Config
from danling_core.errors import RunInterrupted
from danling_core.results.history import Results
from danling_core.train.progress import Progress

Values = dict[str, Any]


@dataclass
class EpochState:
    """Position inside an epoch, as a checkpoint holds it.

    Args:
        trained: results of the splits that were trained already.
        is_whole: whether the segment that ended last also ended a pass over the data (or `steps_per_epoch`).
        split: the split that is being trained, or None.
        iters_before, steps_before: the counters when that split began.
        ended: why training is over after this epoch, where somebody asked for that.
    """

    trained: dict[str, Values] = field(default_factory=dict)
    is_whole: bool = True
    split: str | None = None
    iters_before: int = 0
    steps_before: int = 0
    ended: str | None = None

    def state_dict(self) -> dict[str, Any]:
        ended = {} if self.ended is None else {"ended": self.ended}
        return {"trained": dict(self.trained), "is_whole": self.is_whole, **ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trained, self.is_whole = dict(state["trained"]), state["is_whole"]
        self.ended = state.get("ended")

    @property
    def is_begun(self) -> bool:
        """Return whether something of the epoch is done, and its result is not reported yet."""
        return self.split is not None or bool(self.trained)


@dataclass
class Epoch:
    """One epoch of a run: what is left to do in it, and what it came to.

    Args:
        number: completed epochs when it began.
        result: `{split: {metric: value}}`; the training loop fills it in.
        seconds: how long it took; known at its end.
        completed: the number of the epoch that ended with it; None where a segment of step mode ended inside one.
    """

    number: int
    result: dict[str, Values]
    seconds: float = 0.0
    completed: int | None = None
    _to_train: Callable[[], Iterator[str]] = lambda: iter(())
    _to_evaluate: Callable[[], Iterator[str]] = lambda: iter(())

    def left_to_train(self) -> Iterator[str]:
        """Yield the splits that are still to be trained; a resume inside the epoch has done the others."""
        return self._to_train()

    def left_to_evaluate(self) -> Iterator[str]:
        """Yield the splits to evaluate, where that is due; a resume repeats all of them or none."""
        return self._to_evaluate()


class Epochs:
    """The epochs that are left of a run.

    Args:
        config: with `patience` and `evaluate_every`.
        progress, history, state: how far the run is; changed by others.
        train_splits, evaluate_splits: what each epoch trains and evaluates, in this order.
        is_complete: whether nothing is left to do, whatever the counters say.
        emit: reports an event.
        on_begin: called when an epoch begins, or goes on.
        before_evaluation, after_evaluation: called around the evaluations that end an epoch; the second one only if
            no stop came in between.
        on_interrupt: saves where the run stands inside an epoch. Collective.
        on_end: reports the result of an epoch. Collective.
    """

    def __init__(
        self,
        config: Config,
        progress: Progress,
        history: Results,
        state: EpochState,
        *,
        train_splits: Sequence[str] = (),
        evaluate_splits: Sequence[str] = (),
        is_complete: bool = False,
        emit: Callable[..., None] = lambda kind, **fields: None,
        on_begin: Callable[[], None] = lambda: None,
        before_evaluation: Callable[[], None] = lambda: None,
        after_evaluation: Callable[[], None] = lambda: None,
        on_interrupt: Callable[[], None] = lambda: None,
        on_end: Callable[[Epoch], None] = lambda epoch: None,
    ) -> None:
        self._config = config
        self._progress = progress
        self._history = history
        self._state = state
        self._train_splits = train_splits
        self._evaluate_splits = evaluate_splits
        self._is_complete = is_complete
        self._emit = emit
        self._on_begin = on_begin
        self._before_evaluation = before_evaluation
        self._after_evaluation = after_evaluation
        self._on_interrupt = on_interrupt
        self._on_end = on_end

    @property
    def are_over(self) -> bool:
        """Return whether training is over, the last evaluation included."""
        return self._is_complete or is_trained(self._config, self._progress, self._history, self._state)

    @contextmanager
    def next(self) -> Iterator[Epoch]:
        """Begin the next epoch, or go on with one that was cut short; report it at its end. Collective.

        A stop in its middle saves it, and goes on up.
        """
        progress, began = self._progress, time.monotonic()
        epoch = Epoch(progress.epochs, dict(self._state.trained))
        epoch._to_train = lambda: self._left_to_train(epoch)
        epoch._to_evaluate = lambda: self._left_to_evaluate(epoch)
        index = epoch.number if progress.by_epoch else None
        self._emit("epoch_began", epoch=epoch.number, index=index, step=progress.steps)
        try:
            self._on_begin()
            yield epoch
        except RunInterrupted:
            self._on_interrupt()
            raise
        self._state.trained = {}
        epoch.seconds = time.monotonic() - began
        self._on_end(epoch)

    def _left_to_train(self, epoch: Epoch) -> Iterator[str]:
        for split in self._train_splits:
            if split not in epoch.result and (self._progress.by_epoch or not self._progress.finished):
                yield split
                self._state.trained[split] = epoch.result[split]

    def _left_to_evaluate(self, epoch: Epoch) -> Iterator[str]:
        number = epoch.number + 1
        is_due = number % self._config.evaluate_every == 0 or number >= self._progress.end
        if is_due or not self._progress.by_epoch:
            self._before_evaluation()
            yield from self._evaluate_splits
            self._after_evaluation()


def is_trained(config: Config, progress: Progress, history: Results, state: EpochState) -> bool:
    """Return whether training is over: at its end, out of patience or ended by request, and no epoch was cut short."""
    if state.trained:
        return False
    return progress.finished or state.ended is not None or history.should_stop(config.patience)
