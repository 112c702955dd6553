"""An owner that was taken over, frozen or behind a slow network, changes nothing more of the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from danling_core import storage
from danling_core.errors import Fenced
from danling_core.identity.ids import identify
from danling_core.mirror.process import MirrorProcess
from danling_core.mirror.pull import pull
from danling_core.process_tree import start_time
from danling_core.runs.folder import RunFolder, read_log
from danling_core.runs.lease import Lease
from danling_core.session.open_run import open_run
from danling_core.tools.transfer import copy_run
from tests.processes import tree, wait_until
from tests.s3_faults import FaultyProxy
from tests.whole_runs import ROOT, config


@pytest.mark.long
def test_an_owner_that_wakes_up_after_a_takeover_writes_nothing(tmp_path: Path) -> None:
    slow = {"save_interval_steps": None, "log_interval": 1000, "params": {"step_seconds": 0.4}}
    wanted = config(tmp_path / "runs", epoch_end=1000, **slow)
    (tmp_path / "wanted.yaml").write_text(wanted.yamls())
    command = [sys.executable, "-m", "tests.storm_driver", str(tmp_path / "wanted.yaml")]
    with (tmp_path / "driver.log").open("wb") as log:
        driver = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        # Then nothing is written for the length of an epoch, so that no write is frozen half-way.
        wait_until(lambda: "checkpoint_committed" in events(tmp_path), "the first checkpoint", 60)
        (run,) = (path.parent for path in tmp_path.glob("runs/*/*/events.jsonl"))
        frozen = [pid for _, pid in tree(driver.pid)]
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        lease = Lease.acquire(
            RunFolder(str(run)).lease_parent_url, "the next owner", stale_after_seconds=0.5, wait_seconds=10
        )
        assert lease.generation == 2
        before = written(run)
        for pid in frozen:
            if start_time(pid) is not None:
                os.kill(pid, signal.SIGCONT)
        assert driver.wait(90) == 1
        assert "taken over" in (tmp_path / "driver.log").read_text()
        assert written(run) == before
    finally:
        driver.kill()  # frozen or not; the others follow
        driver.wait()


class HeldUp:
    """Keeps the requests that write one file on their way, from `begin` until `let_go`."""

    def __init__(self, proxy: FaultyProxy, method: str, end: str) -> None:
        self.begun = self.is_over = False
        self.has_arrived, self.let_go = threading.Event(), threading.Event()
        self._wanted = (method, end)
        proxy.intercept = self

    def __call__(self, method: str, path: str) -> None:
        if self.begun and not self.is_over and method == self._wanted[0] and path.endswith(self._wanted[1]):
            self.is_over = True  # only the first one
            self.has_arrived.set()
            assert self.let_go.wait(60)


class RefusedLate:
    """Answers the first write of one file with a 503 that comes after `taken` is set, and notes those after it."""

    def __init__(self, proxy: FaultyProxy, end: str) -> None:
        self.has_failed, self.taken = threading.Event(), threading.Event()
        self.landed: list[str] = []
        self._end = end
        proxy.intercept = self

    def __call__(self, method: str, path: str) -> str | None:
        if method != "PUT" or not path.endswith(self._end):
            return None
        if self.taken.is_set():
            self.landed.append(path)
            return None
        self.has_failed.set()
        self.taken.wait(60)
        return "503"


def mirrored(local: Path, remote: str, lease: Lease) -> MirrorProcess:
    return MirrorProcess(str(local), remote, lease_url=lease.url, generation=lease.generation)


def taken_over(parent: str) -> Lease:
    return Lease.acquire(parent, "the next owner", stale_after_seconds=0.2, wait_seconds=10)


def test_a_write_that_is_held_up_until_after_a_takeover_changes_no_log(
    s3_root: str, s3_proxy: FaultyProxy, tmp_path: Path
) -> None:
    remote = storage.join(s3_root, "digits-1", "20261121-103249-123456")
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    (old / "events.jsonl").write_text("one\n")
    first = Lease.acquire(storage.parent(remote), "the first owner")
    held = HeldUp(s3_proxy, "PUT", "/events/000001.jsonl")
    mirror = mirrored(old, remote, first)
    mirror.request_sync()
    assert mirror.wait_synced(timeout_seconds=60)
    held.begun = True
    (old / "events.jsonl").write_text("one\nold\n")
    mirror.request_sync()
    assert held.has_arrived.wait(60)
    second = taken_over(storage.parent(remote))
    pull(RunFolder(remote), str(new))
    (new / "events.jsonl").write_text("one\nnew\n")
    with mirrored(new, remote, second) as next_mirror:
        next_mirror.request_sync()
        assert next_mirror.wait_synced(timeout_seconds=60)
        held.let_go.set()
        with pytest.raises(Fenced):
            mirror.close()
        assert read_log(remote, "events.jsonl") == b"one\nnew\n"
    assert read_log(remote, "events.jsonl") == b"one\nnew\n"


@pytest.mark.long
def test_a_write_that_fails_is_not_tried_again_after_a_takeover(
    s3_root: str, s3_proxy: FaultyProxy, tmp_path: Path
) -> None:
    remote = storage.join(s3_root, "digits-1", "20261121-103249-123456")
    (tmp_path / "status.json").write_text("old")
    first = Lease.acquire(storage.parent(remote), "the first owner")
    late = RefusedLate(s3_proxy, "/status.json")
    mirror = mirrored(tmp_path, remote, first)
    mirror.request_sync()
    assert late.has_failed.wait(60)
    taken_over(storage.parent(remote))
    late.taken.set()
    with pytest.raises(Fenced):
        mirror.close()
    assert late.landed == []
    assert not storage.exists(storage.join(remote, "status.json"))


def opening(root: str, tmp_path: Path) -> None:
    wanted = config(root, scratch=str(tmp_path / "scratch"))
    open_run(wanted, identify(wanted, None))


def copying(root: str, tmp_path: Path) -> None:
    folder = tmp_path / "digits-0123456789abcdef" / "20261121-103249-123456"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("epoch_end: 1\n")
    copy_run(RunFolder(str(folder)), root)


@pytest.mark.long
@pytest.mark.parametrize("begin", [opening, copying])
def test_a_config_that_fails_to_arrive_is_not_sent_again_after_a_takeover(
    begin: Callable[[str, Path], None], s3_root: str, s3_proxy: FaultyProxy, tmp_path: Path
) -> None:
    late = RefusedLate(s3_proxy, "/config.yaml")
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(begin, s3_root, tmp_path)
        try:
            assert late.has_failed.wait(60)
            [name] = storage.list_names(s3_root)
            taken_over(storage.join(s3_root, name))
        finally:
            late.taken.set()
        with pytest.raises(Fenced):
            begun.result(60)
    assert late.landed == []


def events(root: Path) -> str:
    return "".join(path.read_text() for path in root.glob("runs/*/*/events.jsonl"))


def written(run: Path) -> dict[str, bytes]:
    """What a reader goes by. A payload that has no record does not exist, and the text log is for people."""
    files = [path for path in run.rglob("*") if path.is_file()]
    ignored = ("run.log", "logs", "data")
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in files
        if not set(ignored) & set(path.relative_to(run).parts)
    }
