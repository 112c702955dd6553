"""Signals and the exit code of a script of the user's own, which calls `runner.train()` without `danling`."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from danling_core.errors import RunInterrupted
from danling_core.parallel.stopping import NeverStopping, Stopping
from danling_core.process_tree import STOP_SIGNALS

EXIT_INTERRUPTED = 75


class ScriptInterrupted(RunInterrupted, SystemExit):
    """A stop that ends a script with exit code 75, unless the script catches it as `RunInterrupted`."""

    code = EXIT_INTERRUPTED


@contextlib.contextmanager
def ended_by_stops(stop: Callable[[], Stopping | NeverStopping]) -> Iterator[None]:
    """Have the signals that mean so save and stop the run, and a stop end the script with 75. Handlers are put back.

    A signal that has a handler already, or is ignored, is left to it. In a notebook a stop stays a `RunInterrupted`,
    and in a thread that is not the main one nothing is changed. Nothing is saved inside a handler: the run stops before
    its next step, or at once where it has not begun.

    Args:
        stop: returns the ranks' agreement to stop as it is now.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:
        reason, agreement = f"got {signal.Signals(number).name}", stop()
        if isinstance(agreement, NeverStopping):
            raise ScriptInterrupted(f"{reason} before training began")
        agreement.wish(reason)

    before = {n: signal.signal(n, ask) for n in STOP_SIGNALS if signal.getsignal(n) is signal.SIG_DFL}
    try:
        yield
    except RunInterrupted as error:
        if isinstance(error, ScriptInterrupted) or hasattr(sys, "ps1"):
            raise
        raise ScriptInterrupted(str(error)) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
