"""Actors that take turns under an explorer's hand: every history can be told again by its number.

Each actor is a thread that stops before everything it does to a disk or a store. A history says where an actor is
killed, where an answer is lost, and where another one goes on. So a run of several owners is a function of the history:
what the people of distributed systems call deterministic simulation (FoundationDB, TigerBeetle).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from danling_core.parallel import seeding
from danling_core.runs import lease, lease_owner
from danling_core.storage import operations, settings
from danling_core.storage.retries import Retry
from danling_core.storage.settings import Settings
from danling_core.tools import threads


class Killed(BaseException):
    """Raised in an actor that is dead: nothing that it still does has an effect."""


class LostAnswer(ConnectionError):
    """Raised where a request was carried out and its answer did not come back."""


@dataclass(frozen=True)
class History:
    """Where what happens to whom.

    Args:
        killed: actors, and of each the number of its step before which it is killed.
        lost: the actor and the number of its request whose answer is lost.
        switches: at which step of which actor the next one goes on; it comes back when that one ends, or switches.
    """

    killed: tuple[tuple[str, int], ...] = ()
    lost: tuple[str, int] | None = None
    switches: tuple[tuple[str, int], ...] = ()


@dataclass
class Actor:
    """Somebody who works on a run.

    Args:
        name: of the actor.
        work: what it does.
        machine: two actors of one machine know of each other's death at once.
        clock_ahead_seconds: how wrong the clock of its machine is.
    """

    name: str
    work: Callable[[], Any]
    machine: str = "machine"
    clock_ahead_seconds: float = 0.0
    steps: list[str] = field(default_factory=list)
    result: Any = None
    error: BaseException | None = None
    is_over: bool = False
    is_dead: bool = False

    def __post_init__(self) -> None:
        self.turn = threading.Semaphore(0)
        self.started = 0
        self.began_at = 0.0


class Clock:
    """Time that passes where somebody sleeps, and stands still otherwise."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Turns:
    """Lets actors act one at a time, as a history says. The first begins; who ends hands over to the next.

    Args:
        actors: in the order in which they go on after each other.
        history: what happens to them.
    """

    def __init__(self, actors: list[Actor], history: History) -> None:
        self.actors = actors
        self.history = history
        self.clock = Clock()
        self._of_thread = threading.local()
        self._done = threading.Semaphore(0)
        self._is_lost = False
        self._switches = list(history.switches)

    def run(self) -> None:
        """Let all actors act to their ends."""
        with self._settled():
            waiting = [actor for actor in self.actors if not actor.is_over]
            for actor in waiting:
                actor.started = 1 + self.actors.index(actor)
                threading.Thread(target=self._act, args=(actor,), daemon=True).start()
            waiting[0].turn.release()
            assert self._done.acquire(timeout=20), "the actors did not come to an end"

    def go_on(self, *actors: Actor) -> None:
        """Have others act by the next `run`, undisturbed, in what these have left."""
        self.actors, self.history, self._switches = [*self.actors, *actors], History(), []

    def before(self, kind: str, path: str) -> None:
        """Stop the calling actor before it acts. Raises `Killed` where the history says so, and ever after."""
        actor = self._acting
        if actor is None:
            return
        if actor.is_dead:
            raise Killed
        number = len(actor.steps)
        if (actor.name, number) in self.history.killed:
            actor.is_dead = True
            raise Killed
        if self._switches and self._switches[0] == (actor.name, number):
            self._switches.pop(0)
            if (after := self._next(actor)) is not None:
                generators = seeding.capture_rng()  # which the actors' processes would not share
                after.turn.release()
                actor.turn.acquire()
                seeding.restore_rng(generators)
        actor.steps.append(f"{kind} {path}")

    def answer(self) -> None:
        """Raise `LostAnswer` where the history says that the answer to the last step is lost."""
        actor = self._acting
        if (
            actor is not None
            and not self._is_lost
            and self.history.lost == (actor.name, len(actor.steps) - 1)
        ):
            self._is_lost = True
            raise LostAnswer("the connection was closed before an answer came")

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Let what the calling thread does be nobody's step: a reader looks."""
        actor, self._of_thread.actor = self._acting, None
        try:
            yield
        finally:
            self._of_thread.actor = actor

    def _act(self, actor: Actor) -> None:
        self._of_thread.actor = actor
        actor.turn.acquire()
        actor.began_at = self.clock.now
        try:
            actor.result = actor.work()
        except BaseException as error:
            actor.error = error
        actor.is_over = True
        after = self._next(actor)
        if after is None:
            self._done.release()
        else:
            after.turn.release()

    def _next(self, actor: Actor) -> Actor | None:
        """Return the actor that goes on: the next in the circle that is not over."""
        begin = self.actors.index(actor)
        circle = [*self.actors[begin + 1 :], *self.actors[:begin]]
        return next((each for each in circle if not each.is_over), None)

    @property
    def acting(self) -> Actor:
        """Return the calling actor; outside of one the first."""
        return self._acting or self.actors[0]

    @property
    def waited_seconds(self) -> float:
        """Return the time since the calling actor began."""
        return self.clock.now - self.acting.began_at

    def time(self) -> float:
        """Return what the clock of the calling actor's machine says."""
        return self.clock.now + self.acting.clock_ahead_seconds

    @property
    def _acting(self) -> Actor | None:
        return getattr(self._of_thread, "actor", None)

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """Give the actors machines, processes and clocks of their own, and no threads."""
        clock = self.clock
        times: dict[str, Any] = {"now": self.time, "sleep": clock.sleep, "monotonic": clock.time}
        module = SimpleNamespace(time=self.time, sleep=clock.sleep, monotonic=clock.time)
        patient = Retry(clock=clock.time, sleep=clock.sleep, chance=lambda: 0.5)
        with ExitStack() as stack:
            for call in (lease.Lease.acquire.__func__, lease.is_held):  # type: ignore[attr-defined]
                defaults = cast(dict[str, Any], call.__kwdefaults__)
                known = {name: value for name, value in times.items() if name in defaults}
                stack.enter_context(mock.patch.dict(defaults, known))
            stack.enter_context(mock.patch.object(lease, "time", module))
            stack.enter_context(mock.patch.object(lease_owner, "_machine", lambda: self.acting.machine))
            stack.enter_context(mock.patch.object(lease_owner, "start_time", lambda pid: self.acting.started))
            stack.enter_context(mock.patch.object(settings, "_process_settings", Settings(retry=patient)))
            stack.enter_context(mock.patch.object(lease.Lease, "beating", _not_beating))
            for module_ in (operations, threads):
                stack.enter_context(mock.patch.object(module_, "ThreadPoolExecutor", InLine))
            yield


@contextmanager
def _not_beating(self: lease.Lease, *arguments: Any, **named: Any) -> Iterator[lease.Lease]:
    """Stand in for the thread that beats: once, and then no more."""
    self.beat()
    yield self


class InLine:
    """Stand-in for a pool of threads: each call is made at once."""

    def __init__(self, *arguments: Any, **named: Any) -> None: ...

    def __enter__(self) -> InLine:
        return self

    def __exit__(self, *error: object) -> None: ...

    def map(self, function: Callable[..., Any], *values: Any) -> list[Any]:
        return [function(*each) for each in zip(*values, strict=False)]

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done

    def shutdown(self, **options: Any) -> None: ...
