"""Runs of a group as flow runs of a deployment: adopted, cancelled, told apart; no run twice."""

from __future__ import annotations

import contextlib
import contextvars
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import yaml

from danling_core.config import Config
from danling_core.config.sweep import GroupSpec
from danling_core.errors import ConfigError
from danling_core.runs.finding import list_runs
from flows import deployment_runs
from flows.deployment_runs import run_by_deployment
from flows.deployment_target import Target
from flows.outcome import RunOutcome
from flows.pool import LauncherPool, launcher_for_elsewhere
from tests.prefect_fixtures import PrefectServer
from tests.processes import wait_until
from tests.slow_proxy import slow_proxy
from tests.whole.test_operations import prefect

Make = Callable[..., dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """Stands for a worker: runs in this process what is scheduled of one deployment, as a worker's child does."""

    def __init__(self, server: PrefectServer, pool: LauncherPool) -> None:
        self.most_at_a_time = 0
        self.name = f"run/{time.monotonic_ns()}"
        self._server = server
        self._pool = pool
        self._is_closed = False
        self._threads: list[threading.Thread] = []
        self.deployment_id = self._deploy()

    def _deploy(self) -> Any:
        from danling_flows import run

        with self._server.client() as client:
            flow_id = client.create_flow(run)
            return client.create_deployment(
                flow_id, self.name.removeprefix("run/"), enforce_parameter_schema=False
            )

    def flow_runs(self) -> list[Any]:
        """All flow runs of the deployment."""
        from prefect.client.schemas.filters import DeploymentFilter

        wanted = DeploymentFilter.model_validate({"id": {"any_": [str(self.deployment_id)]}})
        with self._server.client() as client:
            return list(client.read_flow_runs(deployment_filter=wanted, limit=200))

    def states(self) -> Counter[str]:
        """How many flow runs are in which state."""
        return Counter(flow_run.state.name for flow_run in self.flow_runs())

    def start(self, slots: int = 2) -> None:
        """Take up to `slots` at a time from now on."""
        thread = threading.Thread(target=self._work, args=(slots,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """Take no more, and end what was begun."""
        self._is_closed = True
        for thread in self._threads:
            thread.join(60)

    def _work(self, slots: int) -> None:
        at_work: dict[Any, threading.Thread] = {}
        while not self._is_closed:
            at_work = {key: thread for key, thread in at_work.items() if thread.is_alive()}
            scheduled = [each for each in self.flow_runs() if each.state.name == "Scheduled"]
            for flow_run in scheduled[: slots - len(at_work)]:
                if flow_run.id not in at_work:
                    at_work[flow_run.id] = threading.Thread(target=self._run, args=(flow_run,), daemon=True)
                    at_work[flow_run.id].start()
            self.most_at_a_time = max(self.most_at_a_time, len(self.flow_runs()) - self._ended())
            time.sleep(0.1)
        for thread in at_work.values():
            thread.join(60)

    def _ended(self) -> int:
        return sum(flow_run.state.is_final() for flow_run in self.flow_runs())

    def _run(self, flow_run: Any) -> None:
        from prefect.flow_engine import run_flow
        from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
        from prefect.states import Pending

        from danling_flows import run

        settings: dict[Any, Any] = {
            PREFECT_API_URL: self._server.api_url,
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
        }
        with temporary_settings(settings), using_shared(self._pool), self._server.client() as client:
            client.set_flow_run_state(flow_run.id, Pending())
            run_flow(run, flow_run=client.read_flow_run(flow_run.id), return_type="state")


def in_thread(call: Callable[[], Any]) -> threading.Thread:
    """Call in a thread that has the settings of this one."""
    thread = threading.Thread(target=contextvars.copy_context().run, args=(call,), daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def using_shared(pool: LauncherPool) -> Iterator[None]:
    """Make a pool the ambient one, and leave it open."""
    from flows import pool as module

    token = module._ambient.set(pool)
    try:
        yield
    finally:
        module._ambient.reset(token)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look more often than a real driver does."""
    monkeypatch.setattr(deployment_runs, "_POLL_SECONDS", 0.2)
    monkeypatch.setattr(deployment_runs, "_AWAY_SECONDS", 0.2)


@pytest.fixture(scope="module")
def launchers() -> Iterator[LauncherPool]:
    """Launchers of the worker's runs."""
    pool = LauncherPool(slots=2)
    yield pool
    pool.close()


@pytest.fixture
def worker(prefect_server: PrefectServer, launchers: LauncherPool) -> Iterator[Worker]:
    worker = Worker(prefect_server, launchers)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[LauncherPool]:
    """A launcher of the drivers, which prepares."""
    pool = LauncherPool(launcher=launcher_for_elsewhere)
    yield pool
    pool.close()


@pytest.fixture
def drive(worker: Worker, pool: LauncherPool, toy_config: Make) -> Iterator[Callable[..., list[RunOutcome]]]:
    """Calls a driver over runs of these seeds; arguments change its spec, and the config."""

    def call(seeds: list[int], **changes: Any) -> list[RunOutcome]:
        names = ("concurrency", "deployment")
        spec = GroupSpec(
            group="fan",
            executor="deployment",
            **{"deployment": worker.name, **{name: changes.pop(name) for name in names if name in changes}},
            experiments=[
                {"config": toy_config(**{"experiment_name": "fan", **changes}), "sweep": {"seed": seeds}}
            ],
        )
        configs = [config for plan in spec.configs() for config in plan.configs]
        return run_by_deployment(spec, configs, pool, fresh=False, if_busy="follow")

    yield call
    pool.stopped_because = None
    pool.outcomes.clear()


Drive = Callable[..., list[RunOutcome]]


@pytest.mark.long
def test_each_run_of_a_group_is_a_flow_run_of_the_deployment_and_a_window_bounds_them(
    worker: Worker, prefect_server: PrefectServer, pool: LauncherPool, toy_config: Make
) -> None:
    from flows.group import group

    spec = GroupSpec(
        group="fanned",
        executor="deployment",
        deployment=worker.name,
        concurrency=2,
        experiments=[{"config": toy_config(experiment_name="fanned"), "sweep": {"seed": [0, 1, 2]}}],
    )
    worker.start()
    with using_shared(pool):
        rows: Any = group(spec)
    assert [row["status"] for row in rows] == ["complete"] * 3 and rows[0]["rank"] == 1
    runs = worker.flow_runs()
    assert worker.states() == {"Completed": 3} and worker.most_at_a_time == 2
    assert all({"group:fanned", "experiment:fanned"} <= set(run.tags) for run in runs)
    with prefect_server.client() as client:
        parents = {client.read_task_run(run.parent_task_run_id).flow_run_id for run in runs}
        assert [client.read_flow_run(parent).name for parent in parents] == ["fanned"]
    with using_shared(pool):
        again: Any = group(spec)
    assert [row["score"] for row in again] == [row["score"] for row in rows]
    assert len(worker.flow_runs()) == 3, "what is complete is not submitted"


def test_a_run_that_two_experiments_share_is_submitted_once_and_is_in_both(
    worker: Worker, pool: LauncherPool, toy_config: Make
) -> None:
    experiments = [{"config": toy_config(experiment_name=name)} for name in ("one", "other")]
    spec = GroupSpec(group="twins", executor="deployment", deployment=worker.name, experiments=experiments)
    configs = [config for plan in spec.configs() for config in plan.configs]
    worker.start()
    outcomes = run_by_deployment(spec, configs, pool, fresh=False, if_busy="follow")
    assert [(outcome.experiment_name, outcome.status) for outcome in outcomes] == [
        ("one", "complete"),
        ("other", "complete"),
    ]
    assert worker.states() == {"Completed": 1}
    pool.outcomes.clear()


@pytest.mark.long
def test_a_second_driver_takes_over_what_the_first_has_submitted(worker: Worker, drive: Drive) -> None:
    first = in_thread(lambda: drive([0, 1, 2]))
    wait_until(lambda: worker.states() == {"Scheduled": 3}, "three flow runs", 30)
    worker.start()
    assert [outcome.status for outcome in drive([0, 1, 2])] == ["complete"] * 3
    assert worker.states() == {"Completed": 3}
    first.join(30)


@pytest.mark.long
def test_a_run_that_failed_is_another_attempt_and_what_it_said_is_passed_on(
    worker: Worker, drive: Drive
) -> None:
    worker.start()
    for attempts in (1, 2):
        [outcome] = drive([0], params={"fail_at_epoch": 1})
        assert outcome.status == "failed" and "the toy fails" in (outcome.error or "")
        assert worker.states() == {"Failed": attempts}


def test_a_group_that_is_stopped_cancels_its_flow_runs(
    worker: Worker, drive: Drive, pool: LauncherPool
) -> None:
    threading.Timer(2.0, lambda: setattr(pool, "stopped_because", "SIGTERM")).start()
    outcomes = drive([0, 1, 2], concurrency=2)
    assert [(outcome.status, outcome.error) for outcome in outcomes] == [
        ("interrupted", "SIGTERM"),
        ("interrupted", "SIGTERM"),
        ("interrupted", "not started: SIGTERM"),
    ]
    assert worker.states() == {"Cancelled": 2}


def test_an_error_in_the_driver_cancels_its_flow_runs(
    worker: Worker, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(deployment_runs._Driver, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drive([0, 1])
    assert worker.states() == {"Cancelled": 2}


def test_runs_go_on_while_the_api_is_away_and_their_folders_tell(
    worker: Worker, drive: Drive, prefect_server: PrefectServer
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with slow_proxy(urlsplit(prefect_server.api_url).port or 0) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/api"

        def leave() -> None:
            wait_until(lambda: len(worker.flow_runs()) == 2, "two flow runs", 30)
            proxy.is_away = True
            worker.start()

        leaving = in_thread(leave)
        with temporary_settings({PREFECT_API_URL: url}):
            outcomes = drive([0, 1])
        leaving.join()
    assert proxy.is_away and [outcome.status for outcome in outcomes] == ["complete"] * 2


def test_a_worker_that_has_other_code_refuses(
    worker: Worker, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import SyncPrefectClient

    create = SyncPrefectClient.create_flow_run_from_deployment

    def other(self: Any, id: Any, *, parameters: dict[str, Any], **rest: Any) -> Any:
        return create(self, id, parameters={**parameters, "expected_id": "0" * 16}, **rest)

    monkeypatch.setattr(SyncPrefectClient, "create_flow_run_from_deployment", other)
    worker.start()
    [outcome] = drive([0])
    assert outcome.status == "failed" and outcome.error is not None
    assert "0" * 16 + " is expected: the code is another one" in outcome.error


@pytest.mark.long
def test_a_folder_that_only_the_worker_sees_is_said(
    worker: Worker, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment_runs, "newest_folder", lambda *_: None)
    worker.start()
    [outcome] = drive([0])
    assert outcome.status == "failed" and "workers and this machine both see" in (outcome.error or "")


def test_a_flow_run_that_somebody_deletes_is_an_end(
    worker: Worker, drive: Drive, prefect_server: PrefectServer
) -> None:
    def delete() -> None:
        wait_until(lambda: len(worker.flow_runs()) == 1, "a flow run", 30)
        with prefect_server.client() as client:
            client.delete_flow_run(worker.flow_runs()[0].id)

    deleting = in_thread(delete)
    [outcome] = drive([0])
    deleting.join()
    assert outcome.status == "failed" and "its flow run was deleted" in (outcome.error or "")


@pytest.mark.parametrize(
    ("deployment", "said"),
    [("run/nobody", "there is no 'run/nobody'; of the flow run there is: .*run/"), ("", "which one")],
)
def test_a_deployment_that_is_not_there_or_not_clear_is_refused(
    drive: Drive, prefect_server: PrefectServer, launchers: LauncherPool, deployment: str, said: str
) -> None:
    Worker(prefect_server, launchers)  # one more deployment
    with pytest.raises(ConfigError, match=said):
        drive([0], deployment=deployment)


def test_a_driver_needs_no_gpu(pool: LauncherPool, launchers: LauncherPool, toy_config: Make) -> None:
    plans = pool.prepare([Config.from_dict(toy_config(device="cuda", nproc_per_node=64))])
    assert plans[0].world_size == 64
    auto = Config.from_dict(toy_config(nproc_per_node="auto"))
    assert pool.prepare([auto])[0].identity == launchers.prepare([auto])[0].identity


@pytest.mark.long
def test_a_flow_run_that_begins_late_says_so(
    worker: Worker, prefect_server: PrefectServer, toy_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    from prefect.states import Scheduled

    due = datetime.now(UTC) - timedelta(minutes=5)
    with prefect_server.client() as client:
        client.create_flow_run_from_deployment(
            worker.deployment_id,
            parameters={"config": toy_config(experiment_name="late")},
            state=Scheduled(scheduled_time=due),
        )
    worker.start()
    wait_until(lambda: worker.states() == {"Completed": 1}, "the end of the run", 60)
    assert "this flow run begins 5:0" in caplog.text and "after it was due" in caplog.text


# with a real worker


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_driver_that_is_killed_three_times_runs_nothing_twice(
    prefect_server: PrefectServer, toy_config: Make, tmp_path: Path
) -> None:
    prefect(prefect_server, "work-pool", "create", "danling", "--type", "process", "--overwrite")
    prefect(prefect_server, "deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
    spec = {
        "group": "killed",
        "executor": "deployment",
        "deployment": "run/digits",
        "concurrency": 4,
        "experiments": [
            {
                "config": toy_config(experiment_name="killed", params={"sleep_seconds": 0.02}),
                "sweep": {"seed": list(range(12))},
            }
        ],
    }
    file = tmp_path / "group.yaml"
    file.write_text(yaml.safe_dump(spec))
    root = tmp_path / "experiments"
    command = [sys.executable, "-m", "flows.cli", "group", str(file)]
    environment = {**prefect_server.environment, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    words = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "danling"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    worker = subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, **quiet)
    try:
        for complete in (1, 4, 8):
            driver = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **quiet)
            wait_until(lambda wanted=complete: _complete(root) >= wanted, f"{complete} complete runs", 110)
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, done.stderr
    finally:
        worker.terminate()
        worker.wait(60)
    runs = list_runs(str(root))
    assert len(runs) == 12 and all(status is not None and status.is_complete for _, status in runs)
    from danling_core.runs import metadata

    assert {len(metadata.read(folder.metadata_url)["attempts"]) for folder, _ in runs} == {1}
    with prefect_server.client() as client:
        names = Counter(
            run.name
            for run in client.read_flow_runs(limit=200)
            if run.deployment_id is not None and "group:killed" in run.tags
        )
    assert len(names) == 12 and set(names.values()) == {1}


def _complete(root: Path) -> int:
    if not root.exists():
        return 0
    return sum(status is not None and status.is_complete for _, status in list_runs(str(root)))


def test_runs_that_nobody_takes_are_told_why(prefect_server: PrefectServer) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate

    target = Target(uuid4(), "run/toy", "leaving")
    with prefect_server.client() as client:
        client.create_work_pool(WorkPoolCreate(name="leaving", type="process"))
        assert "prefect worker start --pool leaving" in target.why_untaken()
        client.update_work_pool("leaving", WorkPoolUpdate(is_paused=True))
        assert "prefect work-pool resume leaving" in target.why_untaken()
        client.request("DELETE", "/work_pools/{name}", path_params={"name": "leaving"})
        assert "was deleted" in target.why_untaken() and "deploy again" in target.why_untaken()
