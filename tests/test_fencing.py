"""An owner that was frozen, taken over and thawed writes nothing more into the run's folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from danling_core.lease import Lease
from danling_core.lifeline import start_time
from danling_core.run_folder import RunFolder
from tests.test_control import wait_until
from tests.test_storm import tree
from tests.whole_runs import ROOT, config


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
