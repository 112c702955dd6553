"""Real processes for what tests/unit/test_mirror.py tries without them."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from danling_core import storage
from danling_core.checkpoints import CheckpointStore
from danling_core.config import Config
from danling_core.errors import Fenced, NotFound, StorageError, StoreUnavailable
from danling_core.mirror.process import MirrorProcess
from danling_core.process_tree import END
from danling_core.runs.folder import read_log
from danling_core.runs.lease import Lease
from danling_core.session.delivery import Delivery
from tests.gcs_server import GCSServer
from tests.processes import wait_until
from tests.unit.test_mirror import append, commit, fill, local  # noqa: F401


def test_a_mirror_ends_while_a_fork_holds_its_pipe_open(local: Path, gcs_server: GCSServer) -> None:
    remote = "gs://danling/root/digits-1/20261121-103249-123456"
    fill(local)
    lease = Lease.acquire(storage.parent(remote), "driver")
    mirror = MirrorProcess(
        os.fspath(local), remote, lease_url=lease.url, generation=lease.generation, interval_seconds=600
    )
    worker = os.fork()
    if worker == 0:  # as a loader's worker is left at the end of a run
        signal.pause()
    try:
        mirror.close(timeout_seconds=60)
        assert read_log(remote, "events.jsonl")
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        lease.release()
        storage.delete(storage.parent(remote), recursive=True)


def test_a_mirror_process_delivers_through_an_absence_of_the_store(
    local: Path, gcs_server: GCSServer
) -> None:
    remote = "gs://danling/root/digits-1/20261121-103249-123456"
    record = fill(local)
    lease = Lease.acquire(storage.parent(remote), "driver")
    with MirrorProcess(
        os.fspath(local), remote, lease_url=lease.url, generation=lease.generation, interval_seconds=600
    ) as mirror:
        mirror.request_sync()
        assert mirror.wait_synced(timeout_seconds=60)
        assert mirror.state()["committed"]["record"] == record.name
        is_away = threading.Event()

        def reset_a_while(method: str, path: str) -> str | None:
            is_away.set()
            return "reset" if len(gcs_server.requests) < requests + 5 else None

        requests = len(gcs_server.requests)
        gcs_server.fault = reset_a_while
        append(local / "events.jsonl", "last\n")
        commit(local, 6, "latest")
        mirror.request_soon()
        assert is_away.wait(60)
    assert read_log(remote, "events.jsonl").endswith(b"last\n")
    newest = CheckpointStore(storage.join(remote, "checkpoints")).newest_good()[0]
    assert newest is not None and newest.step == 6
    assert mirror.state()["error"] is None


def test_a_mirror_imports_nothing_of_the_users_folder(
    local: Path, gcs_server: GCSServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("queue.py", "secrets.py"):
        (tmp_path / name).write_text("raise ImportError('this is the module of the user')\n")
    monkeypatch.chdir(tmp_path)
    append(local / "run.log", "line\n")
    with MirrorProcess(os.fspath(local), "gs://danling/c/d"):
        pass
    assert read_log("gs://danling/c/d", "run.log") == b"line\n"


def test_a_mirror_process_that_is_fenced_stops_and_says_so(local: Path, gcs_server: GCSServer) -> None:
    remote = "gs://danling/fenced/digits-1/20261121-103249-123456"
    fill(local)
    first = Lease.acquire(storage.parent(remote), "first")
    first.release()
    Lease.acquire(storage.parent(remote), "second")
    mirror = MirrorProcess(os.fspath(local), remote, lease_url=first.url, generation=1)
    mirror.request_sync()
    with pytest.raises(Fenced, match="was taken over"):
        mirror.wait_synced(timeout_seconds=60)
    with pytest.raises(Fenced):
        mirror.close()
    with pytest.raises(NotFound):
        storage.read_bytes(storage.join(remote, "status.json"))


def test_a_mirror_without_its_bucket_ends_with_the_reason(local: Path, gcs_server: GCSServer) -> None:
    fill(local)
    mirror = MirrorProcess(os.fspath(local), "gs://nowhere/run", drain_seconds=0)
    with pytest.raises(StorageError, match="nowhere"):
        mirror.close(timeout_seconds=60)


def test_a_mirror_that_dies_while_it_is_waited_for_is_replaced(local: Path, gcs_server: GCSServer) -> None:
    remote = "gs://danling/root/digits-1/20261121-103249-123456"
    fill(local)
    (local / "mirror.json").unlink()
    started: list[MirrorProcess] = []

    def start() -> MirrorProcess:
        started.append(MirrorProcess(os.fspath(local), remote))
        return started[-1]

    gcs_server.fault = lambda method, path: 503
    delivery = Delivery(start, os.fspath(local), Config(epoch_end=1), [].append)
    delivery.request()
    assert not delivery.is_done(0.01)
    os.kill(started[0].pid, signal.SIGKILL)
    gcs_server.fault = lambda method, path: None
    wait_until(lambda: delivery.is_done(1.0), "the delivery", 60)
    assert len(started) == 2 and storage.exists(storage.join(remote, "status.json"))
    assert delivery.is_over(60)


def test_a_mirror_that_dies_again_and_again_is_given_up_with_its_last_words(local: Path) -> None:
    def start() -> MirrorProcess:
        return MirrorProcess(os.fspath(local), "gs://danling/a/b", checkpoints="../elsewhere")

    delivery = Delivery(start, os.fspath(local), Config(epoch_end=1), [].append)
    delivery.request()
    with pytest.raises(
        StoreUnavailable, match=r"ended with code 1 .*StorageError: .* leaves the folder .*\.mirror\.log"
    ):
        wait_until(lambda: delivery.is_done(5.0), "the end", 60)


@pytest.mark.parametrize("is_there", [True, False])
def test_the_last_words_of_a_mirror_are_its_own(is_there: bool, local: Path) -> None:
    append(local / ".mirror.log", "what an earlier one said\n")
    mirror = MirrorProcess(os.fspath(local), "gs://danling/a/b")
    os.kill(mirror.pid, signal.SIGKILL)
    mirror._process.wait()
    if not is_there:
        (local / ".mirror.log").unlink()
    mirror.request_sync()
    with pytest.raises(StoreUnavailable, match="it said nothing" if is_there else "is gone"):
        mirror.close()


def test_a_new_mirror_ends_the_one_that_still_delivers(local: Path, gcs_server: GCSServer) -> None:
    """Rank 0 was killed while the store was away, and its successor goes on: only one may write."""
    append(local / "run.log", "line\n")
    gcs_server.fault = lambda method, path: 503
    old = MirrorProcess(os.fspath(local), "gs://danling/a/b")
    lock = local / ".mirror.lock"
    wait_until(lambda: lock.exists() and lock.read_text().startswith(f"{old.pid} "), "the mirror's lock")
    gcs_server.fault = lambda method, path: None
    with MirrorProcess(os.fspath(local), "gs://danling/a/b") as new:
        new.request_sync()
        assert new.wait_synced(timeout_seconds=60)
        with pytest.raises(StoreUnavailable, match=f"code {-END}"):
            old.close()
    assert gcs_server.buckets["danling"]["a/b/run/000001.log"].data == b"line\n"
