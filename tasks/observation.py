"""Read a run's events as openings and closings of its stages, whoever shows them. Knows no Prefect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from danling_core.writers.protocol import TERMINAL

Event = dict[str, Any]


class Observation:
    """Events of a run so far, and the next one.

    A stage opens with `epoch_began` or `evaluate_began` and closes with the event that finishes it. After a
    restart the ranks repeat what they had done since the last checkpoint: what is finished opens no more, and
    must end in the same values as before. A stage is known by the index of its result: the epoch, or in step mode
    the steps at its end, which are not known when it opens (its index is None then, and its `step` counts).

    Args:
        events: the run's events, in order; ends when the worker group has ended.
        listen: is given each event as it is read, before anything else happens with it.
        on_difference: called when a repeated stage ended in other values than before.
        on_cut_off: called at once with what ended the reading of a stage.
    """

    def __init__(
        self,
        events: Iterator[Event],
        listen: Callable[[Event], None] = lambda event: None,
        on_difference: Callable[[str], None] = lambda message: None,
        on_cut_off: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._events = events
        self._listen = listen
        self._on_difference = on_difference
        self._on_cut_off = on_cut_off
        self._put_back: Event | None = None
        self.finished: dict[int, Event] = {}  # by index
        self.terminal: Event | None = None
        self.cut_off: BaseException | None = None
        """Exit that ended the reading of a stage, such as a cancellation: to be raised once the stage is shown as
        cancelled."""

    def next_opening(self) -> Event | None:
        """Read on to the event that opens the next stage; None when the run has ended."""
        while (event := self._next()) is not None:
            if event["event"] == "evaluate_began" or self._opens_epoch(event):
                return event
        return None

    def until_closed(self, opening: Event, last: int | None = None) -> Event | None:
        """Read on to the event that closes the stage; None when the run ended, or went on, without it, or at a
        `cut_off`.

        Args:
            opening: what `next_opening` returned.
            last: index of the last epoch of a span that is one stage; the event that closes the newest of them is
                returned.
        """
        try:
            closing = self._read_until_closed(opening)
            while closing is not None and last is not None and closing["index"] < last:
                following = self.next_opening()
                if following is None:
                    break
                if following["event"] != "epoch_began" or following["index"] > last:
                    self._put_back = following
                    break
                closing = self._read_until_closed(following)
            return closing
        except Exception:
            raise
        except BaseException as error:
            self.cut_off = error
            self._on_cut_off(error)
            return None

    def _read_until_closed(self, opening: Event) -> Event | None:
        while (event := self._next()) is not None:
            if opening["event"] == "evaluate_began" and event["event"] == "evaluate_finished":
                return event
            if opening["event"] == "epoch_began":
                if event["event"] == "epoch_finished" and _closes(event, opening):
                    return event
                if event["event"] == "evaluate_began" or _is_later_epoch(event, opening):
                    self._put_back = event
                    return None
        return None

    def _next(self) -> Event | None:
        if self._put_back is not None:
            event, self._put_back = self._put_back, None
            return event
        event_or_end = next(self._events, None)
        if event_or_end is None:
            return None
        self._digest(event_or_end)
        self._listen(event_or_end)
        return event_or_end

    def _digest(self, event: Event) -> None:
        kind = event["event"]
        if kind in TERMINAL:
            self.terminal = event
        elif kind == "run_started":
            self.terminal = None
        elif kind == "epoch_finished":
            before = self.finished.setdefault(event["index"], event)
            if before.get("result") != event.get("result"):
                unit = "epoch" if event["index"] == event["epoch"] else "step"
                self._on_difference(
                    f"{unit} {event['index']} was repeated after a restart and ended in "
                    f"{event.get('result')}, before in {before.get('result')}"
                )

    def _opens_epoch(self, event: Event) -> bool:
        if event["event"] != "epoch_began":
            return False
        if event["index"] is None:
            return event["step"] >= max(self.finished, default=0)
        return event["index"] not in self.finished


def _closes(event: Event, opening: Event) -> bool:
    """Return whether a finished stage is the one that opened: in step mode the first that ends after its beginning."""
    if opening["index"] is None:
        return bool(event["index"] > opening["step"])
    return bool(event["index"] == opening["index"])


def _is_later_epoch(event: Event, opening: Event) -> bool:
    """Return whether another epoch began. In step mode, one that begins inside a stage is its rest after a restart."""
    if event["event"] != "epoch_began" or opening["index"] is None:
        return False
    return bool(event["index"] > opening["index"])
