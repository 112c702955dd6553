"""Whole runs on an S3 endpoint that fails: nothing lost, nothing torn, nothing twice; and owners that lose it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from danling_core import storage
from danling_core.checkpoints.store import CheckpointStore
from danling_core.config import Config
from danling_core.errors import RunBusy
from danling_core.identity.ids import identify
from danling_core.launch.client import Launcher
from danling_core.mirror.pull import pull
from danling_core.process_tree import start_time
from danling_core.runs.finding import list_runs
from danling_core.runs.folder import RunFolder, read_log
from danling_core.runs.lease import STALE_AFTER_SECONDS, Lease
from danling_core.session.open_run import open_run
from tests.processes import tree, wait_until
from tests.s3_faults import FAULTS, FaultyProxy
from tests.whole_runs import ROOT, Ended, config, launch

# So that an answer that never comes is noticed within a second, and not within a minute.
HASTY = {"config_kwargs": {"read_timeout": 1, "connect_timeout": 1, "retries": {"max_attempts": 1}}}

SLOW: dict[str, Any] = {"save_interval_steps": None, "log_interval": 1000, "params": {"step_seconds": 0.2}}


def train(launcher: Launcher, root: str, scratch: Path, **fields: Any) -> tuple[RunFolder, Ended]:
    wanted = config(root, scratch=str(scratch), storage_options=HASTY, **fields)
    ended = launch(launcher, wanted, timeout_seconds=300)
    return list_runs(root)[-1][0], ended


def must_be_whole(folder: RunFolder, ended: Ended, in_peace: Ended, elsewhere: Path) -> None:
    """The store has the bits of an undisturbed run, each line of the logs once, and whole checkpoints only."""
    assert ended.outcome is not None and (ended.outcome.status, ended.outcome.restarts) == ("complete", 0)
    elsewhere.mkdir(parents=True)
    pull(folder, str(elsewhere))
    Ended(elsewhere, None).must_equal(in_peace)
    for log in ("events.jsonl", "run.log"):
        assert read_log(folder, log) == (ended.path / log).read_bytes(), log
    committed = [event["record"] for event in ended.events if event["event"] == "checkpoint_committed"]
    assert len(committed) == len(set(committed))
    store = CheckpointStore(folder.checkpoints_url)
    records, bad = store.survey()
    assert bad == []
    for record in records:
        store.verify(record)
    assert {record.name for record in records} == {record.name for record in ended.store().records()}
    payloads = storage.list_tree(storage.join(folder.checkpoints_url, "data"))
    assert {entry.path.partition("/")[0] for entry in payloads} == {record.name for record in records}


@pytest.mark.long
def test_a_tenth_of_the_requests_may_fail(
    s3_root: str, s3_proxy: FaultyProxy, launcher: Launcher, in_peace: Ended, tmp_path: Path
) -> None:
    s3_proxy.share, s3_proxy.hang_seconds = 0.1, 3.0
    folder, ended = train(launcher, s3_root, tmp_path / "scratch")
    s3_proxy.share = 0.0
    assert sum(s3_proxy.seen[kind] for kind in FAULTS) >= 2, s3_proxy.seen
    must_be_whole(folder, ended, in_peace, tmp_path / "elsewhere")


def _a_tenth(proxy: FaultyProxy, seed: int) -> None:
    proxy.share = 0.1


def _slow(proxy: FaultyProxy, seed: int) -> None:
    proxy.bytes_per_second = 1e6


def _half_a_minute(proxy: FaultyProxy, seed: int) -> None:
    time.sleep(0.5 + seed % 7 * 0.4)
    with proxy.away():
        time.sleep(30)


def _three_minutes(proxy: FaultyProxy, seed: int) -> None:
    # Not before it trains: a driver that cannot open its run gives up after two minutes.
    wait_until(lambda: any("/events/" in path for _, path in list(proxy.requests)), "the first upload", 60)
    with proxy.away():
        time.sleep(180)


def _all_at_once(proxy: FaultyProxy, seed: int) -> None:
    _a_tenth(proxy, seed)
    _slow(proxy, seed)
    time.sleep(1.0 + seed % 5 * 0.4)
    with proxy.away():
        time.sleep(5)


TROUBLES: list[tuple[Callable[[FaultyProxy, int], None], int]] = [
    *((_a_tenth, seed) for seed in range(24)),
    *((_slow, seed) for seed in range(6)),
    *((_all_at_once, seed) for seed in range(14)),
    *((_half_a_minute, seed) for seed in range(4)),
    *((_three_minutes, seed) for seed in range(2)),
]


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("trouble", "seed"), TROUBLES)
def test_fifty_runs_in_trouble_lose_nothing(
    trouble: Callable[[FaultyProxy, int], None],
    seed: int,
    s3_root: str,
    s3_proxy: FaultyProxy,
    launcher: Launcher,
    in_peace: Ended,
    tmp_path: Path,
) -> None:
    s3_proxy.reseed(seed)
    with ThreadPoolExecutor(1) as pool:
        troubled = pool.submit(trouble, s3_proxy, seed)
        try:
            folder, ended = train(launcher, s3_root, tmp_path / "scratch")
        finally:
            troubled.result()
            s3_proxy.share, s3_proxy.bytes_per_second = 0.0, None
    folder = list_runs(s3_root)[-1][0]
    must_be_whole(folder, ended, in_peace, tmp_path / "elsewhere")


@contextlib.contextmanager
def driver(root: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], RunFolder]]:
    """A driver of its own process that trains a long run; yields once it has committed remotely."""
    wanted = config(root, epoch_end=1000, scratch=str(tmp_path / "scratch"), **SLOW)
    (tmp_path / "wanted.yaml").write_text(wanted.yamls())
    command = [sys.executable, "-m", "tests.storm_driver", str(tmp_path / "wanted.yaml")]
    with (tmp_path / "driver.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: bool(_records(root)), "the first remote checkpoint", 90)
        yield process, list_runs(root)[-1][0]
    finally:
        for _, pid in list(tree(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _records(root: str) -> list[str]:
    runs = list_runs(root)
    return storage.list_names(storage.join(runs[-1][0].checkpoints_url, "records")) if runs else []


@pytest.mark.long
def test_a_second_driver_is_refused_and_a_killed_owner_is_followed_at_once(
    s3_root: str, tmp_path: Path
) -> None:
    with driver(s3_root, tmp_path) as (process, folder):
        known = Config.from_yamls(storage.read_bytes(folder.config_url).decode())
        wanted = known.replace(scratch=str(tmp_path / "other"))
        with pytest.raises(RunBusy, match=rf"is owned by .*, pid {process.pid} on "):
            open_run(wanted, identify(wanted, None))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        began = time.monotonic()
        opened = open_run(wanted, identify(wanted, None))
        assert time.monotonic() - began < 10, "a dead process of this machine is told by its pid"
        assert opened.folder == folder and opened.generation == 2 and not opened.is_new
        assert opened.lease is not None
        opened.lease.release()


@pytest.mark.long
def test_a_frozen_owner_is_taken_over_and_writes_nothing_when_it_wakes(s3_root: str, tmp_path: Path) -> None:
    with driver(s3_root, tmp_path) as (process, folder):
        # A request that is under way when its process is frozen arrives when it is thawed: nobody can take it
        # back. So freeze right after a pass, of which there is one per epoch.
        last = _synced_at(tmp_path)
        wait_until(lambda: _synced_at(tmp_path) != last, "a pass", 60)
        frozen = [process.pid, *(pid for _, pid in tree(process.pid))]
        for pid in set(frozen):
            os.kill(pid, signal.SIGSTOP)
        stale_after_seconds = 2.0
        lease = Lease.acquire(
            folder.lease_parent_url,
            "the next owner",
            stale_after_seconds=stale_after_seconds,
            wait_seconds=3 * STALE_AFTER_SECONDS,
        )
        assert lease.generation == 2
        before = _contents(folder)
        for pid in set(frozen):
            if start_time(pid) is not None:
                os.kill(pid, signal.SIGCONT)
        assert process.wait(90) == 1
        wait_until(lambda: not _mirrors_of(tmp_path), "the end of the old mirror", 60)
        assert _contents(folder) == before
        assert "taken over" in (tmp_path / "driver.log").read_text()


def _synced_at(tmp_path: Path) -> str | None:
    [state] = tmp_path.glob("scratch/*/mirror.json")
    synced_at: str | None = json.loads(state.read_text())["synced_at"]
    return synced_at


def _contents(folder: RunFolder) -> dict[str, bytes]:
    paths = [storage.join(folder.url, entry.path) for entry in storage.list_tree(folder.url)]
    return {
        path: data for path, data in zip(paths, storage.read_many(paths), strict=True) if data is not None
    }


def _mirrors_of(scratch: Path) -> list[int]:
    """Mirrors of working folders below `scratch` that live, whoever their parent is."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and str(scratch).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return [pid for pid in found if b"danling_core.mirror" in Path(f"/proc/{pid}/cmdline").read_bytes()]
