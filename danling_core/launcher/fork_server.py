"""Loaded first into the fork server: when the launcher dies, so does the server, and with it the ranks.

The server's own rule, to end when nobody can ask it any more, does not do: its ranks could, so they would
keep it alive.
"""

from __future__ import annotations

import os

from danling_core.lifeline import die_with_parent

PID = os.getpid()  # inherited by the ranks, which compare it with their parent's

die_with_parent()
if os.getppid() == 1:  # the launcher died before the line above
    os._exit(1)
