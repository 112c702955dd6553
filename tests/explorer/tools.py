"""What commands do with finished runs (prune, push, pull, copy): stopped anywhere, and given again."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

from danling_core.checkpoints.store import CheckpointStore
from danling_core.runs.finding import list_runs
from danling_core.tools import prune, threads, transfer
from tests.explorer.disk import Crash, Image, Operation
from tests.explorer.invariants import NEEDED, RESUMES, Broken, check_as_reader, check_end, holding
from tests.explorer.remote import Exploration, Place, World, root_url
from tests.explorer.runs import FIELDS, LocalRun, another_process, recorded, settled
from tests.explorer.turns import Actor, History, InLine

MANY = {**FIELDS, "keep_last": 50}
"""A run that leaves a checkpoint of each save."""


def prune_all(root: str, target: str) -> None:
    """Remove what is not needed from the runs of a root: `danling prune`."""
    done = prune.carry_out(prune.plan(root, keep_best=True))
    assert all(each.reason is None for each in done), done


def copy_all(root: str, target: str) -> None:
    """Copy the runs of a root to another: `danling push` and `danling pull`."""
    for folder, _ in list_runs(root):
        transfer.copy_run(folder, target)


Act = Callable[[str, str], None]


class ToolOnDisk:
    """A command on a local root, with a crash after each of its operations.

    Args:
        root: the folder that is recorded and replaced; the runs are in `a`, and copies come to `b`.
        act: what the command does.
    """

    def __init__(self, root: str, act: Act) -> None:
        self.root = root
        self._act = act
        self._a, self._b = os.path.join(root, "a"), os.path.join(root, "b")
        os.makedirs(self._a)
        self.reference = LocalRun(self._a, **MANY).reference
        self.begin = Image.read_from(root)

    def record(self) -> list[Operation]:
        """Give the command, and return what it did to the disk."""
        with mock.patch.object(threads, "ThreadPoolExecutor", InLine):
            return recorded(self.root, self.begin, lambda recorder: self._act(self._a, self._b))

    def check(self, crash: Crash) -> None:
        """Look at what a crash has left, and give the command again. Raises `Broken`."""
        crash.image.write_to(self.root)
        check_as_reader(self._a, ["complete"])
        check_as_reader(self._b, has_power=crash.model == "killed")
        with settled(), another_process(), holding(RESUMES):
            self._act(self._a, self._b)
        check_done(self._act, self._a, self._b, self.reference)


class Tool(Exploration):
    """A command on a root, from or to a store, that is killed or loses an answer at one of its steps.

    Args:
        folder: for the disks.
        place: of the runs.
        target: of copies.
        act: what the command does.
    """

    def __init__(self, folder: str, place: Place, target: Place, act: Act) -> None:
        self._act, self._target = act, target
        super().__init__(folder, place, MANY, is_recorded=True)
        self._image = Image.read_from(folder)
        first = Actor("first", self._work, "one")
        self.prepared(History(), [first]).run()
        self.steps = first.steps

    def prepared(self, history: History, actors: list[Actor]) -> World:
        """Return a world in which the run is complete."""
        world = self.world(history, actors)
        self._image.write_to(self.folder)
        world.store.objects = dict(self.objects)
        return world

    def check(self, history: History) -> None:
        """Let the history happen to the command, look as a reader, and give it again. Raises `Broken`."""

        def look_and_repeat() -> None:
            check_as_reader(self._from, ["complete"])
            check_as_reader(self._to)
            self._work()

        first, second = Actor("first", self._work, "one"), Actor("second", look_and_repeat, "one")
        world = self.prepared(history, [first, second])
        world.run()
        world.check_changes()
        with world.mounted():
            check_done(self._act, self._from, self._to, self.reference)

    def _work(self) -> None:
        self._act(self._from, self._to)

    @property
    def _from(self) -> str:
        return root_url(self.folder, self.place)

    @property
    def _to(self) -> str:
        return f"{root_url(self.folder, self._target)}-copy"


def check_done(act: Act, root: str, target: str, reference: dict[str, Any]) -> None:
    """Check that a command has done what it is for, and that nothing is lost. Raises `Broken`."""
    check_end(root, reference)
    if act is copy_all:
        check_end(target, reference)
        return
    [(folder, _)] = list_runs(root)
    store = CheckpointStore(folder.checkpoints_url)
    kept = {record.name for record in store.records()}
    wanted = {record.name for name in ("latest", "best") if (record := store.pointed(name)) is not None}
    if kept != wanted:
        raise Broken(NEEDED, f"{sorted(kept)} are kept, wanted were {sorted(wanted)}")
