"""What is done about runs from outside: stop, resume, doctor; cancel and retry of deployments by a real worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from danling_core.errors import RunInterrupted
from danling_core.runs.finding import list_runs
from danling_core.runs.folder import RunFolder, Status
from flows.cli import main
from tests.prefect_fixtures import PrefectServer
from tests.processes import wait_until
from tests.small_runner import SmallRunner, config

Make = Callable[..., dict[str, Any]]
Start = Callable[..., subprocess.Popen[str]]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def start(start_danling: Start, prefect_server: PrefectServer) -> Start:
    """Starts `danling COMMAND` on a file with the values."""
    return lambda command, values: start_danling(command, values, environment=prefect_server.environment)


def the_run(root: str) -> tuple[RunFolder, Status]:
    [(folder, status)] = list_runs(root)
    assert status is not None
    return folder, status


def wait_for_epochs(root: str, count: int = 2) -> None:
    wait_until(lambda: any(s is not None and s.epochs >= count for _, s in list_runs(root)), "epochs", 60)


def long_run(toy_config: Make, **fields: Any) -> dict[str, Any]:
    return toy_config(**{"epoch_end": 400, "nproc_per_node": 1, "params": {"sleep_seconds": 0.05}, **fields})


@pytest.mark.long
def test_a_run_is_stopped_through_its_folder_and_resumed_by_name(
    start: Start, toy_config: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    config = long_run(toy_config, epoch_end=60)
    root = config["project_root"]
    process = start("run", config)
    wait_for_epochs(root)
    assert main(["stop", "toy-run", "--root", root]) == 0
    assert f"pid {process.pid}" in (said := capfd.readouterr().out) and "interrupted after" in said
    _, error = process.communicate(timeout=30)
    assert process.returncode == 75 and "stopped by" in error
    assert main(["stop", "toy-run", "--root", root]) == 0
    assert "is not at work: interrupted" in capfd.readouterr().out
    assert main(["resume", "toy-run", "--root", root]) == 0
    _, status = the_run(root)
    assert status.is_complete and status.bitwise and status.epochs == 60
    capfd.readouterr()
    assert main(["resume", "toy-run", "--root", root]) == 0
    assert "there is nothing to resume" in capfd.readouterr().out


@pytest.mark.long
def test_a_group_is_stopped_whole(start: Start, toy_config: Make, capfd: pytest.CaptureFixture[str]) -> None:
    config = long_run(toy_config)
    root = config["project_root"]
    process = start(
        "group", {"group": "both", "experiments": [{"config": config, "sweep": {"seed": [0, 1, 2]}}]}
    )
    wait_for_epochs(root)
    assert main(["stop", "both", "--root", root]) == 0
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert len(list_runs(root)) == 1, "the others were not begun"


@pytest.mark.long
def test_a_runner_in_a_script_of_ones_own_is_stopped_as_well(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Asks(SmallRunner):
        def after_step(self) -> None:
            if self.steps == 2:
                assert main(["stop", self.id, "--root", str(tmp_path), "--wait", "0"]) == 0
            time.sleep(0.1)

    runner = Asks(config(tmp_path, epoch_end=1000))
    with pytest.raises(RunInterrupted, match="stopped by"):
        runner.train()
    assert 2 < runner.steps < 1000
    assert the_run(str(tmp_path))[1].status == "interrupted"


@pytest.mark.parametrize("command", ["stop", "resume"])
def test_a_run_that_is_not_there_is_one_message(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "nobody", "--root", str(tmp_path)]) == 2
    assert "no run 'nobody'" in capfd.readouterr().err


@pytest.mark.long
def test_the_doctor_ends_the_flow_runs_of_the_dead(
    start: Start,
    toy_config: Make,
    prefect_server: PrefectServer,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = long_run(toy_config, experiment_name="ill")
    root = config["project_root"]
    process = start("run", config)
    wait_for_epochs(root)
    assert main(["doctor", root]) == 0
    assert capfd.readouterr().out.startswith("at work")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    [flow_run] = flow_runs(prefect_server, "ill-run")
    assert flow_run.state.is_running()
    assert main(["doctor", root]) == 0
    assert str(flow_run.id) in (said := capfd.readouterr().out) and said.startswith("dead")
    [flow_run] = flow_runs(prefect_server, "ill-run")
    assert flow_run.state.is_crashed() and f"pid {process.pid}" in flow_run.state.message


def flow_runs(server: PrefectServer, name: str) -> list[Any]:
    from prefect.client.schemas.filters import FlowRunFilter

    wanted = FlowRunFilter.model_validate({"name": {"any_": [name]}})
    with server.client() as client:
        return list(client.read_flow_runs(flow_run_filter=wanted))


def task_states(server: PrefectServer, flow_run: Any) -> dict[str, str]:
    from prefect.client.schemas.filters import TaskRunFilter

    wanted = TaskRunFilter.model_validate({"flow_run_id": {"any_": [str(flow_run.id)]}})
    with server.client() as client:
        return {each.name: each.state.name for each in client.read_task_runs(task_run_filter=wanted)}


# deployments


def prefect(server: PrefectServer, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *words],
        cwd=ROOT,
        env={**server.environment, "PWD": str(ROOT), "COLUMNS": "400"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def worker(prefect_server: PrefectServer) -> Iterator[PrefectServer]:
    """The server with the deployments, and a worker that asks for work every second."""
    prefect(prefect_server, "work-pool", "create", "danling", "--type", "process", "--overwrite")
    prefect(prefect_server, "deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", "danling"],
        cwd=ROOT,
        env={**prefect_server.environment, "PREFECT_WORKER_QUERY_SECONDS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    yield prefect_server
    process.terminate()
    process.wait(30)


def run_deployment(server: PrefectServer, **parameters: Any) -> Any:
    with server.client() as client:
        deployment = client.read_deployment_by_name("run/digits")
        return client.create_flow_run_from_deployment(deployment.id, parameters=parameters)


def wait_for_state(server: PrefectServer, flow_run: Any, name: str, seconds: float = 60) -> Any:
    def read() -> Any:
        with server.client() as client:
            return client.read_flow_run(flow_run.id)

    wait_until(lambda: read().state.name == name, f"the state {name} (now {read().state})", seconds)
    return read()


@pytest.mark.long
def test_bad_overrides_of_a_deployment_fail_with_the_message_of_the_command(worker: PrefectServer) -> None:
    flow_run = run_deployment(worker, overrides={"epoch_end": "many"})
    failed = wait_for_state(worker, flow_run, "Failed")
    assert "epoch_end" in failed.state.message and "many" in failed.state.message
    with pytest.raises(Exception, match="epoch_ned"):
        run_deployment(worker, overrides={"epoch_ned": 3})


@pytest.mark.long
def test_a_cancelled_run_shows_its_epoch_cancelled_and_a_retry_resumes_it(
    worker: PrefectServer, toy_config: Make
) -> None:
    config = long_run(toy_config, experiment_name="cancelled")
    root = config["project_root"]
    flow_run = run_deployment(worker, config=config)
    wait_for_epochs(root)
    prefect(worker, "flow-run", "cancel", str(flow_run.id))
    cancelled = wait_for_state(worker, flow_run, "Cancelled")
    states = task_states(worker, cancelled)
    assert set(states.values()) <= {"Completed", "Cancelled", "Interrupted"}, states
    _, status = the_run(root)
    assert status.status == "interrupted"


@pytest.mark.long
def test_a_retry_of_a_fresh_run_that_crashed_goes_on_with_its_folder(
    worker: PrefectServer, toy_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = long_run(toy_config, experiment_name="fresh-crash", epoch_end=150)
    root = config["project_root"]
    flow_run = run_deployment(worker, config=config, fresh=True)
    wait_for_epochs(root)
    folder, before = the_run(root)
    [lease] = (Path(root) / Path(folder.url).parent.name / "lease").glob("*.json")
    os.kill(json.loads(lease.read_text())["pid"], signal.SIGKILL)
    wait_for_state(worker, flow_run, "Crashed")
    monkeypatch.setenv("PREFECT_API_URL", worker.api_url)
    began = time.monotonic()
    assert main(["resume", "fresh-crash-run", "--root", root]) == 0
    assert time.monotonic() - began < 20
    wait_for_state(worker, flow_run, "Completed", 90)
    again, status = the_run(root)
    assert again.url == folder.url and status.is_complete and status.bitwise
