"""A signal for everybody: batch systems and service managers send it to every process of a command at once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from danling_core import storage
from danling_core.process_tree import STOP_SIGNALS
from danling_core.runs.finding import list_runs
from danling_core.tools.verify import verify
from tests.prefect_fixtures import PrefectServer
from tests.processes import tree, wait_until

Make = Callable[..., dict[str, Any]]
Start = Callable[..., subprocess.Popen[str]]
SLURM_WAITS_SECONDS = 30.0  # KillWait, by default: then comes SIGKILL


@pytest.fixture
def start(tmp_path: Path, start_danling: Start, toy_config: Make) -> Start:
    """Starts `danling run` of a long run of two ranks, with the environment that is given."""

    def begin(environment: dict[str, str], **fields: Any) -> subprocess.Popen[str]:
        changes = {"epoch_end": 400, "nproc_per_node": 2, "params": {"sleep_seconds": 0.05}, **fields}
        own = {**os.environ, **environment, "TMPDIR": str(tmp_path)}
        return start_danling("run", toy_config(**changes), environment=own)

    return begin


def send_to_everybody(process: subprocess.Popen[str], number: signal.Signals) -> int:
    """Send a signal to a command and every process below it; how many those are."""
    everybody = [pid for _, pid in tree(process.pid)]
    for pid in everybody:
        os.kill(pid, number)
    return len(everybody)


@pytest.fixture
def own_home(prefect_home: Path) -> dict[str, str]:
    return {"PREFECT_HOME": str(prefect_home)}


def has_trained(root: str) -> bool:
    return any(status is not None and status.epochs > 1 for _, status in list_runs(root))


@pytest.mark.long
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_to_every_process_saves_the_run_and_ends_with_75_in_time(
    number: signal.Signals, start: Start, own_home: dict[str, str], toy_config: Make
) -> None:
    root = toy_config()["project_root"]
    process = start(own_home)
    wait_until(lambda: has_trained(root), "two epochs", 60)
    assert send_to_everybody(process, number) >= 6, "launcher, fork server, two ranks, server"
    _, error = process.communicate(timeout=SLURM_WAITS_SECONDS)
    assert process.returncode == 75, error
    assert "to resume: danling run" in error and "API" not in error
    [(folder, status)] = list_runs(root)
    assert status is not None and status.status == "interrupted" and status.bitwise
    assert verify(folder.url).is_good


@pytest.mark.long
def test_the_mirror_outlives_the_signal_and_brings_up_what_was_saved(
    start: Start, own_home: dict[str, str], s3_root: str, tmp_path: Path
) -> None:
    process = start(own_home, project_root=s3_root, scratch=str(tmp_path / "scratch"))
    wait_until(lambda: has_trained(s3_root), "two epochs in the store", 90)
    send_to_everybody(process, signal.SIGTERM)
    _, error = process.communicate(timeout=SLURM_WAITS_SECONDS)
    assert process.returncode == 75, error
    [(folder, status)] = list_runs(s3_root)
    assert status is not None and status.status == "interrupted"
    assert verify(folder.url).is_good
    assert storage.exists(storage.join(folder.url, "checkpoints", "latest.json"))


@pytest.mark.long
def test_an_api_that_is_away_at_the_end_is_not_waited_for(
    start: Start, own_home: dict[str, str], toy_config: Make
) -> None:
    from flows.server import EmbeddedServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", own_home["PREFECT_HOME"])
        server = EmbeddedServer()
        server.start()
    environment = {**own_home, "PREFECT_API_URL": server.wait()}
    root = toy_config()["project_root"]
    process = start(environment)
    wait_until(lambda: has_trained(root), "two epochs", 60)
    server.stop()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert time.monotonic() - began < 10, "2 s for the API, the rest for ranks that save and end"
    assert "the Prefect API went away" in error
    [(_, status)] = list_runs(root)
    assert status is not None and status.status == "interrupted"


@pytest.mark.long
def test_a_signal_before_a_run_has_begun_ends_with_75_too(
    start: Start, prefect_server: PrefectServer, tmp_path: Path
) -> None:
    process = start(prefect_server.environment)
    wait_until(lambda: len([*tree(process.pid)]) > 1, "the launcher", 30)
    process.send_signal(signal.SIGHUP)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 75, error
    assert "SIGHUP before a run had begun" in error and "Traceback" not in error
