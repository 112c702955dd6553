"""A progress bar on the terminal, driven by events alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from danling_core.results.formatting import format_duration, format_value
from danling_core.writers.notebook_bar import NotebookBar, is_notebook
from danling_core.writers.protocol import TERMINAL, Event


class ProgressBar:
    """Shows `epoch 3/30`, steps, loss, samples per second and the time left, on stderr or in a notebook's cell.

    For the main rank under torchrun, or for a driver that follows the event log. Draws nothing where stderr
    is not a terminal. While it is shown, lines written to `sys.stderr` appear above it; that ends with
    `close`.

    Args:
        epochs: how many epochs the run has, where known.
        steps: how many steps the run has, where known.
        enabled: True or False to decide, None to draw on a terminal or in a notebook only.
        description: what stands before the bar, such as the run's name.
        min_seconds: the least time between two drawings.
        console: a `rich.console.Console` to draw on instead of stderr.
        clock: monotonic seconds, for tests.
    """

    def __init__(
        self,
        epochs: int | None = None,
        steps: int | None = None,
        *,
        enabled: bool | None = None,
        description: str = "",
        min_seconds: float = 0.1,
        console: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.epochs = epochs
        self.steps = steps
        self.description = description
        self.enabled = sys.stderr.isatty() or is_notebook() if enabled is None else enabled
        self._min_seconds = min_seconds
        self._console = console
        self._clock = clock
        self._bar: Any = None
        self._task: Any = None
        self._epoch: int | None = None
        self._anchor: tuple[float, float] | None = None
        self._drawn_at = float("-inf")

    def begin(self, status: str) -> None:
        """Draw the bar before the first event, with these words."""
        if self.enabled and self._bar is None:
            self._bar, self._task = self._start()
            self._bar.update(self._task, status=status)
            self._bar.refresh()

    def on_event(self, event: Event) -> None:
        """Draw what the event says about the run's progress, at most once in `min_seconds`."""
        if not self.enabled:
            return
        kind = event.get("event")
        if kind == "epoch_began":
            self._epoch = event.get("epoch")
        elif kind == "progress":
            self._epoch = event.get("epoch", self._epoch)
            self._draw(float(event["progress"]), self._status(event), event.get("time"))
        elif kind == "evaluate_began" and self._bar is not None:
            self._bar.update(self._task, completed=1.0, status="evaluating", left="")
            self._bar.refresh()
        elif kind in TERMINAL:
            if kind == "completed" and self._bar is not None:
                self._drawn_at = float("-inf")
                self._draw(1.0, "done", event.get("time"))
            self.close()

    def flush(self) -> None:
        """Draw now."""
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Take the bar away and give stderr back. A second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _draw(self, progress: float, status: str, event_time: float | None) -> None:
        now = self._clock()
        moment = now if event_time is None else float(event_time)
        if self._anchor is None:
            self._anchor = (moment, progress)
        if now - self._drawn_at < self._min_seconds:
            return
        self._drawn_at = now
        if self._bar is None:
            self._bar, self._task = self._start()
        self._bar.update(self._task, completed=progress, status=status, left=self._left(moment, progress))
        self._bar.refresh()

    def _start(self) -> tuple[Any, Any]:
        if self._console is None and is_notebook():
            return NotebookBar(self.description), None

        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=self._console or Console(stderr=True),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
        )
        bar.start()
        return bar, bar.add_task(self.description, total=1.0, status="", left="")

    def _status(self, event: Event) -> str:
        parts = []
        if self._epoch is not None:
            parts.append(f"epoch {self._epoch}" + ("" if self.epochs is None else f"/{self.epochs}"))
        if event.get("step") is not None:
            parts.append(f"step {event['step']}" + ("" if self.steps is None else f"/{self.steps}"))
        if event.get("loss") is not None:
            parts.append(f"loss {format_value(event['loss'])}")
        if event.get("samples_per_second") is not None:
            parts.append(f"{float(event['samples_per_second']):.0f} samples/s")
        return " | ".join(parts)

    def _left(self, moment: float, progress: float) -> str:
        """Time left at the pace since the first event seen: what was done before a resume does not count."""
        if self._anchor is None:
            return ""
        seconds, done = moment - self._anchor[0], progress - self._anchor[1]
        if seconds <= 0 or done <= 0:
            return ""
        return f"{format_duration((1.0 - progress) * seconds / done)} left"
