"""The same run started twice: the second follows, waits or fails; and the flow runs that the dead leave behind."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from danling_core.runs.finding import list_runs
from tests.prefect_fixtures import PrefectServer
from tests.processes import wait_until

Make = Callable[..., dict[str, Any]]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(start_danling: Start, toy_config: Make, prefect_server: PrefectServer) -> Start:
    """Starts `danling` with a run of about fifteen seconds, or a group with that run and another one."""

    def begin(*words: str, command: str = "run", **fields: Any) -> subprocess.Popen[str]:
        config = toy_config(
            **{"epoch_end": 150, "nproc_per_node": 1, "params": {"sleep_seconds": 0.1}, **fields}
        )
        group = {"group": "twice", "experiments": [{"config": config, "sweep": {"seed": [0, 1]}}]}
        values = config if command == "run" else group
        return start_danling(command, values, *words, environment=prefect_server.environment)

    return begin


def wait_for_epochs(root: str, count: int = 2) -> None:
    wait_until(lambda: any(s is not None and s.epochs >= count for _, s in list_runs(root)), "epochs", 60)


def ended(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, error = process.communicate(timeout=90)
    assert process.returncode == code, (out, error)
    return out, error


def flow_runs(server: PrefectServer, name: str) -> list[Any]:
    """The flow runs of a name and those of its kind, the newest first."""
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    wanted = FlowRunFilter.model_validate({"name": {"any_": [name]}})
    with server.client() as client:
        return list(client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.START_TIME_DESC))


@pytest.mark.long
def test_a_second_start_follows_the_first_to_the_same_result(
    start: Start, toy_config: Make, prefect_server: PrefectServer
) -> None:
    name = {"experiment_name": "followed"}
    root = toy_config()["project_root"]
    first = start(**name)
    wait_for_epochs(root)
    second = start(**name)
    (told, _), (followed, warned) = ended(first), ended(second)
    assert "if_busy is 'follow'" in warned
    mine, its = (re.findall(r"epoch +\d+/150.*?accuracy [\d.]+", text) for text in (followed, told))
    assert mine and mine == its[-len(mine) :], "the epochs of the first are those of the second"
    assert len(list_runs(root)) == 1
    states = [each.state for each in flow_runs(prefect_server, "followed-run")]
    assert [state.name for state in states] == ["Completed", "Completed"]


@pytest.mark.long
@pytest.mark.parametrize("if_busy", ["follow", "wait"])
def test_a_second_start_takes_over_from_a_first_that_dies_and_says_so_in_the_api(
    if_busy: str, start: Start, toy_config: Make, prefect_server: PrefectServer
) -> None:
    name = {"experiment_name": f"dies-{if_busy}"}
    root = toy_config()["project_root"]
    first = start(**name, epoch_end=100)
    wait_for_epochs(root)
    second = start("--if-busy", if_busy, **name, epoch_end=100)
    wait_until(
        lambda: len(flow_runs(prefect_server, f"dies-{if_busy}-run")) == 2, "the second's flow run", 90
    )
    first.kill()
    out, _ = ended(second)
    [(_, status)] = list_runs(root)
    assert status is not None and status.is_complete and status.bitwise and status.epochs == 100
    newest, dead = flow_runs(prefect_server, f"dies-{if_busy}-run")
    assert newest.state.is_completed() and dead.state.is_crashed()
    assert f"pid {first.pid}" in dead.state.message and str(newest.id) in dead.state.message
    with prefect_server.client() as client:
        from prefect.client.schemas.filters import TaskRunFilter

        of_dead = TaskRunFilter.model_validate({"flow_run_id": {"any_": [str(dead.id)]}})
        assert all(each.state.is_final() for each in client.read_task_runs(task_run_filter=of_dead))


@pytest.mark.long
def test_a_follower_that_is_stopped_leaves_the_first_alone(start: Start, toy_config: Make) -> None:
    root = toy_config()["project_root"]
    first = start()
    wait_for_epochs(root)
    second = start()
    wait_until(
        lambda: "epoch" in (second.stdout.readline() if second.stdout else ""), "the second's first line", 60
    )
    second.send_signal(signal.SIGTERM)
    _, error = ended(second, 75)
    assert "to resume" in error
    ended(first)
    [(_, status)] = list_runs(root)
    assert status is not None and status.is_complete


@pytest.mark.long
def test_a_second_start_may_be_told_to_fail(start: Start, toy_config: Make) -> None:
    root = toy_config()["project_root"]
    first = start()
    wait_for_epochs(root)
    _, error = ended(start("--if-busy", "fail"), 1)
    assert f"pid {first.pid}" in error and "Traceback" not in error
    ended(first)


@pytest.mark.long
def test_a_second_start_of_a_group_is_complete_with_the_first(start: Start, toy_config: Make) -> None:
    root = toy_config()["project_root"]
    first = start(command="group")
    wait_for_epochs(root)
    second = start(command="group")
    (told, _), (followed, _) = ended(first), ended(second)
    assert told.splitlines()[-3:] == followed.splitlines()[-3:], "one leaderboard"
    assert len(list_runs(root)) == 2
