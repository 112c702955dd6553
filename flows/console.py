"""What the terminal shows while runs train: a bar and a line per epoch, or a line per finished run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from danling_core.formatting import format_duration, format_epoch_result
from flows.leaderboard import flat_metrics
from flows.outcome import RunOutcome, describe


class RunConsole:
    """Shows one run: a bar that its events move (on a terminal), and a line for each epoch.

    Args:
        epochs: how many there will be, where that is known.
    """

    def __init__(self, epochs: int | None = None, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._bar = _bar(self._console, TextColumn("{task.percentage:>3.0f} %"))
        self._task: TaskID | None = None
        self._epochs = epochs

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """Draw the bar inside."""
        with self._bar if self._console.is_terminal else contextlib.nullcontext():
            self._task = self._bar.add_task("starting", total=1.0)
            yield

    def on_event(self, name: str, event: dict[str, Any]) -> None:
        """One event of the run."""
        kind = event["event"]
        if kind == "run_started":
            self._print(_started(name, event))
        elif kind == "progress":
            self._move(event.get("progress"), f"epoch {event.get('epoch')}")
        elif kind == "epoch_finished":
            self._print(_epoch_line(event, self._epochs))
        elif kind == "evaluate_began":
            self._move(1.0, "evaluating")
        elif kind == "evaluate_finished":
            self._print(format_epoch_result(event.get("result", {}), label="evaluation"))

    def on_outcome(self, outcome: RunOutcome) -> None:
        """The run has ended."""
        if outcome.status == "complete":
            self._print(f"{outcome.key} {describe(outcome)} ({format_duration(outcome.seconds)})")
            if outcome.skipped:
                self._print("  ".join(f"{k} {v:.4g}" for k, v in flat_metrics(outcome.evaluation).items()))
        if outcome.folder is not None:
            self._print(f"folder {outcome.folder}")

    def _move(self, progress: float | None, description: str) -> None:
        if self._task is not None and progress is not None:
            self._bar.update(self._task, completed=progress, description=description)

    def _print(self, line: str) -> None:
        if line:
            self._console.print(line, markup=False)


class GroupConsole:
    """Shows many runs: a line for each that has ended, and (on a terminal) one bar for all.

    Args:
        total: how many runs there are.
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._total = total
        self._ended = 0
        self._lock = threading.Lock()
        self._bar = _bar(self._console, MofNCompleteColumn())
        self._task: TaskID | None = None
        self._progress: dict[str, float] = {}

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """Draw the bar inside."""
        with self._bar if self._console.is_terminal else contextlib.nullcontext():
            self._task = self._bar.add_task("runs", total=self._total)
            yield

    def on_event(self, name: str, event: dict[str, Any]) -> None:
        """One event of a run."""
        if event["event"] == "progress" and isinstance(event.get("progress"), float):
            with self._lock:
                self._progress[name] = event["progress"]
                self._move()

    def on_outcome(self, outcome: RunOutcome) -> None:
        """A run has ended."""
        with self._lock:
            self._ended += 1
            self._progress.pop(outcome.key, None)
            self._move()
            how = (
                f"{outcome.status}: {describe(outcome)}"
                if outcome.status != "complete"
                else describe(outcome)
            )
            line = f"[{self._ended}/{self._total}] {outcome.key} {how} ({format_duration(outcome.seconds)})"
            self._console.print(line, markup=False)

    def _move(self) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=self._ended + sum(self._progress.values()))


def _bar(console: Console, *extra: Any) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), *extra, TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _started(name: str, event: dict[str, Any]) -> str:
    ranks = event.get("world_size", 1)
    resumed = event.get("resumed")
    whence = f", resumed at epoch {resumed.get('epoch')}" if isinstance(resumed, dict) else ""
    return f"{name}: {ranks} rank{'' if ranks == 1 else 's'} on {event.get('device')}{whence}"


def _epoch_line(event: dict[str, Any], epochs: int | None) -> str:
    line = format_epoch_result(
        event.get("result", {}), event["epoch"], epochs, is_best=bool(event.get("is_best"))
    )
    return f"{line} ({event.get('seconds', 0.0):.3g} s)"
