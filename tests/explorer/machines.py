"""Processes on machines with a simulated store, in one thread: what happens meanwhile happens inside a request."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple
from unittest import mock

from danling_core.errors import Fenced, RunBusy
from danling_core.runs import lease, lease_owner
from danling_core.runs.lease import BEAT_SECONDS, STALE_AFTER_SECONDS, Lease
from danling_core.storage import operations, settings
from danling_core.storage.backend import mount
from danling_core.storage.retries import Retry
from danling_core.storage.settings import Settings
from tests.explorer.invariants import FENCED, PATIENT, Broken
from tests.explorer.owners import is_guarded
from tests.explorer.remote import a_folder
from tests.explorer.store import Kind, SimulatedStore
from tests.explorer.turns import InLine, Killed, LostAnswer

FREED = "a run whose owner is dead can be taken over"
ROOT = "sim://bucket/root/small-1"
_LEASE = re.compile(rf"PUT {ROOT}/lease/(\d+)\.json")


class Trouble(NamedTuple):
    """What happens to a process at one of its requests.

    Args:
        kind: it is killed before the request, the answer is lost, it is paused before it, or both of these in turn.
        at: the number of the request in what the process does now.
        machine: where another process begins during the pause.
    """

    kind: Literal["killed", "lost", "paused", "lost, then paused"]
    at: int
    machine: int


@dataclass
class Process:
    """A process that writes to a run, or has.

    Args:
        pid: of the process; no two have the same.
        machine: it runs on.
    """

    pid: int
    machine: int
    is_alive: bool = True
    is_stalled: bool = False
    """It is stopped, and does not beat."""
    is_released: bool = False
    signed_at: float = 0.0
    """When others have last seen it alive."""
    lease: Lease | None = None
    step: int = 0
    parts: SimpleNamespace = field(default_factory=SimpleNamespace)
    """What it works with."""
    steps: list[str] = field(default_factory=list)
    late: int = 0
    """How often it has changed something that another one owns."""

    @property
    def is_beating(self) -> bool:
        return self.lease is not None and self.is_alive and not self.is_stalled and not self.is_released


class Cluster:
    """A store, machines with clocks and disks of their own, and the processes on them.

    Args:
        kind: of the store.
        is_strict: every change asks the lease directly before. Otherwise one question may allow what belongs to a
            commit, and the deletions of a prune.
    """

    def __init__(self, kind: Kind, *, is_strict: bool) -> None:
        self.now = 1_800_000_000.0
        self.ahead = {1: 0.0, 2: 1000.0, 3: -1000.0}
        """How wrong the clock of each machine is, in seconds."""
        self.store = SimulatedStore(kind, self._before, self._after, lambda: self.now)
        self.store.changed = self._changed
        self.folder = a_folder()
        self.processes: list[Process] = []
        self.owner: Process | None = None
        self.generation = 0
        self.broken: Broken | None = None
        self.meanwhile: Callable[[int], None] = lambda machine: None
        """Called in the pause of a process with the machine where another one begins."""
        self._is_strict = is_strict
        self._acting: list[tuple[Process, Trouble | None]] = []
        self._counts: list[int] = []
        self._closing = contextlib.ExitStack()
        self._settle()

    def close(self) -> None:
        self._closing.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _settle(self) -> None:
        """Give the processes what a machine gives them."""
        enter = self._closing.enter_context
        retry = Retry(clock=lambda: self.now, sleep=self.sleep, chance=lambda: 0.5)
        started = {"start_time": self._start_time, "_machine": lambda: str(self.acting.machine)}
        enter(mount("sim", self.store))
        enter(mock.patch.object(settings, "_process_settings", Settings(retry=retry)))
        enter(mock.patch.object(lease_owner, "os", SimpleNamespace(getpid=lambda: self.acting.pid)))
        clocks = {
            "time": lambda: self.clock(self.acting.machine),
            "sleep": self.sleep,
            "monotonic": lambda: self.now,
        }
        enter(mock.patch.object(lease, "time", SimpleNamespace(**clocks)))
        for name, call in started.items():
            enter(mock.patch.object(lease_owner, name, call))
        enter(mock.patch.object(operations, "ThreadPoolExecutor", InLine))

    def _start_time(self, pid: int) -> int | None:
        process = next(each for each in self.processes if each.pid == pid)
        return pid if process.is_alive else None

    # time ------------------------------------------------------------------------------------------------------
    def sleep(self, seconds: float) -> None:
        """Let time pass, in which those who live beat."""
        self.now += seconds
        busy = {process.pid for process, _ in self._acting}
        for process in self.processes:
            if (
                process.is_beating
                and process.pid not in busy
                and self.now - process.signed_at >= BEAT_SECONDS
            ):
                self.act(process, lambda process=process: process.lease.beat())  # type: ignore[misc]

    def clock(self, machine: int) -> float:
        """Return the Unix time by the clock of a machine."""
        return self.now + self.ahead[machine]

    # processes -------------------------------------------------------------------------------------------------
    @property
    def acting(self) -> Process:
        return self._acting[-1][0]

    def act(self, process: Process, work: Callable[[], Any], trouble: Trouble | None = None) -> Any:
        """Let a process do something; return what came of it, None where it died of it or has lost the run.

        Raises:
            Broken: it was refused and owns the run.
        """
        self._acting.append((process, trouble))
        self._counts.append(0)
        try:
            return work()
        except Killed:
            return None
        except Fenced as error:
            if process is self.owner:
                raise Broken(FENCED, f"the owner itself was refused: {error}") from error
            process.is_stalled = True  # it would end now; should it go on, every request must fail
            return None
        finally:
            self._acting.pop()
            self._counts.pop()
            if self.broken is not None and not self._acting:
                raise self.broken

    def acquire(self, machine: int, trouble: Trouble | None = None) -> Process | None:
        """Begin a process that takes the run; return it if it has it. Raises `Broken`."""
        process = Process(len(self.processes) + 1, machine)
        self.processes.append(process)

        def take() -> Lease:
            clocks: dict[str, Any] = {"now": lambda: self.clock(machine), "monotonic": lambda: self.now}
            return Lease.acquire(ROOT, sleep=self.sleep, **clocks)

        try:
            process.lease = self.act(process, take, trouble)
        except RunBusy as error:
            process.is_alive = False
            if self.owner is not None and not self.owner.is_alive and self.broken is None:
                raise Broken(FREED, error) from error
        return process if process.lease is not None else None

    def guard(self, process: Process) -> Callable[[], None]:
        """Return what the process asks before it writes."""
        assert process.lease is not None
        return lease.guard(process.lease.url, process.lease.generation)

    def path(self, *parts: str) -> str:
        """Return a path on the disks."""
        return os.path.join(self.folder, *parts)

    # requests --------------------------------------------------------------------------------------------------
    def _before(self, kind: str, path: str) -> None:
        if not self._acting:
            return
        process, trouble = self._acting[-1]
        if not process.is_alive:
            raise Killed
        if trouble is not None and trouble.at == self._counts[-1]:
            if trouble.kind == "killed":
                process.is_alive = False
                raise Killed
            if trouble.kind == "paused":
                self._acting[-1] = process, None
                process.is_stalled = True
                try:
                    self.meanwhile(trouble.machine)
                except Broken as error:
                    self.broken = self.broken or error
                process.is_stalled = False
        self._counts[-1] += 1
        process.steps.append(f"{kind} {path}")

    def _after(self) -> None:
        if not self._acting:
            return
        process, trouble = self._acting[-1]
        if trouble is not None and trouble.kind.startswith("lost") and trouble.at == self._counts[-1] - 1:
            after = None if trouble.kind == "lost" else Trouble("paused", trouble.at + 1, trouble.machine)
            self._acting[-1] = process, after
            raise LostAnswer("the connection was closed before an answer came")

    def _changed(self, change: str) -> None:
        if not self._acting:
            return
        process = self.acting
        if found := _LEASE.fullmatch(change):
            self._note_lease(process, int(found[1]), change.partition(" ")[2])
        elif process is not self.owner and not self._is_harmless(change):
            process.late += 1
            if process.late > 1 or (self._is_strict and not is_guarded(process.steps)):
                self._break(FENCED, f"{process.pid} made {change!r}")

    def _is_harmless(self, change: str) -> bool:
        """Return whether a former owner may do this: nobody needs it."""
        if "/lease/" in change or change.startswith(f"DELETE {ROOT}/checkpoints/data/"):
            return True
        is_payload = change.startswith(f"PUT {ROOT}/checkpoints/data/")
        return not self._is_strict and (is_payload or change.startswith("DELETE "))

    def _note_lease(self, process: Process, generation: int, path: str) -> None:
        if generation > self.generation:
            before = self.owner
            if before is not None and not self._is_free(before, process):
                silent = self.now - before.signed_at
                self._break(PATIENT, f"{process.pid} took over from {before.pid} after {silent:g} s")
            self.owner, self.generation = process, generation
        if process is self.owner:
            process.signed_at = self.now
            process.is_released = b'"is_released": true' in self.store.objects[path].data

    def _is_free(self, owner: Process, other: Process) -> bool:
        is_known_dead = not owner.is_alive and owner.machine == other.machine
        return owner.is_released or is_known_dead or self.now - owner.signed_at >= STALE_AFTER_SECONDS

    def _break(self, invariant: str, found: object) -> None:
        """Keep it for the end: the code under test would take it for an error of the store."""
        self.broken = self.broken or Broken(invariant, found)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Let requests be nobody's."""
        acting, self._acting = self._acting, []
        try:
            yield
        finally:
            self._acting = acting
