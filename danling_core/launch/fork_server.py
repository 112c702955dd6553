"""Loaded first into the fork server: when the launcher dies, so does the server, and with it the ranks.

The server's own rule, to end when no process can ask it any more, does not do: its ranks could, so they would
keep it alive. It goes by a signal that it acts on, for only a living process can kill what the ranks started.

That signal is its own. What outsiders send to every process of a job means to save and stop: the ranks need their
server until they have.
"""

from __future__ import annotations

import os
import signal

from danling_core.process_tree import (
    END,
    children_of,
    die_with_parent,
    ignore_stop_signals,
    kill_tree,
    start_time,
)

PID = os.getpid()  # inherited by the ranks, which compare it with their parent's


def _end(*_: object) -> None:
    if os.getpid() == PID:  # a new child has the server's handler for a moment
        for child in children_of(PID):
            kill_tree(child, start_time(child))
    os._exit(1)


ignore_stop_signals()
signal.signal(END, _end)
die_with_parent(END)
if os.getppid() == 1:  # the launcher died before the line above
    os._exit(1)
