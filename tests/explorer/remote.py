"""A small run on a simulated store: killed at each step, its answers lost, resumed on the same machine or another."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, Literal
from unittest import mock

from danling_core.errors import Fenced, RunBusy, StorageError
from danling_core.mirror import process
from danling_core.mirror.checkpoints import CheckpointUploader
from danling_core.mirror.uploader import Uploader
from danling_core.runs.finding import list_runs
from danling_core.runs.folder import EVENTS
from danling_core.runs.lease import guard
from danling_core.storage.backend import TEMPORARY_MARK, mount
from tests.explorer.disk import Operation
from tests.explorer.invariants import RESUMES, STAYS, Broken, check_as_reader, check_end, end_of
from tests.explorer.owners import Change, check_owners
from tests.explorer.recorder import Recorder
from tests.explorer.runs import FIELDS, settled, telling
from tests.explorer.store import Kind, SimulatedStore
from tests.explorer.turns import Actor, History, Killed, Turns
from tests.small_runner import SmallRunner, config

Place = Literal["s3", "gcs", "disk"]
"""Where a run's root is: on a store, or on a disk that several machines share."""


class MirrorInLine:
    """Stand-in for the mirror's process: the real uploader, which makes a pass where one is asked for."""

    def __init__(
        self, local: str, remote: str, *, lease_url: str, generation: int, checkpoints: str, **rest: Any
    ) -> None:
        is_owner = guard(lease_url, generation)
        self._uploader = Uploader(local, remote, is_owner, generation=generation, checkpoints=checkpoints)
        self._failure: Fenced | None = None

    def request_soon(self) -> None:
        self._pass(is_full=False)

    def request_sync(self) -> None:
        self._pass(is_full=True)

    def wait_synced(self, timeout_seconds: float | None = None) -> bool:
        self._raise()
        return True

    def failure(self) -> Fenced | None:
        return self._failure

    def state(self) -> dict[str, Any]:
        return dict(self._uploader._state)

    def close(self, timeout_seconds: float | None = None) -> None:
        self._pass(is_final=True, is_full=True)
        self._raise()
        self._uploader.make_room()

    def _pass(self, **kind: bool) -> None:
        for _ in range(3):
            if self._failure is not None:
                return
            try:
                return self._uploader.run_pass(**kind)
            except Fenced as error:
                self._failure = error
            except (StorageError, OSError) as error:
                self._uploader.note_error(error)
        return None

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure


class World:
    """A place for runs, the disks of machines, and actors on them.

    Args:
        folder: for the disks.
        place: where the runs' root is.
        history: what happens to the actors.
        actors: who works; each one's scratch is the folder of its machine.
        is_recorded: actors stop before what they do to disks, too, where the root is on a store.
    """

    def __init__(
        self, folder: str, place: Place, history: History, actors: list[Actor], *, is_recorded: bool = True
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        self.root_url = root_url(folder, place)
        self.turns = Turns(actors, history)
        self.told: list[str] = []
        """What runs have said that the place has: `committed NAME`."""
        kind: Kind = "s3" if place == "disk" else place
        self.store = SimulatedStore(kind, self.turns.before, self.turns.answer, self.turns.clock.time)
        self.disk = Recorder(folder, self.turns.before)
        self.changes: list[Change] = []
        """What has changed for a reader of the place, in order."""
        if place == "disk":
            self.disk.after = self._note_operation
        else:
            self.store.changed = self._note_change
        self._is_recorded = is_recorded or place == "disk"
        self._place = place
        self._folder = folder

    def run(self) -> None:
        """Let the actors act to their ends. Raises what is not a death or the loss of a run to another owner."""
        with self.mounted(), self.disk.recording() if self._is_recorded else contextlib.nullcontext():
            self.turns.run()
        for actor in self.turns.actors:
            if isinstance(actor.error, Broken):
                raise actor.error
            if actor.error is not None and not isinstance(actor.error, Killed | Fenced | RunBusy):
                raise Broken(
                    RESUMES, f"{actor.name}: {type(actor.error).__name__}: {actor.error}"
                ) from actor.error

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        """Have the store answer for `sim://`, and mirrors deliver to it without a process."""
        upload = CheckpointUploader._upload_one

        def upload_and_tell(uploader: CheckpointUploader, name: str, *payload: Any) -> None:
            upload(uploader, name, *payload)
            self.told.append(f"committed {name}")

        with (
            settled(),
            mount("sim", self.store),
            mock.patch.object(process, "MirrorProcess", MirrorInLine),
            mock.patch.object(CheckpointUploader, "_upload_one", upload_and_tell),
            telling(self.told.append) if self._place == "disk" else contextlib.nullcontext(),
        ):
            yield

    def _note_operation(self, operation: Operation) -> None:
        name = operation.other or operation.path
        is_visible = operation.kind in ("rename", "link") or (
            operation.kind == "write" and name.endswith(EVENTS)
        )
        if operation.kind == "remove" and TEMPORARY_MARK not in name:
            self._note_change(f"DELETE {name}")
        elif is_visible:
            self._note_change(f"PUT {name}")

    def _note_change(self, change: str) -> None:
        turns = self.turns
        self.changes.append(Change(turns.acting, change, turns.waited_seconds, self._is_free(change)))

    def _is_free(self, change: str) -> bool:
        """Return whether a change is a new lease after one that was released."""
        method, _, path = change.partition(" ")
        folder, _, name = path.rpartition("/")
        if method != "PUT" or not folder.endswith("/lease") or name == "000001.json":
            return False
        before = f"{folder}/{int(name.partition('.')[0]) - 1:06d}.json"
        if self._place == "disk":
            with open(os.path.join(self._folder, before), "rb") as file:
                return b'"is_released": true' in file.read()
        return b'"is_released": true' in self.store.objects[before].data


def root_url(folder: str, place: Place) -> str:
    """Return the project root of a world."""
    return os.path.join(folder, "root") if place == "disk" else "sim://bucket/root"


class Exploration:
    """A run of `tests/small_runner.py` in worlds of one place, and what one that is never disturbed comes to.

    Args:
        folder: for the disks of the machines.
        place: where the run's root is.
        fields: of its config.
        is_recorded: see `World`.
    """

    def __init__(self, folder: str, place: Place, fields: dict[str, Any], *, is_recorded: bool) -> None:
        self.folder = folder
        self.place: Place = place
        self._fields = fields
        self._is_recorded = is_recorded
        first = Actor("first", lambda: self.train("one"), "one")
        world = self.world(History(), [first])
        world.run()
        self.steps = first.steps
        with world.mounted():
            [(found, _)] = list_runs(world.root_url)
            self.reference = end_of(found.url)
        self.objects = dict(world.store.objects)

    def world(self, history: History, actors: list[Actor]) -> World:
        return World(self.folder, self.place, history, actors, is_recorded=self._is_recorded)

    def train(self, machine: str) -> None:
        """Run, or resume what is there, on a machine."""
        scratch = os.path.join(self.folder, machine)
        SmallRunner(config(root_url(self.folder, self.place), **self._fields, scratch=scratch)).run()


class Disturbed(Exploration):
    """A run of two epochs that is killed, or loses an answer, at one of its steps; then it is resumed."""

    def __init__(self, folder: str, place: Place) -> None:
        super().__init__(folder, place, FIELDS, is_recorded=True)

    def check(self, history: History, machine: str) -> None:
        """Let the history happen to a run, look as a reader, and resume the run on a machine. Raises `Broken`."""

        def look_and_resume() -> None:
            check_as_reader(world.root_url, world.told)
            self.train(machine)

        first = Actor("first", lambda: self.train("one"), "one")
        world = self.world(history, [first, Actor("second", look_and_resume, machine)])
        world.run()
        with world.mounted():
            check_end(world.root_url, self.reference)


class TwoOwners(Exploration):
    """A run of one epoch that two machines want: one is paused, the other takes over, the first wakes up."""

    def __init__(self, folder: str, place: Place) -> None:
        params = {**FIELDS["params"], "samples": 10, "val_samples": 5}
        fields = {**FIELDS, "epoch_end": 1, "save_interval": None, "params": params}
        super().__init__(folder, place, fields, is_recorded=False)
        self.most_steps = 0
        self.most_steps = max(self.check(paused, 10**9) for paused in (0, len(self.steps) // 2))
        """How many steps a second owner makes at most, about: where it begins anew, or in the middle."""

    def check(self, paused_at: int, woken_at: int, lost_at: int | None = None) -> int:
        """Pause the first owner at its step `paused_at`, and the second at `woken_at`, until the first has ended.

        Args:
            lost_at: the step of the first owner whose answer is lost.

        Returns:
            the steps that the second owner made.

        Raises:
            Broken: something does not hold.
        """
        first = Actor("first", lambda: self.train("one"), "one")
        second = Actor("second", lambda: self.train("two"), "two")
        lost = None if lost_at is None else ("first", lost_at)
        switches = (("first", paused_at), ("second", woken_at))
        world = self.world(History(lost=lost, switches=switches), [first, second])
        world.run()
        check_owners(world.changes)
        with world.mounted():
            check_as_reader(world.root_url, world.told)
        world.turns.go_on(Actor("third", lambda: self.train("three"), "three"))
        world.run()
        with world.mounted():
            check_end(world.root_url, self.reference)
            [(folder, _)] = list_runs(world.root_url)
            status = folder.read_status()
            if status is None or not status.is_complete:
                raise Broken(STAYS, "the next start does not put right what a former owner has overwritten")
        return len(second.steps)


def a_folder() -> str:
    """Return a new folder, in memory where the machine has room there."""
    return tempfile.mkdtemp(prefix="danling-explorer-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
