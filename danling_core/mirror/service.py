"""The mirror's own process: passes at intervals and on request, until its input ends and everything is up."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TextIO

from danling_core import storage
from danling_core.errors import Fenced, StorageError
from danling_core.mirror.uploader import Uploader

logger = logging.getLogger("danling")

OK, FENCED, INCOMPLETE = 0, 3, 4
_FIRST_WAIT_SECONDS, _MAX_WAIT_SECONDS = 1.0, 60.0
_END = ""


class MirrorService:
    """Answers lines: `sync` with `ok N` once everything that existed then is up, `soon` and `end` with nothing.

    `soon` asks for a pass without the big, slowly growing files. A pass that fails is repeated with a growing
    wait for as long as the input is open: training goes on meanwhile. At `end`, or the end of the input, there
    is a last pass.

    Args:
        uploader: does the passes.
        requests: lines; its end means that the run is over.
        replies: where answers go.
        interval_seconds: between passes without a request.
        drain_seconds: how long the last pass may be repeated after the end of the input.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        uploader: Uploader,
        requests: TextIO,
        replies: TextIO,
        *,
        interval_seconds: float = 30.0,
        drain_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._uploader = uploader
        self._requests = requests
        self._replies = replies
        self._interval_seconds = interval_seconds
        self._drain_seconds = drain_seconds
        self._clock = clock
        self._inbox: queue.Queue[str] = queue.Queue()
        self._asked = 0
        self._answered = 0
        self._is_full = False
        self._is_ended = False

    def run(self) -> int:
        """Serve until the input ends. Returns the exit code: 0 all is up, 3 fenced, 4 store away."""
        threading.Thread(target=self._read_requests, daemon=True).start()
        try:
            self._serve()
            return self._drain()
        except Fenced as error:
            logger.error("the mirror stops: %s", error)
            self._uploader.note_error(error)
            self._reply("fenced")
            return FENCED

    def _serve(self) -> None:
        failures = 0
        while not self._is_ended:
            wait = self._interval_seconds if not failures else _wait_seconds(failures)
            self._take_requests(wait, wakes_early=not failures)
            if not self._is_ended:
                failures = 0 if self._pass(is_final=False) else failures + 1

    def _drain(self) -> int:
        ended, failures = self._clock(), 0
        while not self._pass(is_final=True):
            failures += 1
            if self._clock() - ended + _wait_seconds(failures) > self._drain_seconds:
                return INCOMPLETE
            time.sleep(_wait_seconds(failures))
        self._uploader.make_room()
        return OK

    def _pass(self, is_final: bool) -> bool:
        asked, is_full = self._asked, self._is_full
        try:
            self._uploader.run_pass(is_final=is_final, is_full=is_full)
        except (StorageError, OSError) as error:
            logger.warning("the mirror will try again: %s", error)
            self._uploader.note_error(error)
            storage.reconnect()
            return False
        self._is_full = self._is_full and self._asked > asked
        for number in range(self._answered + 1, asked + 1):
            self._reply(f"ok {number}")
        self._answered = asked
        return True

    def _take_requests(self, wait_seconds: float, wakes_early: bool) -> None:
        """Wait for the interval; a request ends the wait, unless the store has just failed."""
        deadline = self._clock() + wait_seconds
        while not self._is_ended:
            try:
                line = self._inbox.get(timeout=max(0.0, deadline - self._clock()))
            except queue.Empty:
                return
            if line == _END or line.strip() == "end":
                self._is_ended = True
            elif line.strip() == "sync":
                self._asked += 1
                self._is_full = True
            if wakes_early:
                deadline = self._clock()  # and take what else is waiting

    def _read_requests(self) -> None:
        for line in self._requests:
            self._inbox.put(line)
        self._inbox.put(_END)

    def _reply(self, text: str) -> None:
        try:
            self._replies.write(text + "\n")
            self._replies.flush()
        except BrokenPipeError:  # whoever asked is gone; what is local still goes up
            logger.warning("the mirror's answer %r is not read any more", text)


def _wait_seconds(failures: int) -> float:
    return min(_MAX_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2.0 ** min(failures - 1, 30))
