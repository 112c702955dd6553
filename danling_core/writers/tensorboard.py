"""Curves and hyperparameters for TensorBoard."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from danling_core.results.values import flatten
from danling_core.storage.json_safe import dumps
from danling_core.writers.protocol import Event

SCORE_TAG = "score"
"""The scalar that carries a run's final (best) score: one name, so that HParams can compare runs."""

STEPS = "steps"
"""The subfolder of the curves over steps. Where a run is resumed, TensorBoard drops all points of a folder from a step
on: curves over epochs and over steps cannot share one."""

_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.")


class TensorBoardWriter:
    """Writes `{split}/{metric}` at each result's index, the hyperparameters, and at the end the final score.

    In the subfolder `steps`, which TensorBoard shows as a run of its own, it writes `{split}_steps/{name}` at the
    completed steps. TensorBoard and torch are imported when one is made. The hyperparameters are announced without a
    list of their columns: TensorBoard then gathers the columns from all runs, where a list would hide what the first
    run lacks.

    Args:
        log_dir: a local folder.
        config: the run's canonical config; nested sections become dotted names.
        purge_step: on a resume, the first index that will be written (again): earlier points at or beyond it
            are dropped from view. `results.latest_index + 1`, or 0.
        completed_steps: on a resume, those of the checkpoint: later points of the curves over steps are dropped.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        config: Mapping[str, Any] | None = None,
        purge_step: int | None = None,
        completed_steps: int = 0,
    ) -> None:
        self._log_dir = os.fspath(log_dir)
        self._completed_steps = completed_steps
        self._writer: Any = _summary_writer(self._log_dir, purge_step)
        self._steps: Any = None
        self._latest_index = max(0, (purge_step or 0) - 1)
        self._session_end: Any = None
        if config is not None:
            self._announce(hyperparameters(config))

    @property
    def summary(self) -> Any:
        """Return the `SummaryWriter` itself, for a user's own images and histograms; None once closed."""
        return self._writer

    @property
    def steps(self) -> Any:
        """Return the `SummaryWriter` of the curves over steps, opened by the first call; None once closed."""
        if self._steps is None and self._writer is not None:
            self._steps = _summary_writer(os.path.join(self._log_dir, STEPS), self._completed_steps + 1)
        return self._steps

    def on_event(self, event: Event) -> None:
        """Write the scalars of a report inside an epoch, of a finished epoch or evaluation, and the final score."""
        if self._writer is None:
            return
        kind = event.get("event")
        if kind == "progress":
            for tag, value in curves_of(event).items():
                self.steps.add_scalar(tag, value, event["step"])
        elif kind == "epoch_finished":
            self._latest_index = int(event["index"])
            self._add(event["result"])
            self.flush()
        elif kind == "evaluate_finished":
            self._add({"evaluation": event["result"]})
            self.flush()
        elif kind == "completed":
            self._finish(event.get("status") or {})

    def flush(self) -> None:
        """Write what is queued."""
        for writer in (self._writer, self._steps):
            if writer is not None:
                writer.flush()

    def close(self) -> None:
        """Flush and end the writer's thread. A second call does nothing."""
        for writer in (self._writer, self._steps):
            if writer is not None:
                writer.close()
        self._writer = self._steps = None

    def _add(self, result: Mapping[str, Any]) -> None:
        for tag, value in flatten(result).items():
            self._writer.add_scalar(tag, float(value), self._latest_index)

    def _announce(self, values: dict[str, str | float]) -> None:
        from torch.utils.tensorboard.summary import hparams

        _, start, self._session_end = hparams(values, {SCORE_TAG: 0.0})
        self._writer.file_writer.add_summary(start)

    def _finish(self, status: Mapping[str, Any]) -> None:
        score = status.get("best_score")
        if score is not None:
            self._writer.add_scalar(SCORE_TAG, float(score), self._latest_index)
        if self._session_end is not None:
            self._writer.file_writer.add_summary(self._session_end)
        self.flush()


def curves_of(event: Event) -> dict[str, float]:
    """Return what a report inside an epoch says of the curves over steps: `{split}_steps/{name}`."""
    return {f"{event['split']}_steps/{name}": value for name, value in (event.get("curves") or {}).items()}


def _summary_writer(folder: str, purge_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    with _naming_after(folder):
        return SummaryWriter(folder, purge_step=purge_step)


@contextmanager
def _naming_after(folder: str) -> Iterator[None]:
    """Have a file that is made inside sort after those in a folder: TensorBoard reads them in the order of their names.

    A name begins with the time, and the clock of whoever resumes may be behind.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    newest = max((int(match[1]) for name in names if (match := _EVENT_FILE.match(name))), default=0)
    if newest < int(time.time()):
        yield
        return
    from tensorboard.summary.writer import event_file_writer

    before: Any = event_file_writer.time
    event_file_writer.time = SimpleNamespace(time=lambda: newest + 1)
    try:
        yield
    finally:
        event_file_writer.time = before


def hyperparameters(config: Mapping[str, Any]) -> dict[str, str | float]:
    """Return {"optim.lr": 0.001}: numbers as they are, text as it is, everything else as JSON, None left out."""
    values: dict[str, str | float] = {}
    for name, value in flatten(config, splits_vectors=False).items():
        value_: Any = value
        if value_ is None:
            continue
        is_number = isinstance(value_, (int, float)) and not isinstance(value_, bool)
        values[name.replace("/", ".")] = value_ if is_number or isinstance(value_, str) else dumps(value_)
    return values
