"""The right to write into a run folder: numbered generation files, of which the highest owns.

An owner creates the next generation file exclusively and rewrites it at every beat. Whoever wants to take
over creates a higher one, once the owner has released it, is dead (same machine), or has not beaten for long.
Beats are judged by whether they change under the observer's own clock, never compared with another one.
"""

from __future__ import annotations

import contextvars
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace

from danling_core import storage
from danling_core.errors import Fenced, NotFound, RunBusy, StorageError
from danling_core.runs.folder import LEASE
from danling_core.runs.lease_owner import Owner, beats_on_this_machine, is_dead, this_process
from danling_core.runs.stop_request import StopRequest, stop_name

logger = logging.getLogger("danling")

BEAT_SECONDS = 5.0
STALE_AFTER_SECONDS = 30.0
_FILE = re.compile(r"(\d{6,})\.(json|stop)")
_POLL_SECONDS = 1.0
_LONG_SILENCE_SECONDS = 600.0
_ANSWER_SECONDS = 5.0  # a connection that died silently must not cost a healthy owner its lease


class Lease:
    """One generation of ownership of a run, made by `Lease.acquire`; release it in the end."""

    def __init__(self, url: str, generation: int, owner: Owner, now: Callable[[], float] = time.time) -> None:
        self.url = url
        self.generation = generation
        self.is_fenced = False
        self.is_taken_over = False
        """Whether the owner before was silent, and may wake up."""
        self.is_asked_to_stop = False
        """Whether somebody wants the run saved and stopped: see `ask_to_stop`."""
        self.predecessor: Owner | None = None
        """The owner before, where it did not give the run up in good order."""
        self._owner = owner
        self._now = now
        self._lock = threading.Lock()

    @classmethod
    def acquire(
        cls,
        parent_url: str,
        owner: str = "danling",
        *,
        stale_after_seconds: float = STALE_AFTER_SECONDS,
        wait_seconds: float = 0.0,
        flow_runs: Sequence[str] = (),
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> Lease:
        """Take the next generation under `parent_url`, waiting up to `wait_seconds` for a living owner.

        An owner on another machine is watched until its beat changes (it lives) or `stale_after_seconds` have
        passed without a change (it is taken over), so a refusal may take as long as one beat.

        Args:
            flow_runs: ids under which an orchestrator shows what the owner does.

        Raises:
            RunBusy: a living process owns it; the message says which.
        """
        url = lease_url(parent_url)
        started = monotonic()
        watched: tuple[int, Owner] | None = None
        watched_since = started
        while True:
            generation, holder = _highest(url)
            if holder is None or holder.is_released or is_dead(holder):
                if lease := cls._try_create(url, generation + 1, owner, now, flow_runs):
                    lease.predecessor = None if holder is None or holder.is_released else holder
                    return lease
                continue
            if (generation, holder) != watched:
                is_alive = watched is not None or beats_on_this_machine(holder, now(), stale_after_seconds)
                if watched is None and not is_alive:
                    logger.warning(
                        "waiting up to %.0f s for a sign of life of %s", stale_after_seconds, holder
                    )
                watched, watched_since = (generation, holder), monotonic()
                if is_alive and monotonic() - started >= wait_seconds:
                    raise RunBusy(f"{parent_url} is owned by {holder}. Wait for it, or stop it")
            if monotonic() - watched_since >= stale_after_seconds:
                logger.warning(
                    "taking over %s from %s: no beat for %.0f s", parent_url, holder, stale_after_seconds
                )
                if lease := cls._try_create(url, generation + 1, owner, now, flow_runs):
                    lease.is_taken_over, lease.predecessor = True, holder
                    return lease
                continue
            sleep(min(_POLL_SECONDS, stale_after_seconds / 4))

    @classmethod
    def _try_create(
        cls,
        url: str,
        generation: int,
        description: str,
        now: Callable[[], float],
        flow_runs: Sequence[str] = (),
    ) -> Lease | None:
        owner = replace(this_process(description, now()), flow_runs=tuple(flow_runs))
        with _prompt():
            is_created = storage.create_exclusive(_generation_url(url, generation), owner.dumps())
        if not is_created:
            return None
        highest, holder = _highest(url)
        if highest != generation or holder is None or holder.token != owner.token:
            return None  # decided on an old listing, or the store has no exclusive create
        for name in _names(url):
            if (old := _FILE.fullmatch(name)) and int(old.group(1)) < generation - 1:
                storage.delete(storage.join(url, name))
        return cls(url, generation, owner, now)

    @property
    def flow_runs(self) -> tuple[str, ...]:
        """Return the ids under which an orchestrator shows what this owner does, the innermost first."""
        return self._owner.flow_runs

    def name_flow_runs(self, flow_runs: Sequence[str]) -> None:
        """Name other ids under which an orchestrator shows what this owner does; others read them after a beat."""
        with self._lock:
            self._owner = replace(self._owner, flow_runs=tuple(flow_runs))

    def check(self) -> None:
        """Raise `Fenced` if another process has taken over. Costs one small listing."""
        if self.is_fenced:
            raise Fenced(_fenced_message(self.url, self.generation, None))
        try:
            names = check_generation(self.url, self.generation)
            self.is_asked_to_stop = self.is_asked_to_stop or stop_name(self.generation) in names
        except Fenced:
            self.is_fenced = True
            raise

    def beat(self) -> None:
        """Tell the others that this owner lives. Raises `Fenced`, or `StorageError` if the store is away."""
        with self._lock:
            self._check_own()
            self._write(replace(self._owner, beat=self._owner.beat + 1, beat_at=self._now()))

    def release(self) -> None:
        """Give the run up in good order: the next one acquires at once. Fenced or released: no effect."""
        with self._lock:
            if self._owner.is_released or self.is_fenced:
                return
            try:
                self._check_own()
            except Fenced as error:
                logger.warning("%s", error)
                return
            self._write(replace(self._owner, is_released=True, beat_at=self._now()))

    def stop_request(self) -> StopRequest:
        """Return what was asked for, once `is_asked_to_stop`."""
        url = storage.join(self.url, stop_name(self.generation))
        return StopRequest.parse(storage.read_bytes(url, storage.DOCUMENT_BYTES), url)

    @contextmanager
    def beating(
        self,
        interval: float = BEAT_SECONDS,
        on_fenced: Callable[[Fenced], None] | None = None,
        on_stop: Callable[[StopRequest], None] | None = None,
    ) -> Iterator[Lease]:
        """Beat from a background thread while the block runs.

        A beat that the store refuses is tried again at the next interval. Once fenced, the thread calls
        `on_fenced` (from the thread, once) and ends. Where somebody asks for a stop, it calls `on_stop` once, and goes
        on. The lease is not released at the end: call `release`.
        """
        stopped = threading.Event()
        run = contextvars.copy_context().run  # with the caller's storage settings
        arguments = (self._beat_until, interval, stopped, on_fenced, on_stop)
        thread = threading.Thread(target=run, args=arguments, name="danling-lease", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stopped.set()
            thread.join()

    def _beat_until(
        self,
        interval: float,
        stopped: threading.Event,
        on_fenced: Callable[[Fenced], None] | None,
        on_stop: Callable[[StopRequest], None] | None,
    ) -> None:
        with storage.using(retry=storage.Retry(deadline_seconds=interval, max_wait_seconds=interval / 4)):
            while not stopped.wait(interval):
                try:
                    self.beat()
                    if self.is_asked_to_stop and on_stop is not None:
                        on_stop(self.stop_request())
                        on_stop = None
                except Fenced as error:
                    logger.error("%s", error)
                    if on_fenced is not None:
                        on_fenced(error)
                    return
                except StorageError as error:
                    logger.warning("a beat of the lease failed and will be repeated: %s", error)

    def _check_own(self) -> None:
        """Check as `check`, and that no other process has this generation: not every store creates exclusively."""
        self.check()
        holder = _read(self.url, self.generation)
        if holder is not None and holder.token != self._owner.token and not holder.is_unknown:
            self.is_fenced = True
            raise Fenced(_fenced_message(self.url, self.generation, holder))

    def _write(self, owner: Owner) -> None:
        with _prompt():
            storage.write_bytes(_generation_url(self.url, self.generation), owner.dumps())
        self._owner = owner


def lease_url(parent_url: str) -> str:
    """Return the folder of the generation files of the run kept under `parent_url`."""
    return storage.join(parent_url, LEASE)


def check_generation(url: str, generation: int) -> list[str]:
    """Raise `Fenced` if a higher generation exists: for processes that write on behalf of an owner.

    Args:
        url: the lease's own URL, as in `Lease.url`.
        generation: what the owner acquired.

    Returns:
        the names of the lease's files.
    """
    names = _names(url)
    highest = max(_generations_in(names), default=0)
    if highest > generation:
        raise Fenced(_fenced_message(url, generation, _read(url, highest)))
    return names


def guard(url: str, generation: int) -> Callable[[], None]:
    """Return `check_generation` as a callable without arguments, as `CheckpointStore(guard=...)` wants it."""

    def check() -> None:
        check_generation(url, generation)

    return check


def ask_to_stop(parent_url: str, request: StopRequest) -> Owner | None:
    """Ask the run's owner, on any machine, to save and stop: it sees that at its next beat. Return the owner; None
    where nobody has the run in work.
    """
    generation, holder = _highest(lease_url(parent_url))
    if holder is None or holder.is_released or is_dead(holder):
        return None
    storage.write_json(storage.join(lease_url(parent_url), stop_name(generation)), asdict(request))
    return holder


def current_owner(parent_url: str) -> Owner | None:
    """Return the run's owner, by its files; None if it has none."""
    _, holder = _highest(lease_url(parent_url))
    return None if holder is None or holder.is_released else holder


def is_held(
    parent_url: str,
    *,
    stale_after_seconds: float = STALE_AFTER_SECONDS,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> bool:
    """Return whether the run's owner lives. One on another machine is watched until its beat changes, which takes as
    long as a beat, or until it is stale.
    """
    holder = current_owner(parent_url)
    if holder is None or is_dead(holder):
        return False
    if beats_on_this_machine(holder, now(), stale_after_seconds):
        return True
    began = monotonic()
    while monotonic() - began < stale_after_seconds:
        sleep(min(_POLL_SECONDS, stale_after_seconds / 4))
        found = current_owner(parent_url)
        if found != holder:
            return found is not None
    return False


def seems_held(parent_url: str) -> bool:
    """Return whether the owner has beaten within ten minutes, for a listing: at once, and so by the clocks of two
    machines."""
    holder = current_owner(parent_url)
    return holder is not None and not is_dead(holder) and time.time() - holder.beat_at < _LONG_SILENCE_SECONDS


def _fenced_message(url: str, generation: int, holder: Owner | None) -> str:
    new_owner = f" by {holder}" if holder else ""
    return f"generation {generation} of {url} was taken over{new_owner}; nothing more may be written for it"


def _generation_url(url: str, generation: int) -> str:
    return storage.join(url, f"{generation:06d}.json")


def _names(url: str) -> list[str]:
    with _prompt():
        return storage.list_names(url)


def _generations_in(names: Sequence[str]) -> list[int]:
    return [int(match[1]) for name in names if (match := _FILE.fullmatch(name)) and match[2] == "json"]


def _prompt() -> AbstractContextManager[None]:
    """Set short retries for the small files of a lease."""
    return storage.prompt(_ANSWER_SECONDS)


def _highest(url: str) -> tuple[int, Owner | None]:
    highest = max(_generations_in(_names(url)), default=0)
    return highest, _read(url, highest) if highest else None


def _read(url: str, generation: int) -> Owner | None:
    try:
        with _prompt():
            path = _generation_url(url, generation)
            return Owner.parse(storage.read_bytes(path, storage.DOCUMENT_BYTES), path)
    except NotFound:
        return None
