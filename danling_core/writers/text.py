"""The text log: the logger "danling", heard from one rank, on the console and in a file."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TextIO

from danling_core.results.formatting import (
    format_duration,
    format_epoch_result,
    format_metrics,
    format_step_result,
)
from danling_core.writers.protocol import Event, told_end

LOGGER_NAME = "danling"

_open_logs: list[TextLog] = []
_level_and_propagate = (logging.NOTSET, True)


class TextLog:
    """Puts handlers on the logger "danling" while it is open, and tells events there as lines.

    The root logger is never touched. Between `open` and `close` records do not go on to it; after the last
    `close` the logger is as it was found. One rank is heard in full; from the others come only warnings and
    worse, each beginning with "[rank 1]".

    Args:
        path: a local file to append to; its folder is made. Give it to the main rank only.
        rank: of this process.
        process: the rank that is heard; may be changed later.
        console: whether to write to stderr (whatever `sys.stderr` is at that moment).
        level: the least level that is written.
        total: where the index of results ends (`epoch_end`, or `step_end` in step mode), if known.
        label: what that index counts.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        rank: int = 0,
        process: int = 0,
        console: bool = True,
        level: int | str = logging.INFO,
        total: int | None = None,
        label: str = "epoch",
    ) -> None:
        self.path = None if path is None else os.fspath(path)
        self.rank = rank
        self.process = process
        self.console = console
        self.level: int = logging.getLevelNamesMapping()[level.upper()] if isinstance(level, str) else level
        self.total = total
        self.label = label
        self.logger = logging.getLogger(LOGGER_NAME)
        self._handlers: list[logging.Handler] = []

    def open(self) -> TextLog:
        """Add the handlers; returns self. Does nothing where it is open."""
        global _level_and_propagate
        if self in _open_logs:
            return self
        handlers: list[logging.Handler] = [_StderrHandler()] if self.console else []
        if self.path is not None:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            handlers.append(logging.FileHandler(self.path, encoding="utf-8"))
        if not _open_logs:
            _level_and_propagate = self.logger.level, self.logger.propagate
            self.logger.propagate = False
        for handler in handlers:
            handler.setLevel(self.level)
            handler.setFormatter(_RankFormatter(self))
            handler.addFilter(self._is_heard)
            self.logger.addHandler(handler)
        self._handlers = handlers
        _open_logs.append(self)
        self.logger.setLevel(min(log.level for log in _open_logs))
        return self

    def close(self) -> None:
        """Remove the handlers. A second call does nothing."""
        if self not in _open_logs:
            return
        _open_logs.remove(self)
        while self._handlers:
            handler = self._handlers.pop()
            self.logger.removeHandler(handler)
            handler.close()
        if _open_logs:
            self.logger.setLevel(min(log.level for log in _open_logs))
        else:
            level, self.logger.propagate = _level_and_propagate
            self.logger.setLevel(level)

    def flush(self) -> None:
        """Flush the handlers."""
        for handler in self._handlers:
            handler.flush()

    def __enter__(self) -> TextLog:
        return self.open()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def on_event(self, event: Event) -> None:
        """Log the event as a line, at the level that its kind deserves."""
        level, line = describe(event, total=self.total, label=self.label)
        self.logger.log(level, "%s", line)

    def _is_heard(self, record: logging.LogRecord) -> bool:
        return self.rank == self.process or record.levelno >= logging.WARNING


def describe(event: Event, *, total: int | None = None, label: str = "epoch") -> tuple[int, str]:
    """Return an event as a logging level and a line; `total` and `label` as in `format_epoch_result`."""
    kind = event.get("event")
    if kind == "progress":
        return logging.INFO, _describe_progress(event)
    if kind == "epoch_finished":
        line = format_epoch_result(
            event["result"], event.get("index"), total, is_best=bool(event.get("is_best")), label=label
        )
        return logging.INFO, f"{line} [{format_duration(event['seconds'])}]" if "seconds" in event else line
    if kind == "evaluate_finished":
        parts = [f"{split} {format_metrics(metrics)}" for split, metrics in event["result"].items()]
        return logging.INFO, " | ".join(["evaluation", *parts])
    if kind == "run_started":
        return logging.INFO, _describe_start(event)
    if kind == "checkpoint_committed":
        names = ", ".join(event.get("names", ()))
        return logging.DEBUG, f"checkpoint {event.get('record')} committed{f' as {names}' if names else ''}"
    if kind == "failed":
        where = f" on rank {event['rank']}" if event.get("rank") is not None else ""
        return logging.ERROR, f"failed{where}: {event.get('error')}\n{event.get('traceback') or ''}".rstrip()
    if kind == "interrupted":
        return logging.WARNING, f"interrupted: {event.get('reason')}; run it again to resume"
    if kind == "completed":
        return logging.INFO, _describe_completion(event)
    return logging.DEBUG, f"{kind}"


def _describe_progress(event: Event) -> str:
    values = {name: event[name] for name in ("loss", "samples_per_second") if event.get(name) is not None}
    epoch = event.get("epoch")
    return format_step_result(values, "step" if epoch is None else f"epoch {epoch} step", event.get("step"))


def _describe_start(event: Event) -> str:
    where = f"{event.get('world_size', 1)} x {event.get('device', 'cpu')}"
    resumed = event.get("resumed")
    if not resumed:
        return f"started on {where}"
    step, epoch, record = (resumed.get(name) for name in ("step", "epoch", "record"))
    return f"resumed on {where} from step {step}, epoch {epoch} (checkpoint {record})"


def _describe_completion(event: Event) -> str:
    end, why = told_end(event), (event.get("status") or {}).get("error")
    if end == "complete":
        return "completed"
    return f"did what was asked; the run is {end}{f': {why}' if why else ''}"


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Looks up `sys.stderr` at each record, so that whoever replaces it (a progress bar) gets the lines."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _RankFormatter(logging.Formatter):
    """`2026-11-21T10:44:01Z message`; the level from warnings on; the rank where it is not the heard one."""

    converter = staticmethod(time.gmtime)

    def __init__(self, log: TextLog) -> None:
        super().__init__("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        self._log = log

    def formatMessage(self, record: logging.LogRecord) -> str:
        words = [record.asctime]
        if record.levelno >= logging.WARNING:
            words.append(record.levelname)
        if self._log.rank != self._log.process:
            words.append(f"[rank {self._log.rank}]")
        return " ".join([*words, record.message])
