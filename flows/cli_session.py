"""One command's session: launchers, a Prefect API, and a flow in a thread while this one minds signals."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from danling_core.config import Config
from flows.outcome import RunOutcome
from flows.pool import LauncherPool, Listener, pinned, using
from flows.server import QUIET, EmbeddedServer, configured_api_url, send_waiting, using_api

POLL_SECONDS = 0.1
# For Prefect to be told of the end of a flow whose runs have ended; an API that is away is given up then.
FAREWELL_SECONDS = 30.0


@dataclass
class Ending:
    """How a session ended.

    Args:
        outcomes: of every run that ended; the truth.
        error: what Prefect raised, if it did: it spoils what is shown, not what was trained.
        signal: the first signal that stopped the session.
        is_api_lost: Prefect could not be told all, and would hold up the exit of the interpreter for long.
    """

    outcomes: list[RunOutcome]
    error: BaseException | None = None
    signal: int | None = None
    is_api_lost: bool = False

    @property
    def is_ctrl_c(self) -> bool:
        """Stopped by Ctrl-C."""
        return self.signal == signal.SIGINT


class Session:
    """Validates configs and calls a flow for them.

    Args:
        configs: of all runs.
        slots: runs at a time.
        listener: shows what happens.
        is_verbose: leave Prefect's log lines on the console.
    """

    def __init__(
        self, configs: Sequence[Config], slots: int, listener: Listener, is_verbose: bool = False
    ) -> None:
        self._configs = configs
        self._pool = LauncherPool(min(slots, len(configs)), listener)
        self._is_verbose = is_verbose

    def call(self, flow: Callable[[list[Config]], Any]) -> Ending:
        """Bring everything up, call `flow` with the validated configs, and take everything down.

        Launchers, the import of Prefect, its server and the validation overlap.

        Raises:
            ConfigError: a config cannot be run; no flow was called and no folder made.
        """
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        with using(self._pool):
            self._pool.start()
            quiet = contextlib.nullcontext() if self._is_verbose else _quiet_prefect()
            with quiet, _api() as wait_for_api:
                configs = [pinned(prepared) for prepared in self._pool.prepare(self._configs)]
                with using_api(wait_for_api()):
                    return self._in_thread(lambda: flow(configs))

    def _in_thread(self, call: Callable[[], Any]) -> Ending:
        """Call in another thread: Prefect installs no signal handlers there, and ours do not cut it short."""
        errors: list[BaseException] = []

        def work() -> None:
            try:
                call()
            except BaseException as error:
                errors.append(error)

        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(work,), name="danling-flow", daemon=True)
        with _signals_noted() as noted:
            thread.start()
            self._mind(thread, noted)
        outcomes = list(self._pool.outcomes.values())
        is_lost = thread.is_alive() or not send_waiting()
        return Ending(outcomes, errors[0] if errors else None, noted[0] if noted else None, is_lost)

    def _mind(self, thread: threading.Thread, noted: list[int]) -> None:
        is_told, all_ended_at = False, math.inf
        while thread.is_alive() and time.monotonic() < all_ended_at + FAREWELL_SECONDS:
            thread.join(POLL_SECONDS)
            if len(self._pool.outcomes) >= len(self._configs):
                all_ended_at = min(all_ended_at, time.monotonic())
            if noted and not is_told:
                is_told = True
                print("\ndanling: stopping: the runs save what they have (again: kill)", file=sys.stderr)
                self._pool.interrupt(signal.Signals(noted[0]).name)
            if len(noted) > 1:
                self._pool.kill()
                print("danling: killed", file=sys.stderr, flush=True)
                os._exit(128 + noted[0])


@contextlib.contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """The numbers of the signals SIGINT and SIGTERM that arrive inside, in order."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _api() -> Iterator[Callable[[], str]]:
    """A function that waits for the Prefect API, configured or embedded, and returns its URL."""
    if (url := configured_api_url()) is not None:
        yield lambda: url
        return
    server = EmbeddedServer()
    server.start()
    try:
        yield server.wait
    finally:
        server.stop()


@contextlib.contextmanager
def _quiet_prefect() -> Iterator[None]:
    """Keep Prefect's lines off the console (they still go to its API); to be entered before it is imported.

    Prefect takes over the root logger's handler, so warnings of our own get one of their own meanwhile.
    """
    for handler in ("CONSOLE", "DEBUG"):
        os.environ.setdefault(f"PREFECT_LOGGING_HANDLERS_{handler}_LEVEL", "CRITICAL")
    ours = logging.StreamHandler()
    ours.setFormatter(logging.Formatter("danling: %(message)s"))
    ours.setLevel(logging.WARNING)
    logger = logging.getLogger("danling")
    logger.addHandler(ours)
    try:
        yield
    finally:
        logger.removeHandler(ours)
