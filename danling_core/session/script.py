"""Signals and the exit code of a script of the user's own, which calls `runner.train()` without `danling`."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from danling_core.errors import RunInterrupted
from danling_core.parallel.stopping import NeverStopping, Stopping
from danling_core.process_tree import STOP_SIGNALS

logger = logging.getLogger("danling")
EXIT_INTERRUPTED = 75


class ScriptInterrupted(RunInterrupted, SystemExit):
    """A stop that ends a script with exit code 75, unless the script catches it as `RunInterrupted`."""

    code = EXIT_INTERRUPTED


@contextlib.contextmanager
def ended_by_stops(stop: Callable[[], Stopping | NeverStopping]) -> Iterator[None]:
    """Have the signals that mean so save and stop the run, and a stop end the script with 75. Handlers are put back.

    A signal that has a handler already, or is ignored, is left to it. In a notebook a stop stays a `RunInterrupted`,
    and in a thread that is not the main one nothing is changed. Nothing is saved inside a handler: the run stops before
    its next step, or at once where it has not begun. A Ctrl-C, and the button that interrupts a cell, do the same, and
    end with `KeyboardInterrupt`; the second one does so at once.

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

    pressed = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal pressed
        agreement = stop()
        if pressed or isinstance(agreement, NeverStopping):
            raise KeyboardInterrupt
        pressed = True
        logger.warning("interrupted: saving before the next step; once more ends at once")
        agreement.wish("keyboard interrupt")

    before = {n: signal.signal(n, ask) for n in STOP_SIGNALS if signal.getsignal(n) is signal.SIG_DFL}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except RunInterrupted as error:
        if pressed:  # as everywhere: a script ends with 130
            raise KeyboardInterrupt(str(error)) from None
        if isinstance(error, ScriptInterrupted) or hasattr(sys, "ps1"):
            raise
        raise ScriptInterrupted(str(error)) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
