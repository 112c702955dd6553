"""The digits demo, as a user runs it, on S3 and on GCS: killed twice, moved to another machine, the same bits."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from danling_core.mirror.pull import pull
from danling_core.process_tree import start_time
from danling_core.runs.finding import list_runs
from danling_core.runs.folder import RunFolder
from tests.prefect_fixtures import PrefectServer
from tests.processes import tree, wait_until
from tests.whole_runs import EXPERIMENT_ID, ROOT, Ended

EPOCHS = 16


class Demo:
    """`danling` in processes of its own, with its scratch folder in `path`."""

    def __init__(self, server: PrefectServer, path: Path) -> None:
        self.scratch = path / "scratch"
        # The stores' addresses and keys came after the server, and are in the environment of the test.
        prefect = {name: server.environment[name] for name in ("PREFECT_API_URL", "PREFECT_HOME")}
        self._environment = {**os.environ, **prefect}

    def start(self, root: str) -> subprocess.Popen[str]:
        words = [f"project_root={root}", f"scratch={self.scratch}", f"epoch_end={EPOCHS}"]
        words += [f"experiment_id={EXPERIMENT_ID}", "save_interval_steps=5", "max_restarts=0"]
        return self._popen("run", "examples/digits/run.yaml", *words)

    def to_the_end(self, root: str) -> str:
        """Train to the end; what was printed."""
        return self._ended(self.start(root))

    def call(self, *words: str) -> str:
        return self._ended(self._popen(*words))

    def kill_driver_after(self, root: str, epochs: int) -> None:
        """SIGKILL the driver once so many epochs are finished; return when none of its processes is left."""
        driver = self.start(root)
        wait_until(lambda: self._finished() >= epochs, f"{epochs} epochs", 100)
        pids = [pid for _, pid in tree(driver.pid)]
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate(timeout=60)
        wait_until(lambda: not any(start_time(pid) for pid in pids), "the end of ranks and mirror", 60)
        assert len(pids) >= 5, "driver, launcher, two ranks, mirror"

    def _finished(self) -> int:
        logs = [path.read_text() for path in self.scratch.glob("*/events.jsonl")]
        return max((log.count('"epoch_finished"') for log in logs), default=0)

    def _popen(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "flows.cli", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=self._environment,
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
        )

    def _ended(self, process: subprocess.Popen[str]) -> str:
        out, error = process.communicate(timeout=200)
        assert process.returncode == 0, out + error
        return out


def only_run(root: str) -> RunFolder:
    [(folder, _)] = list_runs(root)
    return folder


def copied(root: str, path: Path) -> Ended:
    path.mkdir()
    pull(only_run(root), str(path))
    return Ended(path, None)


@pytest.mark.holds("system-4")
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("store", ["s3", "gcs"])
def test_the_demo_killed_twice_and_moved_ends_with_the_bits_of_an_undisturbed_one(
    store: str, request: pytest.FixtureRequest, prefect_server: PrefectServer, tmp_path: Path
) -> None:
    root = str(request.getfixturevalue(f"{store}_root"))
    demo = Demo(prefect_server, tmp_path)
    demo.to_the_end(f"{root}/peace")
    shutil.rmtree(demo.scratch)

    demo.kill_driver_after(f"{root}/storm", 2)
    demo.kill_driver_after(f"{root}/storm", 6)
    status = only_run(f"{root}/storm").read_status()
    assert status is None or not status.is_complete
    shutil.rmtree(demo.scratch)  # as on another machine
    assert "resumed" in demo.to_the_end(f"{root}/storm")

    storm = copied(f"{root}/storm", tmp_path / "storm")
    storm.must_equal(copied(f"{root}/peace", tmp_path / "peace"))
    first, *again = [event["resumed"] for event in storm.events if event["event"] == "run_started"]
    print(f"{store}: resumed at steps {[resumed['step'] for resumed in again]}")
    assert first is None and len(again) == 2 and all(resumed["step"] > 0 for resumed in again)
    folder = only_run(f"{root}/storm")
    assert "complete" in demo.call("runs", f"{root}/storm") and "no runs" in demo.call("runs", f"{root}/none")
    shown = demo.call("show", "digits-cnn-baseline", "--root", f"{root}/storm")
    assert folder.url in shown and "accuracy" in shown and "results.json" in shown
    verified = demo.call("verify", "digits-cnn-baseline", "--root", f"{root}/storm")
    assert verified.startswith(f"good: {folder.url}"), verified
