"""Watch one group of ranks: hangs, ranks that linger after another's death, and the deadline of a stop."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from danling_core.parallel.control import Control, silence_allowed
from danling_core.process_tree import DUMP_STACKS, is_alive, kill_tree, start_time

logger = logging.getLogger(__name__)

_LINGER_SECONDS = 5.0  # for the others, after one rank died
_TEARDOWN_SECONDS = 3.0  # after every rank has finished its work: gloo's own teardown deadlocks now and then
_ABORT_SECONDS = 0.5  # likewise, where one of them is gone: an abort, and elastic holds the others
_DUMP_SECONDS = 2.0  # for the stacks to be written, before the kill


@dataclass(frozen=True)
class Hang:
    """Rank that fell silent first, presumably: the one at the earliest step."""

    rank: int
    step: int | None
    silent_seconds: float


@dataclass
class _Rank:
    pid: int
    started: int | None
    beats: int = -1
    last_beat: float = 0.0


@dataclass
class Watch:
    """The rules, as a function of time: `tick(now)` does what is due. `start` calls it from a thread.

    Args:
        control: of the group.
        hang_timeout_seconds: silence of a rank that is taken for a hang; at the start longer.
        stop_grace_seconds: from `request_stop` until the ranks are killed.
    """

    control: Control
    hang_timeout_seconds: float
    stop_grace_seconds: float
    hang: Hang | None = None
    killed: set[int] = field(default_factory=set)
    _ranks: dict[int, _Rank] = field(default_factory=dict)
    _kill_at: float | None = None
    _stop_by: float | None = None
    _ended: threading.Event = field(default_factory=threading.Event)

    def adopt(self, pids: Mapping[int, int], now: float) -> None:
        """Begin to watch these processes, by local rank."""
        self._ranks = {rank: _Rank(pid, start_time(pid), last_beat=now) for rank, pid in pids.items()}

    @property
    def is_group_gone(self) -> bool:
        """Return whether ranks were started, and none is left."""
        return bool(self._ranks) and not any(
            is_alive(rank.pid, rank.started) for rank in self._ranks.values()
        )

    def request_stop(self, now: float) -> None:
        """Ask the ranks to save and stop; kill them when the grace is over. Again changes nothing."""
        self.control.request_stop()
        if self._stop_by is None:
            self._stop_by = now + self.stop_grace_seconds

    def kill_from_now_on(self) -> None:
        """Kill the ranks at the next tick, and those that are yet to come."""
        self._stop_by = float("-inf")

    def tick(self, now: float) -> None:
        """Look once at every rank, and do what is due at `now`."""
        alive = {index for index, rank in self._ranks.items() if is_alive(rank.pid, rank.started)}
        done = {index for index in self._ranks if self.control.ranks[index].is_done}
        due = self._when_to_kill(alive, done, now)
        if due is not None:
            self._kill_at = due if self._kill_at is None else min(self._kill_at, due)
        deadlines = [deadline for deadline in (self._kill_at, self._stop_by) if deadline is not None]
        if deadlines and now >= min(deadlines):
            self.kill()

    def _when_to_kill(self, alive: set[int], done: set[int], now: float) -> float | None:
        if not self._ranks:
            return None
        if any(index not in alive and index not in done for index in self._ranks):
            return now + _LINGER_SECONDS
        if len(done) == len(self._ranks):
            return now + (_TEARDOWN_SECONDS if len(alive) == len(self._ranks) else _ABORT_SECONDS)
        if self.hang is None:
            self.hang = self._find_hang(alive - done, now)
            if self.hang is None:
                return None
            self._dump_stacks()
        return now + _DUMP_SECONDS

    def _find_hang(self, working: set[int], now: float) -> Hang | None:
        is_starting = any(self.control.ranks[index].is_starting for index in working)
        allowed = silence_allowed(self.hang_timeout_seconds, is_starting)
        silent: list[tuple[int, float, int]] = []
        for index in working:
            rank, cells = self._ranks[index], self.control.ranks[index]
            # Who has started waits for who has not: its own time begins when all have.
            is_waiting = is_starting and not cells.is_starting
            if is_waiting or cells.beats != rank.beats:
                rank.beats, rank.last_beat = cells.beats, now
            elif now - rank.last_beat > allowed:
                silent.append((-1 if cells.step is None else cells.step, rank.last_beat, index))
        if not silent:
            return None
        _, last_beat, index = min(silent)
        cells = self.control.ranks[index]
        return Hang(index, cells.step, now - last_beat)

    def _dump_stacks(self) -> None:
        for index, rank in self._ranks.items():
            # Before a rank has entered, the signal would kill it instead of showing its stacks.
            if self.control.ranks[index].pid == rank.pid and is_alive(rank.pid, rank.started):
                os.kill(rank.pid, DUMP_STACKS)

    def kill(self) -> None:
        """SIGKILL every rank that is left, with its children, and remember which: their deaths are ours."""
        for index, rank in self._ranks.items():
            if is_alive(rank.pid, rank.started):
                self.killed.add(index)
        self.sweep()

    def sweep(self) -> None:
        """After the group's end, SIGKILL what may be left of it, such as the children of a rank that died."""
        for rank in self._ranks.values():
            kill_tree(rank.pid, rank.started)

    def start(self, poll_seconds: float = 0.05) -> threading.Thread:
        """Tick from a thread until `stop` is called."""
        thread = threading.Thread(target=self._loop, args=(poll_seconds,), name="danling-watch", daemon=True)
        thread.start()
        return thread

    def _loop(self, poll_seconds: float) -> None:
        while not self._ended.wait(poll_seconds):
            try:
                self.tick(time.monotonic())
            except OSError as error:  # the next tick tries it again
                logger.warning("the watch of the ranks met %s; it goes on", error)

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
