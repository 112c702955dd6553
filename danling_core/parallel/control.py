"""Memory shared by the launcher and the ranks of a node: heartbeats go up, the wish to stop goes down."""

from __future__ import annotations

import mmap
import os
from types import TracebackType

from danling_core.process_tree import start_time

_MAGIC = 0x444C_4354_524C_0002  # "DLCTRL", layout 2
_HEADER_CELLS = 8  # magic, world size, stop requested, stop at step, and room
_RANK_CELLS = 8  # one cache line each: pid, start time, beats, step, done, and room
_WORLD, _STOP_REQUESTED, _STOP_AT_STEP = 1, 2, 3
_FIRST_STEP_SECONDS = 1800.0
_PID, _STARTED, _BEATS, _STEP, _DONE = range(5)


def silence_allowed(hang_timeout_seconds: float, is_starting: bool) -> float:
    """Return seconds after which a silent rank is taken for hung. The launcher's watch asks.

    Nothing beats before the end of the first step: data are tokenised, a model is loaded or compiled. Until
    every rank is that far, silence may last half an hour, or longer where the config allows more.
    """
    return max(hang_timeout_seconds, _FIRST_STEP_SECONDS) if is_starting else hang_timeout_seconds


def collective_timeout(hang_timeout_seconds: float) -> float:
    """Return seconds after which a collective gives up where the watch is there: well after it, whose finding is
    restartable and shows the stacks."""
    return 1.5 * silence_allowed(hang_timeout_seconds, is_starting=True) + 30.0


class RankControl:
    """One rank's cells. A cell is an aligned 64-bit integer with one writer: no read is torn."""

    __slots__ = ("_cells", "_base")

    def __init__(self, cells: memoryview, base: int) -> None:
        self._cells = cells
        self._base = base

    def enter(self) -> None:
        """Say that this process is the rank. The launcher's wrapper calls it, before the entrypoint."""
        self._cells[self._base + _STARTED] = start_time(os.getpid()) or 0
        self._cells[self._base + _PID] = os.getpid()

    def beat(self, step: int) -> None:
        """Say that this rank is alive and working on `step`, counted from 0. Called by the rank, at least
        once a step and once an evaluated batch; its first is over with the second call. `silence_allowed` says
        what silence is taken for a hang."""
        cells, base = self._cells, self._base
        cells[base + _STEP] = step
        cells[base + _BEATS] += 1

    def finish(self) -> None:
        """Say that this rank has nothing more to do: its death is no failure now, its silence no hang.

        Call it once the terminal event is written and before the process group is destroyed, whose teardown
        aborts or deadlocks now and then; when every rank has finished, the launcher ends what lingers.
        """
        self._cells[self._base + _DONE] = 1

    @property
    def pid(self) -> int:
        """Return the rank's process; 0 before it came up."""
        return int(self._cells[self._base + _PID])

    @property
    def started(self) -> int:
        """Start time of that process, as `process_tree.start_time` counts."""
        return int(self._cells[self._base + _STARTED])

    @property
    def beats(self) -> int:
        """Number of its beats."""
        return int(self._cells[self._base + _BEATS])

    @property
    def is_starting(self) -> bool:
        """Return whether its first step, or evaluated batch, is not over yet."""
        return self.beats < 2

    @property
    def step(self) -> int | None:
        """Return the step it was last working on; None before the first."""
        step = int(self._cells[self._base + _STEP])
        return None if step < 0 else step

    @property
    def is_done(self) -> bool:
        """Return whether it called `finish`."""
        return bool(self._cells[self._base + _DONE])


class Control:
    """A small file mapped into the launcher and into each rank of one node.

    Ranks are counted by their place on the node (LOCAL_RANK). The launcher makes one file for each launch.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._cells = memoryview(self._map).cast("q")
        if self._cells[0] != _MAGIC:
            self.close()
            raise ValueError(f"{path} is not a control file of this version")
        self.world_size = int(self._cells[_WORLD])
        self.ranks = [
            RankControl(self._cells, _HEADER_CELLS + rank * _RANK_CELLS) for rank in range(self.world_size)
        ]

    @classmethod
    def create(cls, path: str, world_size: int) -> Control:
        """Make the file, which must not exist, and map it."""
        with open(path, "xb") as file:
            cells = memoryview(bytearray(8 * (_HEADER_CELLS + world_size * _RANK_CELLS))).cast("q")
            cells[0], cells[_WORLD], cells[_STOP_AT_STEP] = _MAGIC, world_size, -1
            for rank in range(world_size):
                cells[_HEADER_CELLS + rank * _RANK_CELLS + _STEP] = -1
            file.write(cells)
        return cls(path)

    @classmethod
    def open(cls, path: str) -> Control:
        """Map an existing file."""
        return cls(path)

    @property
    def stop_requested(self) -> bool:
        """Return whether the ranks shall save and stop; set by the launcher, or by a rank that got SIGTERM."""
        return bool(self._cells[_STOP_REQUESTED])

    def request_stop(self) -> None:
        """Ask the ranks to save and stop. May be called again, by anyone."""
        self._cells[_STOP_REQUESTED] = 1

    @property
    def stop_at_step(self) -> int | None:
        """Return the step before which all ranks stop, once rank 0 has chosen one."""
        step = int(self._cells[_STOP_AT_STEP])
        return None if step < 0 else step

    @stop_at_step.setter
    def stop_at_step(self, step: int) -> None:
        self._cells[_STOP_AT_STEP] = step

    def close(self) -> None:
        """Unmap the file; its cells must not be touched afterwards."""
        self._cells.release()
        self._map.close()

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
