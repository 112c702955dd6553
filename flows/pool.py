"""Launchers shared by the runs of a session: one per concurrency slot, reused from run to run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, Protocol

from danling_core.config import Config
from danling_core.errors import DanLingError, LaunchError, RunInterrupted
from danling_core.launch.client import Launcher, RunHandle
from danling_core.launch.plan import RunPlan
from flows import gpus
from flows.outcome import RunOutcome

_ambient: ContextVar[LauncherPool | None] = ContextVar("danling_launcher_pool", default=None)
_held: ContextVar[Launcher | None] = ContextVar("danling_held_launcher", default=None)
_ended: ContextVar[list[RunOutcome] | None] = ContextVar("danling_ended_runs", default=None)
_part: ContextVar[_Part | None] = ContextVar("danling_part_of_session", default=None)


class Listener(Protocol):
    """Hears what happens to runs, from several threads; must be quick and must not raise."""

    def on_event(self, name: str, event: dict[str, Any]) -> None:
        """Take note of an event of the run called `name`."""

    def on_outcome(self, outcome: RunOutcome) -> None:
        """Take note that a run has ended."""


class _Part:
    """Runs of a session that are stopped apart from its others: those of one experiment of a group, or one run."""

    def __init__(self, around: _Part | None) -> None:
        self.stopped_because: str | None = None
        self._around = around

    def lineage(self) -> Iterator[_Part]:
        """Yield this part and those around it, the innermost first."""
        yield self
        if self._around is not None:
            yield from self._around.lineage()


class LauncherPool:
    """The launchers of one session (a command, or a top-level flow), the runs on them, and their outcomes.

    Args:
        slots: how many runs may train at a time.
        listener: hears events and outcomes; for a console.
        launcher: makes a launcher; replaced in tests.
    """

    def __init__(
        self, slots: int = 1, listener: Listener | None = None, launcher: Callable[[], Launcher] = Launcher
    ) -> None:
        self.slots = slots
        self.listener = listener
        self.stopped_because: str | None = None
        self.outcomes: dict[str, RunOutcome] = {}
        self._make = launcher
        self._launchers: list[Launcher] = []
        self._free: queue.Queue[Launcher] = queue.Queue()
        self._active: dict[RunHandle, list[_Part]] = {}
        self._interrupted: set[RunHandle] = set()
        self._plans: dict[bytes, RunPlan] = {}
        self._by_id: dict[str, threading.Lock] = {}
        self._lock = threading.RLock()

    def start(self, all_of_them: bool = False) -> None:
        """Start the launcher that prepares, or all of them, without waiting; a second call does nothing.

        Where every run is complete the others are not needed.
        """
        with self._lock:
            while len(self._launchers) < self.slots:
                launcher = self._make()
                self._launchers.append(launcher)
                self._free.put(launcher)
            for launcher in self._launchers if all_of_them else self._launchers[:1]:
                launcher.start()

    def prepare(self, configs: Sequence[Config]) -> list[RunPlan]:
        """Validate configs against their runners, in a process of the launcher's; return their plans, in order.

        What was prepared once in this session is remembered. The first call, with all configs of the session
        and before any run, shares out the GPUs: there may be fewer `slots` after it.

        Raises:
            ConfigError: a config that cannot be run, or too few GPUs; nothing was created.
        """
        self.start()
        keys = [_key(config) for config in configs]
        with self._lock:
            wanted = {
                key: config for key, config in zip(keys, configs, strict=True) if key not in self._plans
            }
            if wanted:
                answers = self._launchers[0].prepare(
                    [config.dict() for config in wanted.values()], os.getcwd()
                )
                plans = [RunPlan.of(answer) for answer in answers]
                if not self._plans:
                    self._share_gpus(plans)
                for key, plan in zip(wanted, plans, strict=True):
                    self._plans[key] = self._plans[_key(plan.config)] = plan
            return [self._plans[key] for key in keys]

    @contextlib.contextmanager
    def alone(self, plan: RunPlan) -> Iterator[None]:
        """Wait until no other run of this session has the same id, as where two experiments share a baseline.

        Raises:
            RunInterrupted: the pool was interrupted before.
        """
        with self._lock:
            held = self._by_id.setdefault(plan.identity.id, threading.Lock())
        while not held.acquire(timeout=0.1):
            if (reason := self.why_stopped()) is not None:
                raise RunInterrupted(f"not started: {reason}")
        try:
            yield
        finally:
            held.release()

    @contextlib.contextmanager
    def slot(self) -> Iterator[Launcher]:
        """Wait for a free launcher and hold it; inside another slot of the same context, the same one again.

        Raises:
            RunInterrupted: the pool was interrupted before a slot was free.
        """
        if (held := _held.get()) is not None:
            yield held
            return
        self.start()
        launcher = self._wait_for_launcher()
        token = _held.set(launcher)
        try:
            launcher.start()  # only one that has died is started
            yield launcher
        finally:
            _held.reset(token)
            self._free.put(launcher)

    @contextlib.contextmanager
    def active(self, handle: RunHandle) -> Iterator[RunHandle]:
        """Make a started run reachable by `interrupt`; an error inside interrupts it, to its end."""
        with self._lock:
            self._active[handle] = _parts()
            reason = self.why_stopped()
        if reason is not None:
            self.interrupt_run(handle, reason)
        try:
            yield handle
        except BaseException as error:
            self.interrupt_run(handle, f"{type(error).__name__} in its driver")
            _wait_for_end(handle)
            raise
        finally:
            with self._lock:
                self._active.pop(handle, None)
                self._interrupted.discard(handle)

    def interrupt_run(self, handle: RunHandle, reason: str) -> None:
        """Ask one run to save and stop, once however often this is called: asked twice, it is killed."""
        with self._lock:
            if handle in self._interrupted:
                return
            self._interrupted.add(handle)
        handle.interrupt(reason)

    def interrupt(self, reason: str, part: _Part | None = None) -> None:
        """Ask every active run (of `part` only, where it is given) to save and stop, and start no other there.

        Returns at once.
        """
        stopped = self if part is None else part
        with self._lock:
            stopped.stopped_because = reason if stopped.stopped_because is None else stopped.stopped_because
            active = [handle for handle, parts in self._active.items() if part is None or part in parts]
        for handle in active:
            self.interrupt_run(handle, reason)

    @contextlib.contextmanager
    def apart(self) -> Iterator[Callable[[str], None]]:
        """Give what interrupts the runs called inside, in this context and in copies of it, and no other run."""
        token = _part.set(_Part(_part.get()))
        try:
            yield self.interrupter()
        finally:
            _part.reset(token)

    def interrupter(self) -> Callable[[str], None]:
        """Return what interrupts the runs of the `apart` around this call; without one, every run of the pool."""
        part = _part.get()
        return lambda reason: self.interrupt(reason, part)

    def is_at_rest(self) -> bool:
        """Return whether the ranks of every run that was begun have ended, and no other is begun any more."""
        with self._lock:
            return self.stopped_because is not None and all(handle.has_ended for handle in self._active)

    def publish(self, name: str, event: dict[str, Any]) -> None:
        """Pass an event of a run on to the listener."""
        if self.listener is not None:
            self.listener.on_event(name, event)

    def record(self, outcome: RunOutcome) -> RunOutcome:
        """Keep the outcome of a run: this is the truth of a session, whatever reached the orchestrator."""
        with self._lock:
            self.outcomes[outcome.key] = outcome
        if (ended := _ended.get()) is not None:
            ended.append(outcome)
        if self.listener is not None:
            self.listener.on_outcome(outcome)
        return outcome

    @contextlib.contextmanager
    def remembering(self) -> Iterator[list[RunOutcome]]:
        """Yield the outcomes that are recorded inside, in this context and in copies of it."""
        around = _ended.get()
        ended: list[RunOutcome] = []
        token = _ended.set(ended)
        try:
            yield ended
        finally:
            _ended.reset(token)
            if around is not None:
                around.extend(ended)

    def close(self) -> None:
        """Stop every launcher; a run that is still active is interrupted first."""
        self.interrupt("the session ended")
        with self._lock:
            launchers, self._launchers = self._launchers, []
        with ThreadPoolExecutor(max(1, len(launchers))) as executor:
            ended = list(executor.map(_error_of, [launcher.close for launcher in launchers]))
        if errors := [error for error in ended if error is not None]:
            raise LaunchError(
                f"{len(errors)} launchers did not close; the first said: {errors[0]}"
            ) from errors[0]

    def kill(self) -> None:
        """Kill launchers and ranks at once, saving nothing. For a second Ctrl-C only."""
        self.stopped_because = self.stopped_because or "killed"
        for launcher in list(self._launchers):
            if launcher.pid is not None:
                # The fork server and the ranks follow their launcher into death.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(launcher.pid, signal.SIGKILL)

    def _share_gpus(self, plans: Sequence[RunPlan]) -> None:
        """Give each slot GPUs of its own; slots for which there are none are taken out of service."""
        fitting = gpus.runs_at_once(self.slots, plans)
        count = gpus.share_count(plans)
        if self.slots == 1 or not count:
            return
        slots = [self._free.get_nowait() for _ in range(self.slots)][:fitting]
        self.slots = fitting
        for launcher, share in zip(
            slots, gpus.shares(os.environ.get(gpus.VARIABLE), count, fitting), strict=True
        ):
            launcher.env[gpus.VARIABLE] = share
            self._free.put(launcher)

    def _wait_for_launcher(self) -> Launcher:
        while (reason := self.why_stopped()) is None:
            with contextlib.suppress(queue.Empty):
                return self._free.get(timeout=0.1)
        raise RunInterrupted(f"not started: {reason}")

    def why_stopped(self) -> str | None:
        """Why no run of this context may be started; None if it may."""
        reasons = [self.stopped_because, *(part.stopped_because for part in _parts())]
        return next((reason for reason in reasons if reason is not None), None)


def _parts() -> list[_Part]:
    part = _part.get()
    return [] if part is None else list(part.lineage())


def _key(config: Config) -> bytes:
    return hashlib.sha256(json.dumps(config.dict(), sort_keys=True, default=str).encode()).digest()


def _wait_for_end(handle: RunHandle) -> None:
    """Wait for the end, which comes: the launcher kills ranks that outlive their grace."""
    with contextlib.suppress(DanLingError):
        handle.outcome()


def _error_of(call: Callable[[], None]) -> DanLingError | None:
    try:
        call()
    except DanLingError as error:
        return error
    return None


def launcher_for_elsewhere() -> Launcher:
    """Return a launcher that prepares runs for other machines: the GPUs of this one do not matter."""
    return Launcher(prepare_entrypoint="danling_core.launch.prepare:prepare_elsewhere")


@contextlib.contextmanager
def launcher_pool(slots: int = 1, trains_here: bool = True) -> Iterator[LauncherPool]:
    """Yield the pool of the flow around this one, or a new one that is closed at the end, whatever the end is."""
    if (ambient := _ambient.get()) is not None:
        yield ambient
        return
    launcher = Launcher if trains_here else launcher_for_elsewhere
    with using(LauncherPool(slots, launcher=launcher)) as pool:
        yield pool


@contextlib.contextmanager
def using(pool: LauncherPool) -> Iterator[LauncherPool]:
    """Make `pool` the one that flows called inside use, and close it at the end."""
    token = _ambient.set(pool)
    try:
        yield pool
    finally:
        _ambient.reset(token)
        pool.close()
