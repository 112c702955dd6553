"""Terminal output while runs train: a bar and a line per epoch, or a line per finished run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from danling_core.config import Config
from danling_core.results.formatting import format_duration, format_epoch_result
from danling_core.writers.progress_bar import ProgressBar
from flows.leaderboard import flat_metrics
from flows.naming import counted
from flows.outcome import RunOutcome, describe


class RunConsole:
    """Shows one run: a bar that its events move (on a terminal, unless the config says no), a line per result.

    Args:
        config: of the run.
        console: to draw on instead of stdout.
    """

    def __init__(self, config: Config, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._bar = ProgressBar(
            config.epoch_end,
            config.step_end,
            enabled=config.progress_bar and self._console.is_terminal,
            console=self._console,
        )
        self._unit, self._total = counted(config)

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """Draw the bar inside."""
        self._bar.begin("starting")
        try:
            yield
        finally:
            self._bar.close()

    def on_event(self, name: str, event: dict[str, Any]) -> None:
        """One event of the run."""
        kind = event["event"]
        if kind == "run_started":
            self._print(self._started(name, event))
        elif kind == "epoch_finished":
            self._print(self._line(event))
        elif kind == "evaluate_finished":
            self._print(format_epoch_result(event.get("result", {}), label="evaluation"))
        self._bar.on_event(event)

    def on_outcome(self, outcome: RunOutcome) -> None:
        """Show that the run has ended."""
        self._bar.close()
        if outcome.status == "complete":
            self._print(f"{outcome.key} {describe(outcome)} ({format_duration(outcome.seconds)})")
            if outcome.skipped:
                self._print("  ".join(f"{k} {v:.4g}" for k, v in flat_metrics(outcome.evaluation).items()))
        if outcome.folder is not None:
            self._print(f"folder {outcome.folder}")

    def _started(self, name: str, event: dict[str, Any]) -> str:
        ranks = event.get("world_size", 1)
        resumed = event.get("resumed")
        whence = f", resumed at {self._unit} {resumed.get(self._unit)}" if isinstance(resumed, dict) else ""
        return f"{name}: {ranks} rank{'' if ranks == 1 else 's'} on {event.get('device')}{whence}"

    def _line(self, event: dict[str, Any]) -> str:
        is_best = bool(event.get("is_best"))
        line = format_epoch_result(
            event["result"], event["index"], self._total, is_best=is_best, label=self._unit
        )
        return f"{line} ({event.get('seconds', 0.0):.3g} s)"

    def _print(self, line: str) -> None:
        if line:
            self._console.print(line, markup=False)


class GroupConsole:
    """Shows many runs: a line for each that has ended, and one bar for all (on a terminal, unless a config says no).

    Args:
        configs: of the runs.
        console: to draw on instead of stdout.
    """

    def __init__(self, configs: Sequence[Config], console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._total = len(configs)
        self._is_bar_shown = self._console.is_terminal and all(config.progress_bar for config in configs)
        self._ended = 0
        self._lock = threading.Lock()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task: TaskID | None = None
        self._progress: dict[str, float] = {}

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """Draw the bar inside."""
        with self._bar if self._is_bar_shown else contextlib.nullcontext():
            self._task = self._bar.add_task("runs", total=self._total)
            yield

    def on_event(self, name: str, event: dict[str, Any]) -> None:
        """One event of a run."""
        if event["event"] == "progress" and isinstance(event.get("progress"), float):
            with self._lock:
                self._progress[name] = event["progress"]
                self._move()

    def on_outcome(self, outcome: RunOutcome) -> None:
        """Show that a run has ended."""
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
