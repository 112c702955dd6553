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
from typing import Any

from danling_core.config import Config
from danling_core.launch.client import Launcher
from flows.credentials import forget, named_block, store_credentials
from flows.home import a_home, never_through_a_proxy
from flows.outcome import RunOutcome
from flows.pool import LauncherPool, Listener, launcher_for_elsewhere, using
from flows.server import QUIET, EmbeddedServer, api_server, send_waiting, using_api, why_unreachable
from flows.signals import Signals
from flows.skipping import complete_already

POLL_SECONDS = 0.1
# For the last reports of a flow whose runs have ended; an API that is away is given up sooner.
FAREWELL_SECONDS = 30.0
AWAY_SECONDS = 2.0


@dataclass
class SessionEnd:
    """End of a session.

    Args:
        outcomes: of every run that ended; the truth.
        error: what Prefect raised, if it did: it spoils what is shown, not what was trained.
        failure: why the flow failed, where no run came as far as an outcome.
        signal: the first signal that stopped the session.
        is_api_lost: Prefect has not everything, and would hold up the exit of the interpreter for long.
    """

    outcomes: list[RunOutcome]
    error: BaseException | None = None
    failure: BaseException | None = None
    signal: int | None = None
    is_api_lost: bool = False

    @property
    def is_ctrl_c(self) -> bool:
        """Return whether Ctrl-C stopped it."""
        return self.signal == signal.SIGINT


class Session:
    """Validates configs and calls a flow for them.

    Args:
        configs: of all runs.
        slots: runs at a time.
        listener: shows what happens.
        is_verbose: leave Prefect's log lines on the console.
        is_fresh: train anew, whatever is complete.
        trains_here: the runs train on this machine.
    """

    def __init__(
        self,
        configs: Sequence[Config],
        slots: int,
        listener: Listener,
        is_verbose: bool = False,
        is_fresh: bool = False,
        trains_here: bool = True,
    ) -> None:
        self._configs = configs
        launcher = Launcher if trains_here else launcher_for_elsewhere
        self._pool = LauncherPool(min(slots, len(configs)), listener, launcher)
        self._is_verbose = is_verbose
        self._is_fresh = is_fresh
        self._signals = Signals()

    def call(self, flow: Callable[[list[Config]], Any]) -> SessionEnd:
        """Bring everything up, call `flow` with the validated configs, and take everything down.

        Launchers, the import of Prefect, its server and the validation overlap. When every run is complete and
        no API is configured that would show it, the server is not waited for, and no flow is called.

        Raises:
            ConfigError: a config cannot be run; no flow was called and no folder made.
            StoppedBySignal: before the flow was called.
        """
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        ending: SessionEnd | None = None
        try:
            never_through_a_proxy()
            with self._signals, a_home(), using(self._pool):
                if named_block(self._configs) is None:  # with a block, launchers inherit its variables
                    self._pool.start()
                quiet = contextlib.nullcontext() if self._is_verbose else _quiet_prefect()
                with quiet, api_server() as server, self._credentials(server):
                    ending = self._call(flow, server)
        except KeyboardInterrupt:  # while it all closes: what is left ends with this process
            if ending is None:
                raise
        return ending

    def _call(self, flow: Callable[[list[Config]], Any], server: EmbeddedServer | str) -> SessionEnd:
        plans = self._pool.prepare(self._configs)
        if not isinstance(server, str):
            if not self._is_fresh and (outcomes := complete_already(plans)) is not None:
                return SessionEnd([self._pool.record(outcome) for outcome in outcomes])
            self._pool.start(all_of_them=True)  # while the server comes up
        with using_api(server):
            return self._in_thread(lambda: flow([plan.config for plan in plans]))

    @contextlib.contextmanager
    def _credentials(self, server: EmbeddedServer | str) -> Iterator[None]:
        """Load the credentials of the configs' block from the API, before a store or a launcher is used."""
        if named_block(self._configs) is None:
            yield
            return
        try:
            with using_api(server), store_credentials(self._configs):
                yield
        finally:
            forget()  # a flow that hangs on a lost API may still hold them

    def _in_thread(self, call: Callable[[], Any]) -> SessionEnd:
        """Call in another thread: Prefect installs no signal handlers there, and ours do not cut it short."""
        errors: list[BaseException] = []
        states: list[Any] = []

        def work() -> None:
            try:
                states.append(call())
            except BaseException as error:
                errors.append(error)

        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(work,), name="danling-flow", daemon=True)
        noted = self._signals.noted
        with self._signals.being_noted():
            thread.start()
            self._mind(thread, noted)
            first_signal = noted[0] if noted else None
            is_lost = thread.is_alive() or not send_waiting(0.5 if _is_api_away() else 10.0)
        outcomes = list(self._pool.outcomes.values())
        error = errors[0] if errors else None
        failure = _failure(states[0]) if states and not outcomes else None
        return SessionEnd(outcomes, error, failure, first_signal, is_lost)

    def _mind(self, thread: threading.Thread, noted: list[int]) -> None:
        is_told, give_up_at, look_at = False, math.inf, math.inf
        while thread.is_alive() and time.monotonic() < give_up_at:
            thread.join(POLL_SECONDS)
            now = time.monotonic()
            if give_up_at == math.inf and self._have_all_ended(noted):
                give_up_at, look_at = now + FAREWELL_SECONDS, now + AWAY_SECONDS / 4
            if now > look_at:
                look_at = now + AWAY_SECONDS
                if _is_api_away():
                    give_up_at = min(give_up_at, now + AWAY_SECONDS / 2)
            if noted and not is_told:
                is_told = True
                again = " (again: kill)" if noted[0] == signal.SIGINT else ""
                print(f"\ndanling: stopping: the runs save what they have{again}", file=sys.stderr)
                self._pool.interrupt(signal.Signals(noted[0]).name)
            if noted.count(signal.SIGINT) > 1:
                self._pool.kill()
                forget()
                print("danling: killed", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGINT)

    def _have_all_ended(self, noted: list[int]) -> bool:
        """Return whether no rank is at work any more, and none will be."""
        return len(self._pool.outcomes) >= len(self._configs) or (bool(noted) and self._pool.is_at_rest())


def _is_api_away() -> bool:
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    return url is not None and why_unreachable(url, AWAY_SECONDS / 2) is not None


def _failure(state: Any) -> BaseException | None:
    """Return the exception of a flow, from the state in which it ended; None if it raised none."""
    if not state.is_failed() and not state.is_crashed():
        return None
    raised = state.result(raise_on_failure=False)
    return raised if isinstance(raised, BaseException) else None


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
