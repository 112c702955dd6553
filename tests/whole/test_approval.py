"""A group that waits for an approval goes on, stops, or times out, as it is answered."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from danling_core.config.sweep import ExperimentSpec, GroupSpec
from danling_core.errors import ConfigError
from flows import approval as module
from flows.cli import main
from flows.pool import LauncherPool
from tests.prefect_fixtures import PrefectServer

Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def pool() -> Iterator[LauncherPool]:
    pool = LauncherPool()
    yield pool
    pool.close()


@pytest.fixture
def group(
    pool: LauncherPool, prefect_server: PrefectServer, toy_config: Make, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Runs a group of two experiments, the second behind a gate; arguments are the gate's."""
    from flows import pool as pools
    from flows.group import group

    monkeypatch.setattr(module, "_POLL_SECONDS", 1)
    token = pools._ambient.set(pool)

    def call(name: str, **approval: Any) -> Any:
        return group(_spec(name, toy_config, **approval), return_state=True)

    yield call
    pools._ambient.reset(token)
    pool.stopped_because = None
    pool.outcomes.clear()


def _spec(name: str, toy_config: Make, **approval: Any) -> GroupSpec:
    gated = {"config": toy_config(experiment_name=f"{name}-second", seed=1), "approval": approval}
    return GroupSpec(group=name, experiments=[{"config": toy_config(experiment_name=f"{name}-first")}, gated])


def _statuses(pool: LauncherPool) -> dict[str, tuple[str, str | None]]:
    return {
        str(outcome.experiment_name): (outcome.status, outcome.error) for outcome in pool.outcomes.values()
    }


def _once_it_waits(call: Callable[[], Any], server: PrefectServer, name: str) -> threading.Thread:
    """Call in a thread, once the group of this name is paused."""

    def work() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with server.client() as client:
                found = [run for run in client.read_flow_runs(limit=200) if run.name == name]
            if found and found[0].state.is_paused():
                return call()
            time.sleep(0.2)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
    thread.start()
    return thread


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "status"), [([], ("complete", None)), (["--no"], ("interrupted", "declined: it is late"))]
)
def test_a_group_goes_on_or_stops_as_it_is_answered(
    group: Callable[..., Any],
    pool: LauncherPool,
    prefect_server: PrefectServer,
    words: list[str],
    status: tuple[str, str | None],
) -> None:
    name = f"gated{len(words)}"
    answering = _once_it_waits(
        lambda: main(["approve", name, "--note", "it is late", *words]), prefect_server, name
    )
    state = group(name, message="Look at the first one.")
    answering.join()
    assert state.is_completed() if not words else state.name == "Interrupted"
    assert _statuses(pool) == {f"{name}-first": ("complete", None), f"{name}-second": status}


@pytest.mark.long
@pytest.mark.parametrize("on_timeout", ["stop", "begin"])
def test_nobody_answers(group: Callable[..., Any], pool: LauncherPool, on_timeout: str) -> None:
    name = f"silent-{on_timeout}"
    state = group(name, timeout_seconds=2, on_timeout=on_timeout)
    first, second = _statuses(pool)[f"{name}-first"], _statuses(pool)[f"{name}-second"]
    assert first == ("complete", None)
    if on_timeout == "begin":
        assert second == ("complete", None) and state.is_completed()
    else:
        assert second == ("interrupted", "not approved within 0:02") and state.name == "Interrupted"
        assert group(name, timeout_seconds=2, on_timeout="begin").is_completed(), "the next start asks again"


@pytest.mark.long
def test_a_group_that_is_stopped_waits_no_longer(
    group: Callable[..., Any], pool: LauncherPool, prefect_server: PrefectServer
) -> None:
    stopping = _once_it_waits(lambda: pool.interrupt("SIGTERM"), prefect_server, "stopped")
    began = time.monotonic()
    group("stopped")
    stopping.join()
    assert _statuses(pool)["stopped-second"] == ("interrupted", "SIGTERM")
    assert time.monotonic() - began < 60


@pytest.mark.long
def test_a_complete_group_asks_nobody(group: Callable[..., Any]) -> None:
    assert group("complete", timeout_seconds=1, on_timeout="begin").is_completed()
    began = time.monotonic()
    assert group("complete", timeout_seconds=3600).is_completed()
    assert time.monotonic() - began < 10


@pytest.mark.long
def test_what_waits_is_listed_and_another_name_is_refused(
    prefect_server: PrefectServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["approve"]) == 0
    assert "no group waits for an approval" in capsys.readouterr().out
    assert main(["approve", "nobody"]) == 2
    assert "'nobody': it does not wait: none waits" in capsys.readouterr().err


def test_a_gate_in_the_wrong_place_is_refused(toy_config: Make) -> None:
    gated = {"config": toy_config(), "approval": {}}
    with pytest.raises(ConfigError, match="nothing is above it"):
        GroupSpec(group="g", experiments=[gated])
    with pytest.raises(ConfigError, match="this one stands alone"):
        ExperimentSpec(**gated).configs()
    with pytest.raises(ConfigError, match="wanted 'stop' or 'begin', found 'go'"):
        GroupSpec(
            group="g", experiments=[{"config": toy_config()}, {**gated, "approval": {"on_timeout": "go"}}]
        )
