"""A small run on a simulated store: killed at each step, its answers lost, resumed on the same machine or another."""

from __future__ import annotations

import contextlib
import functools
import os
import re
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
from tests.explorer.invariants import RESUMES, STAYS, Broken, Reader, check_end, check_replaced, end_of
from tests.explorer.owners import Change, check_owners, is_guarded
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

    def check_changes(self) -> None:
        """Check what readers could see at any time. Raises `Broken`."""
        check_replaced(change.what for change in self.changes)

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
        turns, actor = self.turns, self.turns.acting
        guarded = None if self._place == "disk" else is_guarded(actor.steps)
        self.changes.append(Change(actor.name, change, turns.waited_seconds, self._is_free(change), guarded))

    def _is_free(self, change: str) -> bool:
        """Return whether a change is a new lease after one that was released."""
        method, _, path = change.partition(" ")
        folder, _, name = path.rpartition("/")
        generation = re.fullmatch(r"(\d{6,})\.json", name)
        if method != "PUT" or not folder.endswith("/lease") or not generation or int(generation[1]) == 1:
            return False
        before = f"{folder}/{int(generation[1]) - 1:06d}.json"
        if self._place == "disk":
            with (
                contextlib.suppress(FileNotFoundError),
                open(os.path.join(self._folder, before), "rb") as file,
            ):
                return b'"is_released": true' in file.read()
            return False
        found = self.store.objects.get(before)
        return found is not None and b'"is_released": true' in found.data


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

    def check(self, history: History, *machines: str) -> list[int]:
        """Let the history happen to a run, look as a reader, and resume the run on one machine after the other.

        Returns:
            how many steps each of them made.

        Raises:
            Broken: something does not hold.
        """

        def look_and_resume(machine: str) -> None:
            with world.turns.outside():
                reader.look(world.told)
            self.train(machine)

        first = Actor("first", lambda: self.train("one"), "one")
        others = [
            Actor(name, functools.partial(look_and_resume, machine), machine)
            for name, machine in zip(("second", "third"), machines, strict=False)
        ]
        world = self.world(history, [first, *others])
        reader = Reader(world.root_url)
        world.run()
        world.check_changes()
        with world.mounted():
            reader.look(world.told)
            check_end(world.root_url, self.reference)
        return [len(each.steps) for each in others]


class TwoOwners(Exploration):
    """A run of one epoch that two machines want: one is paused, the other takes over, the first wakes up.

    The clocks of the machines are an hour apart.
    """

    def __init__(self, folder: str, place: Place) -> None:
        params = {**FIELDS["params"], "samples": 10, "val_samples": 5}
        fields = {**FIELDS, "epoch_end": 1, "save_interval": None, "params": params}
        super().__init__(folder, place, fields, is_recorded=False)
        halves = (self.play(paused, 10**9)[1] for paused in (0, len(self.steps) // 2))
        self.most_steps = max(len(second.steps) for second in halves)
        """How many steps a second owner makes at most, about: where it begins anew, or in the middle."""

    def play(self, paused_at: int, woken_at: int, lost_at: int | None = None) -> tuple[World, Actor]:
        """Pause the first owner at its step `paused_at`, and the second at `woken_at`, until the first has ended.

        Args:
            lost_at: the step of the first owner whose answer is lost.

        Returns:
            what is there then, and the second owner.
        """
        first = Actor("first", lambda: self.train("one"), "one")
        second = Actor("second", lambda: self.train("two"), "two", clock_ahead_seconds=3600)
        lost = None if lost_at is None else ("first", lost_at)
        switches = (("first", paused_at), ("second", woken_at))
        world = self.world(History(lost=lost, switches=switches), [first, second])
        world.run()
        return world, second

    def check(self, paused_at: int, woken_at: int, lost_at: int | None = None) -> None:
        """Let two owners act as `play` says, and a third one start the run again. Raises `Broken`."""
        world, _ = self.play(paused_at, woken_at, lost_at)
        check_owners(world.changes)
        reader = Reader(world.root_url)
        with world.mounted():
            reader.look(world.told)
        third = Actor("third", lambda: self.train("three"), "three", clock_ahead_seconds=-3600)
        world.turns.go_on(third)
        world.run()
        world.check_changes()
        with world.mounted():
            reader.look(world.told)
            check_end(world.root_url, self.reference)
            [(folder, _)] = list_runs(world.root_url)
            status = folder.read_status()
            if status is None or not status.is_complete:
                raise Broken(STAYS, "the next start does not put right what a former owner has overwritten")


def a_folder() -> str:
    """Return a new folder, in memory where the machine has room there."""
    return tempfile.mkdtemp(prefix="danling-explorer-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
