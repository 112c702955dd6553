"""Meaning of signals to a command that trains."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from danling_core.process_tree import STOP_SIGNALS


class StoppedBySignal(BaseException):
    """A signal that means to stop came before a run had begun.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """The signals of a session: they end it while it comes up, and are noted while its runs are at work.

    While it closes, only Ctrl-C is heeded. A signal that is ignored, such as SIGHUP under nohup, stays so.
    """

    def __init__(self) -> None:
        self.noted: list[int] = []
        """The numbers of those that came while the runs were at work, in order."""
        self._is_noting = False
        self._is_closing = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, *STOP_SIGNALS):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._take)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def being_noted(self) -> Iterator[None]:
        """Note inside the block what comes, and close after it."""
        self._is_noting = True
        try:
            yield
        finally:
            self._is_noting, self._is_closing = False, True

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._is_noting:
            self.noted.append(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        elif not self._is_closing:
            raise StoppedBySignal(number)
