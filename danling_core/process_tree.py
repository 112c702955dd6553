"""Tie the life of one process to that of another: no process of a run outlives the one that wanted it.

SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 are sent by outsiders (a batch system, a service manager, a lost terminal), often
to every process of a job at once, and mean save and stop. Our processes have signals of their own for each other.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

_HAS_MORE = hasattr(signal, "SIGRTMIN")  # not on macOS
END: int = signal.SIGRTMIN + 1 if _HAS_MORE else signal.SIGUSR2
"""Ends a fork server, a mirror or a Prefect server of ours."""
DUMP_STACKS: int = signal.SIGRTMIN + 2 if _HAS_MORE else signal.SIGUSR1
"""Has a rank write the stacks of its threads to its log."""
STOP_SIGNALS = tuple(
    number
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    if number not in (END, DUMP_STACKS)
)
"""Mean to save and stop: to the driver, and to each rank."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def start_time(pid: int) -> int | None:
    """When process `pid` began, in clock ticks since boot; None when it is gone (a zombie counts as gone).

    With the pid it names a process for good, which the pid alone does not. Off Linux it is 0 for any living
    process.
    """
    if sys.platform != "linux":
        return 0 if _is_known(pid) else None
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat[stat.rindex(b")") + 2 :].split()  # the command may hold spaces and brackets
    return None if state in (b"Z", b"X") else int(fields[18])


def _is_known(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def is_alive(pid: int, started: int | None) -> bool:
    """Return whether the process that had `pid` and began at `started` still runs."""
    try:
        return started is not None and start_time(pid) == started
    except OSError:  # too many open files, for one; who watches must not stop for that
        return _is_known(pid)


def ignore_stop_signals() -> None:
    """Live through what stops the run, in a process that the run still needs then. Ctrl-C is one of them."""
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def die_with_parent(death: int = signal.SIGKILL) -> None:
    """Have the kernel send `death` to this process when the thread that forked it ends. Linux only.

    Call it only where that thread is one that lives as long as its process, such as the main thread.
    """
    if _libc is not None and _libc.prctl(_PR_SET_PDEATHSIG, int(death), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")


def children_die_with_us() -> None:
    """Have every child forked from this process's main thread (a loader's workers) die when this process
    does.

    Children forked from other threads are left alone, because the kernel would kill them when that thread
    ends.
    """
    parent: list[int | None] = [None]

    def before() -> None:
        parent[0] = os.getpid() if threading.current_thread() is threading.main_thread() else None

    def in_child() -> None:
        if parent[0] is not None:
            die_with_parent()
            if os.getppid() != parent[0]:  # it died before the line above
                os._exit(1)

    os.register_at_fork(before=before, after_in_child=in_child)


def watch_parent(pid: int, started: int | None, poll_seconds: float = 1.0) -> threading.Thread:
    """Kill this process, and its process group where it leads one, soon after process `pid` is gone.

    The process need not be the parent: a rank watches the launcher, whose child is the fork server. Call it
    once.
    """
    watcher = threading.Thread(
        target=_watch, args=(pid, started, poll_seconds), name="danling-watch-parent", daemon=True
    )
    watcher.start()
    return watcher


def _watch(pid: int, started: int | None, poll_seconds: float) -> None:
    while is_alive(pid, started):
        time.sleep(poll_seconds)
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    """Return the living children of a process. Linux only; none elsewhere."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        return found  # it has just ended
    return found


def lead_group() -> None:
    """Make this process the leader of a process group, so that it and its children can be killed together."""
    if os.getpgid(0) != os.getpid():
        os.setpgid(0, 0)


def kill_tree(pid: int, started: int | None) -> None:
    """SIGKILL a process and what is left of the group that it leads, unless its pid is another's now."""
    now_started = start_time(pid)
    if now_started is not None and now_started != started:
        return
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
