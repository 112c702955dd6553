"""Disks that are full or read-only, and folders that go away: a clear error, and nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from danling_core.launch.client import Launcher
from tests.whole_runs import config, fault, launch


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 1 MB large."""
    point = tmp_path / "disk"
    point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "danling-test", str(point)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield point
    finally:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


@pytest.mark.long
def test_a_file_that_may_not_grow_fails_the_run_and_leaves_the_last_good_checkpoint(
    launcher: Launcher, tmp_path: Path
) -> None:
    with fault("small files", 13):
        ended = launch(launcher, config(tmp_path, params={"width": 2000}))
    assert ended.outcome is not None and (ended.outcome.status, ended.outcome.restarts) == ("failed", 0)
    assert "cannot save checkpoint" in (ended.outcome.error or "") and str(tmp_path) in (
        ended.outcome.error or ""
    )
    newest, bad = ended.store().newest_good()
    assert newest is not None and newest.step >= 8 and not bad, "the one of step 12 may have been half-way"
    assert launch(launcher, config(tmp_path, params={"width": 2000})).status.status == "complete"


@pytest.mark.long
def test_a_full_disk_fails_the_run_with_what_to_do(launcher: Launcher, disk: Path) -> None:
    wanted = config(disk, params={"width": 800}, save_interval=1, keep_last=50)
    ended = launch(launcher, wanted)
    assert ended.outcome is not None and ended.outcome.status == "failed"
    error = ended.outcome.error or ""
    assert "No space left" in error and "are free" in error and "keep_last" in error
    newest, bad = ended.store().newest_good()
    assert newest is not None and not bad
    subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
    assert launch(launcher, wanted).status.status == "complete", "with room, it goes on"


def test_a_read_only_disk_is_told(launcher: Launcher, disk: Path) -> None:
    with fault("SIGTERM", 13):
        stopped = launch(launcher, config(disk))
    saved = {path: path.read_bytes() for path in stopped.path.rglob("*") if path.is_file()}
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(Exception, match="Read-only file system") as refusal:
        launch(launcher, config(disk))
    assert "danling_core.errors" in type(refusal.value).__module__
    assert {path: path.read_bytes() for path in saved} == saved


@pytest.mark.long
def test_a_folder_deleted_during_the_run_ends_it_with_a_clear_error(
    launcher: Launcher, tmp_path: Path
) -> None:
    with fault("delete folder", 13):
        ended = launch(launcher, config(tmp_path))
    assert ended.outcome is not None and (ended.outcome.status, ended.outcome.restarts) == ("failed", 0)
    error = ended.outcome.error or ""
    assert "disappeared" in error or "is gone" in error
    assert not ended.path.exists() or not (ended.path / "status.json").exists(), "no ghost of a run is left"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
