"""What a loader worker does when it starts: leave signals to its rank, and die with it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def start_worker(worker_id: int) -> None:
    """The `worker_init_fn` of every loader: Ctrl-C, or a SIGTERM to the whole process group, reaches the
    rank, which finishes its step and saves; its workers must live until then. A SIGTERM from the rank itself
    is obeyed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank = os.getppid()
    _die_with_parent(rank)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(rank,), name="danling-signals", daemon=True).start()


def _obey(rank: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os._exit(0)


def _die_with_parent(rank: int) -> None:
    if not sys.platform.startswith("linux"):
        return  # torch's own watchdog ends the worker within 5 s
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != rank:
        os._exit(0)
