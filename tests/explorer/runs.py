"""A small run on a local disk, with a crash after each of its operations, and what must hold in each state."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from danling_core.checkpoints.saver import BackgroundSaver
from danling_core.checkpoints.store import CheckpointStore
from danling_core.config import Config
from danling_core.runs import lease_owner, metadata
from danling_core.runs.finding import list_runs
from tests.explorer.disk import Crash, Image, Operation
from tests.explorer.invariants import RESUMES, check_as_reader, check_end, end_of, holding
from tests.explorer.recorder import Recorder
from tests.small_runner import SmallRunner, config

FIELDS: dict[str, Any] = {"save_interval": 2, "log": False, "params": {"width": 3, "dropout": 0.25}}
"""A run of two epochs with a checkpoint in the middle of each."""


_parsed = functools.lru_cache(Config.from_yamls)  # every run here has the same config


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Have a run do the same operations in the same order each time: a save is written before training goes on."""

    def submit(saver: BackgroundSaver, job: Any) -> None:
        try:
            saver._write(job)
        except Exception as error:
            saver._fail(job, error)
        finally:
            saver._give_back(job.staging)

    with (
        mock.patch.object(BackgroundSaver, "_submit", submit),
        mock.patch.object(metadata, "collect", lambda *code, **facts: {"packages": {}}),
        mock.patch.object(Config, "from_yamls", _parsed),
        mock.patch.object(logging.getLogger("danling"), "handlers", []),  # the dead close none
    ):
        yield


@contextlib.contextmanager
def another_process() -> Iterator[None]:
    """Let every process of before be dead: this one begins later."""
    global _started
    _started += 1
    with mock.patch.object(lease_owner, "start_time", lambda pid, now=_started: now):
        yield


_started = 0


@contextlib.contextmanager
def telling(tell: Callable[[str], None]) -> Iterator[None]:
    """Call `tell` with `committed NAME` for each checkpoint, once its caller may rely upon it."""
    publish = CheckpointStore.publish

    @functools.wraps(publish)
    def publish_and_tell(store: CheckpointStore, *payload: Any, **options: Any) -> Any:
        record = publish(store, *payload, **options)
        tell(f"committed {record.name}")
        return record

    with mock.patch.object(CheckpointStore, "publish", publish_and_tell):
        yield


def recorded(root: str, begin: Image, act: Callable[[Recorder], None]) -> list[Operation]:
    """Return what `act` does to a folder that is `begin` before."""
    begin.write_to(root)
    recorder = Recorder(root)
    with settled(), another_process(), recorder.recording():
        act(recorder)
    return recorder.operations


class LocalRun:
    """The run of `tests/small_runner.py`, from nothing or from what is there.

    Args:
        root: the folder that is recorded and replaced.
    """

    def __init__(self, root: str, **fields: Any) -> None:
        self.root = root
        self.config: Config = config(root, **{**FIELDS, **fields})
        self.record(Image())
        [(folder, _)] = list_runs(root)
        self.reference = end_of(folder.url)

    def record(self, begin: Image) -> list[Operation]:
        """Run, or resume what is there, and return what that did to the disk."""

        def run(recorder: Recorder) -> None:
            with telling(recorder.tell):
                SmallRunner(self.config).run()
            recorder.tell("complete")

        return recorded(self.root, begin, run)

    def check(self, crash: Crash, had_power: bool = True) -> None:
        """Raise `Broken` where something does not hold in the state that a crash has left, or after a resume.

        Args:
            crash: of the run.
            had_power: what was there at its beginning is not what a loss of power has left.
        """
        crash.image.write_to(self.root)
        check_as_reader(self.root, crash.told, has_power=had_power and crash.model == "killed")
        with settled(), another_process(), holding(RESUMES):
            SmallRunner(self.config).run()
        check_end(self.root, self.reference)
