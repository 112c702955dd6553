"""Long histories of owners, troubles and readers, made by Hypothesis: see tests/explorer/machines.py."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from danling_core import storage
from danling_core.checkpoints.record import Record
from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import NotFound
from danling_core.mirror.pull import pull
from danling_core.mirror.uploader import Uploader
from danling_core.runs.folder import EVENTS, RESULTS, STATUS, RunFolder, read_log
from danling_core.writers.events import EventLog
from tests.explorer.invariants import (
    COMMITTED,
    COMPLETE,
    GROWS,
    NEEDED,
    NOT_LOST,
    POINTERS,
    WHOLE,
    Broken,
    check_checkpoints,
    holding,
)
from tests.explorer.machines import ROOT, Cluster, Process, Trouble
from tests.explorer.store import Kind

POINTER_NAMES = ("latest", "best", "epoch-1", "epoch-2")
MACHINES = st.integers(1, 3)
WHICH = st.sampled_from([0, 0, 0, 1, 2])
"""The newest owner mostly, and those before it."""


def troubles(requests: int) -> st.SearchStrategy[Trouble | None]:
    """Return what may happen to something that makes so many requests, about."""
    kinds = st.sampled_from(["killed", "lost", "paused", "lost, then paused"])
    return st.none() | st.builds(Trouble, kinds, st.integers(0, requests), MACHINES)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Owners(RuleBasedStateMachine):
    """Processes that begin, beat, stall, wake up, release and die, and clocks that are set.

    What they write is for a subclass to say.
    """

    kind: ClassVar[Kind] = "s3"
    is_strict: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster(self.kind, is_strict=self.is_strict)
        self.cluster.meanwhile = self.meanwhile
        self.told: list[str] = []
        """Checkpoints that an owner has called committed."""

    def teardown(self) -> None:
        self.cluster.close()

    def meanwhile(self, machine: int) -> None:
        """Let another process begin and work."""

    def begin(self, machine: int, trouble: Trouble | None = None) -> Process | None:
        raise NotImplementedError

    def work(self, process: Process) -> None:
        """Let the first owner do what there is to lose."""

    @property
    def writers(self) -> list[Process]:
        """Return those that live and have, or had, the run."""
        return [each for each in self.cluster.processes if each.is_alive and each.lease is not None]

    def writer(self, which: int) -> Process:
        """Return one of them; the newest is number 0."""
        return self.writers[-1 - which % len(self.writers)]

    @initialize(machine=MACHINES)
    def first(self, machine: int) -> None:
        process = self.begin(machine)
        assert process is not None
        self.work(process)

    @rule(machine=MACHINES, trouble=troubles(8))
    def compete(self, machine: int, trouble: Trouble | None) -> None:
        """Begin, whoever owns the run."""
        self.begin(machine, trouble)

    @rule(machine=MACHINES, is_dead=st.booleans(), trouble=troubles(25))
    def go_on(self, machine: int, is_dead: bool, trouble: Trouble | None) -> None:
        """Begin where the owner has died, or hangs."""
        owner = self.cluster.owner
        if owner is not None:
            owner.is_alive = owner.is_alive and not is_dead
            owner.is_stalled = True
        self.cluster.sleep(31.0)
        self.begin(machine, trouble)

    @precondition(lambda self: self.writers)
    @rule(which=WHICH, is_last=st.booleans(), trouble=troubles(4))
    def say(self, which: int, is_last: bool, trouble: Trouble | None) -> None:
        """Beat, or release and end; who was stalled is awake then."""
        process = self.writer(which)
        assert process.lease is not None
        process.is_stalled = False
        self.cluster.act(process, process.lease.release if is_last else process.lease.beat, trouble)
        process.is_alive = process.is_alive and not is_last

    @rule(seconds=st.integers(1, 45), machine=MACHINES, ahead=st.integers(-1500, 1500))
    def wait(self, seconds: int, machine: int, ahead: int) -> None:
        """Let time pass, and somebody set a clock."""
        self.cluster.ahead[machine] = ahead
        for _ in range(seconds):
            self.cluster.sleep(1.0)

    @invariant()
    def readers_find_good_checkpoints(self) -> None:
        store = CheckpointStore(f"{ROOT}/checkpoints", scratch=self.cluster.folder)
        records = check_checkpoints(store, POINTER_NAMES)
        with holding(POINTERS):
            if records and store.pointed("latest") is None:
                raise Broken(POINTERS, "there are checkpoints, and none is the latest")
        if self.told and not any(record.name >= self.told[-1] for record in records):
            raise Broken(NOT_LOST, f"{self.told[-1]} is not among {[record.name for record in records]}")


class StoreMachine(Owners):
    """Owners that commit, point and prune in a checkpoint store at a URL."""

    is_strict = False

    def begin(self, machine: int, trouble: Trouble | None = None) -> Process | None:
        process = self.cluster.acquire(machine, trouble)
        if process is None:
            return None
        process.parts.store = CheckpointStore(
            f"{ROOT}/checkpoints",
            guard=self.cluster.guard(process),
            scratch=self.cluster.folder,
            clock=lambda: self.cluster.clock(machine),
        )
        records = self.cluster.act(process, process.parts.store.records)
        process.step = records[0].step if records else 0
        return process

    def meanwhile(self, machine: int) -> None:
        self.cluster.sleep(31.0)
        process = self.begin(machine)
        if process is not None:
            self._commit(process, ["latest"])
            self._prune(process, 1)

    def _commit(self, process: Process, names: list[str], trouble: Trouble | None = None) -> None:
        process.step += 1
        assert process.lease is not None
        attempt = f"{process.lease.generation}.0"

        def commit() -> Record:
            payload = f"{process.step} of {attempt} by {process.pid}".encode()
            store: CheckpointStore = process.parts.store
            return store.commit(
                lambda file: file.write(payload), step=process.step, attempt=attempt, info={}, names=names
            )

        record = self.cluster.act(process, commit, trouble)
        if record is not None and process is self.cluster.owner:
            self.told.append(record.name)

    def _prune(self, process: Process, keep_last: int, trouble: Trouble | None = None) -> None:
        reader = CheckpointStore(f"{ROOT}/checkpoints", scratch=self.cluster.folder)
        with self.cluster.reading():
            newest = {record.name for record in reader.records()[:keep_last]}
        self.cluster.act(process, lambda: process.parts.store.prune(keep_last), trouble)
        with self.cluster.reading():
            left = {record.name for record in reader.records()}
        is_alone = trouble is None or not trouble.kind.endswith(
            "paused"
        )  # otherwise another one may have pruned more
        if is_alone and not newest <= left:
            raise Broken(NEEDED, f"{sorted(newest - left)} of the newest {keep_last} are gone")

    @precondition(lambda self: self.writers)
    @rule(which=WHICH, names=st.sets(st.sampled_from(["best", "epoch-1", "epoch-2"])), trouble=troubles(25))
    def commit(self, which: int, names: set[str], trouble: Trouble | None) -> None:
        self._commit(self.writer(which), ["latest", *sorted(names)], trouble)

    @precondition(lambda self: self.writers)
    @rule(which=WHICH, keep_last=st.integers(1, 3), trouble=troubles(30))
    def prune(self, which: int, keep_last: int, trouble: Trouble | None) -> None:
        self._prune(self.writer(which), keep_last, trouble)

    @precondition(lambda self: self.writers)
    @rule(
        which=WHICH, name=st.sampled_from(["best", "epoch-1"]), older=st.integers(0, 2), trouble=troubles(10)
    )
    def point(self, which: int, name: str, older: int, trouble: Trouble | None) -> None:
        """Point at what is there; nobody prunes that meanwhile."""
        process = self.writer(which)
        if trouble is not None and trouble.kind.endswith("paused"):
            return
        records = self.cluster.act(process, process.parts.store.records)
        if records and process is self.cluster.owner:
            record = records[min(older, len(records) - 1)]
            self.cluster.act(process, lambda: process.parts.store.point(name, record), trouble)


class MirrorMachine(Owners):
    """Owners that write on the disk of their machine, and bring it to the store in passes."""

    is_strict = True

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, set[bytes]] = {RESULTS: set(), STATUS: set()}
        self.log = b""
        self.count = 0

    def begin(self, machine: int, trouble: Trouble | None = None) -> Process | None:
        if self._remote_status() == "complete":
            return None
        process = self.cluster.acquire(machine)
        if process is None:
            return None
        self._end_others_on(machine, process)
        assert process.lease is not None
        work, attempt = self.cluster.path(f"machine-{machine}"), f"{process.lease.generation}.0"
        os.makedirs(work, exist_ok=True)

        def prepare() -> bool:
            pull(RunFolder(ROOT), work)
            return True

        if self.cluster.act(process, prepare, trouble) is None:
            process.is_alive = False
            return None
        process.parts.work = work
        process.parts.log = EventLog(os.path.join(work, EVENTS), attempt, lambda: self.cluster.now)
        process.parts.store = CheckpointStore(
            os.path.join(work, "checkpoints"), clock=lambda: self.cluster.clock(machine)
        )
        process.parts.uploader = Uploader(
            work,
            ROOT,
            self.cluster.guard(process),
            generation=process.lease.generation,
            clock=lambda: self.cluster.now,
        )
        newest, bad = process.parts.store.newest_good()
        process.step = 0 if newest is None else newest.step
        if newest is None and bad:
            raise Broken(COMMITTED, bad)
        is_behind = self.told and (newest is None or newest.step < int(self.told[-1].partition("-")[0]))
        if process is self.cluster.owner and is_behind:
            raise Broken(
                NOT_LOST, f"a resume goes on from {newest and newest.name}, not from {self.told[-1]}"
            )
        process.parts.log.emit("started")
        return process

    def _end_others_on(self, machine: int, process: Process) -> None:
        """Let a machine's disk have one process at a time that writes there."""
        for other in self.cluster.processes:
            if other.machine == machine and other is not process:
                other.is_alive = False

    def work(self, process: Process) -> None:
        for names in (["latest", "best"], ["latest"]):
            self._commit(process, names)
        self._write(process, RESULTS)
        self._pass(process)

    def meanwhile(self, machine: int) -> None:
        if machine == self.cluster.acting.machine:
            return
        self.cluster.sleep(31.0)
        process = self.begin(machine)
        if process is not None:
            self._commit(process, ["latest"])
            self._pass(process)

    def _remote_status(self) -> str | None:
        found = self.cluster.store.objects.get(f"{ROOT}/{STATUS}")
        return None if found is None else json.loads(found.data)["status"]

    def _commit(self, process: Process, names: list[str]) -> None:
        process.step += 1
        assert process.lease is not None
        payload = f"{process.step} by {process.pid}".encode() * 1000
        process.parts.store.commit(
            lambda file: file.write(payload),
            step=process.step,
            attempt=f"{process.lease.generation}.0",
            info={},
            names=names,
        )
        process.parts.log.emit("checkpoint_committed", step=process.step)

    def _write(self, process: Process, name: str, **facts: Any) -> None:
        self.count += 1
        document = {"by": process.pid, "count": self.count, "longer": "x" * self.count, **facts}
        path = os.path.join(process.parts.work, name)
        storage.write_json(path, document, is_durable=False)
        self.written[name].add(storage.read_bytes(path))

    def _pass(self, process: Process, trouble: Trouble | None = None, is_final: bool = False) -> bool:
        uploader: Uploader = process.parts.uploader

        def run_pass() -> bool:
            uploader.run_pass(is_final=is_final)
            return True

        is_done = bool(self.cluster.act(process, run_pass, trouble))
        committed = uploader._state["committed"]
        if process is self.cluster.owner and committed is not None:
            self.told.append(committed["record"])
        if is_done:
            assert process is self.cluster.owner, "a pass of a former owner must fail"
            with self.cluster.reading():
                self._check_brought_up(process, is_final)
        return is_done

    def _check_brought_up(self, process: Process, is_final: bool) -> None:
        """Check that the store has what the owner has.

        A former owner's late request may have replaced a small file. The last pass finds that, and repairs it.
        """
        local, remote = (
            process.parts.store,
            CheckpointStore(f"{ROOT}/checkpoints", scratch=self.cluster.folder),
        )
        here, there = local.records(), remote.records()
        assert {record.name for record in here} <= {record.name for record in there}
        assert read_log(ROOT, EVENTS) == storage.read_bytes(os.path.join(process.parts.work, EVENTS))
        if not is_final and any(each.late for each in self.cluster.processes):
            return
        assert remote.pointed("latest") == local.pointed("latest")
        for name in self.written:
            path = os.path.join(process.parts.work, name)
            if os.path.exists(path):
                assert storage.read_bytes(path) == storage.read_bytes(f"{ROOT}/{name}")

    @precondition(lambda self: self.writers)
    @rule(
        which=WHICH,
        names=st.sets(st.sampled_from(["best", "epoch-1"])),
        keep_last=st.none() | st.integers(1, 3),
    )
    def train(self, which: int, names: set[str], keep_last: int | None) -> None:
        """Do on the disk what an epoch does."""
        process = self.writer(which)
        self._commit(process, ["latest", *sorted(names)])
        if keep_last is not None:
            process.parts.store.prune(keep_last)
        self._write(process, RESULTS)
        self._write(process, STATUS, status="running")

    @precondition(lambda self: self.writers)
    @rule(which=WHICH)
    def emit(self, which: int) -> None:
        self.count += 1
        self.writer(which).parts.log.emit("epoch", count=self.count)

    @precondition(lambda self: self.writers)
    @rule(which=WHICH)
    def die_in_a_line(self, which: int) -> None:
        process = self.writer(which)
        with open(os.path.join(process.parts.work, EVENTS), "ab") as file:
            file.write(b'{"event": "half')
        process.is_alive = False

    @precondition(lambda self: self.writers)
    @rule(which=WHICH, trouble=troubles(40), is_final=st.booleans())
    def run_pass(self, which: int, trouble: Trouble | None, is_final: bool) -> None:
        self._pass(self.writer(which), trouble, is_final)

    @precondition(lambda self: self.writers and self.writer(0).step > 3)
    @rule(which=WHICH, trouble=troubles(40))
    def complete(self, which: int, trouble: Trouble | None) -> None:
        """End as a run does: the rest is in the store before the status is written."""
        process = self.writer(which)
        self._commit(process, ["latest", "best"])
        self._write(process, RESULTS)
        if self._pass(process):
            self._write(process, STATUS, status="complete")
            self._pass(process, trouble, is_final=True)
        process.is_alive = False

    @invariant()
    def readers_find_whole_files(self) -> None:
        for name, versions in self.written.items():
            found = self.cluster.store.objects.get(f"{ROOT}/{name}")
            if found is not None and found.data not in versions:
                raise Broken(WHOLE, f"{name} is {found.data!r}")

    @invariant()
    def the_log_grows(self) -> None:
        try:
            found = read_log(ROOT, EVENTS)
        except NotFound:
            found = b""
        if not found.startswith(self.log) or not (found or b"\n").endswith(b"\n"):
            raise Broken(GROWS, f"{self.log!r} was read before, and now {found!r}")
        self.log = found

    @invariant()
    def complete_is_complete(self) -> None:
        if self._remote_status() != "complete":
            return
        status = json.loads(self.cluster.store.objects[f"{ROOT}/{STATUS}"].data)
        results = json.loads(self.cluster.store.objects[f"{ROOT}/{RESULTS}"].data)
        if results["by"] == status["by"] and results["count"] != status["count"] - 1:
            raise Broken(COMPLETE, f"the results are number {results['count']} of {status['count']}")


def explored(machine: type[Owners], kind: Kind, examples: int, steps: int) -> None:
    """Let Hypothesis make histories; the same ones each time."""
    chosen = type(f"{machine.__name__}_{kind}", (machine,), {"kind": kind})
    run_state_machine_as_test(
        chosen,
        settings=settings(
            derandomize=True,
            deadline=None,
            database=None,
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize(("machine", "kind"), [(StoreMachine, "s3"), (MirrorMachine, "gcs")])
def test_no_history_breaks_what_must_hold(machine: type[Owners], kind: Kind) -> None:
    explored(machine, kind, 10, 30)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["s3", "gcs"])
@pytest.mark.parametrize("machine", [StoreMachine, MirrorMachine])
def test_no_long_history_breaks_what_must_hold(machine: type[Owners], kind: Kind) -> None:
    explored(machine, kind, 300, 50)


@pytest.mark.parametrize("trouble", ["paused", "lost, then paused"])
def test_a_former_owner_writes_no_record_or_pointer_over_a_newer_one(trouble: Any) -> None:
    """Pause a commit before each of its requests, while another owner commits and prunes."""
    for request in range(12):
        machine = StoreMachine()
        try:
            first = machine.begin(1)
            assert first is not None
            machine._commit(first, ["latest"])
            machine._commit(first, ["latest"], Trouble(trouble, request, 2))
            machine.readers_find_good_checkpoints()
        finally:
            machine.teardown()
