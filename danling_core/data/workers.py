"""Start of a loader worker: it leaves signals to its rank, and ends with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

from danling_core.process_tree import ignore_stop_signals

_POLL_SECONDS = 0.5


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Fork workers in this context: SIGTERM is blocked in every thread of theirs, also in those that torch starts."""
    if not hasattr(signal, "sigtimedwait"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(worker_id: int) -> None:
    """Set up a worker: the `worker_init_fn` of every loader.

    A signal to the whole process group that means to stop reaches the rank, which finishes its step and saves: its
    workers must live until then. They end when the rank says so by a SIGTERM of its own, or is gone.
    """
    ignore_stop_signals()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not hasattr(signal, "sigtimedwait"):
        return  # macOS: torch's own watchdog ends the worker some seconds after its rank
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_end, args=(os.getppid(),), name="danling-end", daemon=True).start()


def _wait_for_end(parent: int) -> None:
    rank = multiprocessing.parent_process()  # not the parent, where a fork server started the worker
    while os.getppid() == parent and (rank is None or rank.is_alive()):
        received = signal.sigtimedwait({signal.SIGTERM}, _POLL_SECONDS)
        if received is not None and received.si_pid in (parent, rank and rank.pid):
            break
    os._exit(0)
