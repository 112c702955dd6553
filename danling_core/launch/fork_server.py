"""Loaded first into the fork server: when the launcher dies, so does the server, and with it the ranks.

The server's own rule, to end when no process can ask it any more, does not do: its ranks could, so they would
keep it alive. It goes by a signal that it acts on, for only a living process can kill what the ranks started.

That signal is its own. SIGTERM and SIGINT are what outsiders send to every process of a job (a service manager,
a batch system, a shutdown), and mean to save and stop: the ranks need their server until they have.
"""

from __future__ import annotations

import os
import signal

from danling_core.process_tree import children_of, die_with_parent, kill_tree, start_time

PID = os.getpid()  # inherited by the ranks, which compare it with their parent's
END = signal.SIGUSR2


def _end(*_: object) -> None:
    if os.getpid() == PID:  # a new child has the server's handler for a moment
        for child in children_of(PID):
            kill_tree(child, start_time(child))
    os._exit(1)


signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SIGINT is ignored since the launcher, and in the ranks, too
signal.signal(END, _end)
die_with_parent(END)
if os.getppid() == 1:  # the launcher died before the line above
    os._exit(1)
