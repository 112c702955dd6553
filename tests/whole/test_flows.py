"""What Prefect shows of a run, an experiment and a group, and what is true whatever it shows."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from danling_core.config import Config
from danling_core.config.sweep import ExperimentSpec, GroupSpec
from danling_core.errors import ConfigError, RunFailed
from danling_core.runs.finding import list_runs
from flows.pool import LauncherPool, using
from tests.gcs_server import GCSServer
from tests.marks import rarely
from tests.prefect_fixtures import PrefectServer
from tests.processes import wait_until

Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def pool() -> Iterator[Any]:
    """Launchers that the tests of this module share: the first costs seconds."""
    pool = LauncherPool(slots=2)
    pool.start()
    yield pool
    pool.close()


@pytest.fixture
def flows_on(pool: Any, prefect_server: PrefectServer) -> Iterator[Any]:
    """Flows called in the test use the shared launchers."""
    from flows import pool as module

    token = module._ambient.set(pool)
    yield pool
    module._ambient.reset(token)


class Shown:
    """What the API shows, once it has caught up."""

    def __init__(self, server: PrefectServer) -> None:
        from flows.server import send_waiting

        send_waiting()
        self._server = server

    def flow_runs(self, **wanted: Any) -> list[Any]:
        with self._server.client() as client:
            found = client.read_flow_runs(limit=200)
        return [run for run in found if all(getattr(run, name) == value for name, value in wanted.items())]

    def task_runs(self, flow_run_id: Any, count: int) -> list[Any]:
        """The task runs of a flow run, in order; waits until there are `count` that have ended."""
        import time

        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        ended: list[Any] = []
        deadline = time.monotonic() + 30.0
        while len(ended) < count and time.monotonic() < deadline:
            with self._server.client() as client:
                runs = client.read_task_runs(
                    flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
                )
            ended = [run for run in runs if run.state is not None and run.state.is_final()]
            time.sleep(0.05)
        return sorted(ended, key=lambda run: run.start_time)

    def parent(self, flow_run: Any) -> Any:
        """The flow run that `flow_run` runs under."""
        with self._server.client() as client:
            return client.read_flow_run(client.read_task_run(flow_run.parent_task_run_id).flow_run_id)

    def artifacts(self, flow_run_id: Any) -> dict[str, Any]:
        from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

        with self._server.client() as client:
            found = client.read_artifacts(
                artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
            )
        return {artifact.type: artifact for artifact in found}


@pytest.mark.holds("system-1")
def test_a_run_is_shown_with_a_task_run_for_each_stage_and_its_metrics(
    flows_on: Any, prefect_server: PrefectServer, toy_config: Make
) -> None:
    from flows.run import run

    outcome = run(Config.from_dict(toy_config(nproc_per_node=2, run_name="shown")))
    assert outcome["status"] == "complete" and outcome["epochs"] == 2
    shown = Shown(prefect_server)
    [flow_run] = shown.flow_runs(name="toy-shown")
    assert flow_run.state.is_completed() and "accuracy" in flow_run.state.message
    tasks = shown.task_runs(flow_run.id, 6)
    assert [task.name for task in tasks] == ["seed-0", "epoch-0", "epoch-1", "evaluate", "score", "store"]
    assert all(task.state.is_completed() for task in tasks)
    assert "train loss" in tasks[1].state.message and "val loss" in tasks[1].state.message
    assert "experiment:toy" in flow_run.tags
    assert outcome["folder"] in shown.artifacts(flow_run.id)["markdown"].data


def test_a_complete_run_is_not_run_again(
    flows_on: Any, prefect_server: PrefectServer, toy_config: Make
) -> None:
    from flows.run import run

    config = Config.from_dict(toy_config(run_name="twice"))
    first, second = run(config), run(config)
    assert not first["skipped"] and second["skipped"]
    assert {**first, "skipped": True} == second
    states = [found.state.message for found in Shown(prefect_server).flow_runs(name="toy-twice")]
    assert sum("already" in message for message in states) == 1
    assert run(config, fresh=True)["folder"] != first["folder"]


def test_a_run_of_one_stage_says_what_is_left_and_goes_on_from_there(
    flows_on: Any, prefect_server: PrefectServer, toy_config: Make
) -> None:
    from flows.run import run

    config = Config.from_dict(toy_config(run_name="staged", stages=["train"]))
    trained = run(config)
    assert (trained["status"], trained["error"]) == ("complete", "stage evaluate is still to do")
    [shown] = Shown(prefect_server).flow_runs(name="toy-staged")
    assert shown.state.is_completed() and "not complete: stage evaluate" in shown.state.message
    whole = run(config, overrides={"stages": ["train", "evaluate"]})
    assert (whole["status"], whole["error"], whole["skipped"]) == ("complete", None, False)
    assert whole["folder"] == trained["folder"] and whole["seconds"] == trained["seconds"]


def test_overrides_change_the_config_before_it_is_checked(flows_on: Any, toy_config: Make) -> None:
    from flows.run import run

    outcome = run(Config.from_dict(toy_config()), overrides={"run_name": "wide", "params.width": 6})
    assert outcome["name"] == "toy-wide"
    assert Config.load(f"{outcome['folder']}/config.yaml").params["width"] == 6


@pytest.mark.holds("system-1", "levels-7")
def test_a_group_is_shown_above_its_experiments_above_their_runs(
    flows_on: Any, prefect_server: PrefectServer, toy_config: Make
) -> None:
    from flows.group import group

    experiments = [
        {"config": toy_config(experiment_name="one"), "sweep": {"seed": [0, 1]}},
        {"config": toy_config(experiment_name="two"), "runs": [{"params.width": 5}]},
    ]
    rows = group(GroupSpec(group="toys", concurrency=2, experiments=experiments))
    assert [row["rank"] for row in rows] == [1, 2, 3]
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    shown = Shown(prefect_server)
    [top] = shown.flow_runs(name="toys")
    assert top.state.is_completed() and top.parent_task_run_id is None
    assert {"group:toys"} <= set(top.tags)
    for name in ("one-run-seed=0", "one-run-seed=1", "two-run-width=5"):
        [flow_run] = shown.flow_runs(name=name)
        experiment = shown.parent(flow_run)
        assert experiment.name == name.partition("-")[0]
        assert shown.parent(experiment).id == top.id
        assert {"group:toys", f"experiment:{experiment.name}"} <= set(flow_run.tags)
        assert [task.name for task in shown.task_runs(flow_run.id, 6)][1:3] == ["epoch-0", "epoch-1"]
    assert {"markdown", "table"} <= set(shown.artifacts(top.id))
    root = toy_config()["project_root"]
    assert [status.group for _, status in list_runs(root) if status] == ["toys"] * 3
    folders = sorted(path.name.rpartition("-")[0] for path in Path(root).iterdir())
    assert folders == ["one-run-seed=0", "one-run-seed=1", "two-run-width=5"]  # none of the group


def test_a_run_that_two_experiments_share_is_trained_once_and_is_in_both(
    flows_on: Any, prefect_server: PrefectServer, toy_config: Make
) -> None:
    from flows.group import group

    experiments = [
        {"config": toy_config(experiment_name="rates"), "sweep": {"params.width": [5, 6]}},
        {"config": toy_config(experiment_name="seeds"), "sweep": {"seed": [0, 1], "params.width": [5]}},
    ]
    rows = group(GroupSpec(group="shared", concurrency=2, experiments=experiments))
    names = [row["name"] for row in rows]
    assert len(names) == 4 and sum(name.startswith("rates") for name in names) == 2
    assert len(list_runs(toy_config()["project_root"])) == 3


def test_a_run_that_fails_does_not_stop_the_others_and_is_named(
    flows_on: Any, prefect_server: PrefectServer, toy_config: Make
) -> None:
    from flows.experiment import experiment

    runs = [{"params.fail_at_epoch": 1}, {"seed": 1}]
    spec = ExperimentSpec(config=toy_config(experiment_name="half"), runs=runs, concurrency=2)
    state = experiment(spec, return_state=True)
    assert state.is_failed()
    assert "1 of 2 runs failed" in state.message and "fail_at_epoch" in state.message
    statuses = {status.status for _, status in list_runs(toy_config()["project_root"]) if status}
    assert statuses == {"failed", "complete"}


def test_a_failing_rank_fails_its_epoch_and_the_run_with_the_ranks_traceback(
    flows_on: Any, prefect_server: PrefectServer, toy_config: Make
) -> None:
    from flows.run import run

    config = toy_config(run_name="fails", nproc_per_node=2, params={"fail_at_epoch": 1, "fail_rank": 1})
    with pytest.raises(RunFailed) as caught:
        run(Config.from_dict(config))
    assert caught.value.rank == 1
    assert "Traceback" in (caught.value.traceback or "")
    shown = Shown(prefect_server)
    [flow_run] = shown.flow_runs(name="toy-fails")
    states = {task.name: task.state.type.value for task in shown.task_runs(flow_run.id, 4)}
    assert states["epoch-0"] == "COMPLETED" and states["epoch-1"] == "FAILED"


def test_nothing_starts_when_one_run_of_a_group_cannot_be_run(
    flows_on: Any, toy_config: Make, tmp_path: Path
) -> None:
    from flows.group import group

    bad = {"config": toy_config(experiment_name="bad", params={"widht": 3})}
    spec = GroupSpec(group="toys", experiments=[{"config": toy_config()}, bad])
    with pytest.raises(ConfigError, match="width"):
        group(spec)
    assert not (tmp_path / "experiments").exists()


def _editable(folder: Path, class_body: str = "    pass") -> tuple[Path, str]:
    """A runner in a file of its own, for tests to edit; the file, and its address for a config."""
    source = folder / "mine.py"
    source.write_text(f"from tests.toy_runner import ToyRunner\n\n\nclass Mine(ToyRunner):\n{class_body}\n")
    return source, f"{source}:Mine"


@pytest.mark.long
@pytest.mark.holds("bugs-8")
def test_code_that_is_edited_during_a_sweep_is_not_trained_under_the_old_id(
    prefect_server: PrefectServer, toy_config: Make, tmp_path: Path
) -> None:
    from flows.experiment import experiment

    source, runner = _editable(tmp_path)

    class Editor:
        def on_event(self, name: str, event: dict[str, Any]) -> None:
            pass

        def on_outcome(self, outcome: Any) -> None:
            source.write_text(source.read_text() + "# edited\n")

    config = toy_config(runner=runner)
    pool = LauncherPool(listener=Editor())
    with using(pool):
        experiment(ExperimentSpec(config=config, sweep={"seed": [0, 1]}), return_state=True)
    first, second = pool.outcomes.values()
    assert first.status == "complete"
    assert second.status == "refused" and "the code changed" in (second.error or "")
    assert len(list_runs(config["project_root"])) == 1
    stated = {**config, "experiment_id": "e" * 40}
    pool = LauncherPool(listener=Editor())
    with using(pool):
        experiment(ExperimentSpec(config=stated, sweep={"seed": [0, 1]}), return_state=True)
    assert [outcome.status for outcome in pool.outcomes.values()] == ["complete"] * 2


@pytest.mark.long
def test_code_that_is_edited_during_a_run_is_not_relaunched(
    flows_on: Any, toy_config: Make, tmp_path: Path
) -> None:
    from flows.run import run

    _, runner = _editable(
        tmp_path,
        """    def train_step(self, data):
        if self.epochs == 1:
            with open(__file__, "a") as file:
                file.write("# edited")
        return super().train_step(data)""",
    )
    config = toy_config(runner=runner, params={"kill_at_step": 3}, dataloader={"batch_size": 25})
    with pytest.raises(RunFailed, match="the code changed since this run was prepared"):
        run(Config.from_dict(config))


def test_a_run_that_another_process_owns_is_refused_by_name(flows_on: Any, toy_config: Make) -> None:
    from danling_core.runs.finding import parent_url
    from danling_core.runs.lease import Lease
    from flows.run import run

    config = Config.from_dict(toy_config())
    [plan] = flows_on.prepare([config])
    identity = plan.identity
    lease = Lease.acquire(parent_url(config.project_root, identity.name, identity.id), "someone else")
    try:
        with lease.beating(), pytest.raises(RunFailed, match="someone else"):
            run(config, if_busy="fail")
    finally:
        lease.release()


def test_a_run_at_work_elsewhere_is_followed_and_gone_on_with_once_its_owner_gives_it_up(
    flows_on: Any, toy_config: Make, prefect_server: PrefectServer
) -> None:
    import threading

    from danling_core.session.open_run import open_run
    from danling_core.writers.events import EventLog
    from flows.run import run

    config = Config.from_dict(toy_config(experiment_name="elsewhere"))
    [plan] = flows_on.prepare([config])
    opened = open_run(plan.config, plan.identity)
    assert opened.lease is not None
    heard: list[str] = []
    ended: list[Any] = []

    class Ear:
        def on_event(self, name: str, event: dict[str, Any]) -> None:
            heard.append(event["event"])

        def on_outcome(self, outcome: Any) -> None: ...

    flows_on.listener = Ear()
    context = contextvars.copy_context()
    follower = threading.Thread(target=lambda: ended.append(context.run(run, config)))
    log = EventLog(f"{opened.work_dir}/events.jsonl", "1.0")
    try:
        with opened.lease.beating():
            log.emit("epoch_began", epoch=0, index=0, step=0)
            follower.start()
            wait_until(lambda: "epoch_began" in heard, "the epoch that is under way", 30)
            assert not ended and len(list_runs(config.project_root)) == 1
    finally:
        log.close()
        opened.lease.release()
    follower.join(60)
    flows_on.listener = None
    [outcome] = ended
    assert outcome["status"] == "complete" and outcome["folder"] == opened.folder.url
    [(_, status)] = list_runs(config.project_root)
    assert status is not None and status.is_complete


def test_slots_are_made_taken_waited_for_and_given_back(
    flows_on: Any, toy_config: Make, prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    from flows import slots
    from flows.run import run
    from flows.slots import taken

    told: list[str] = []
    held, given = threading.Event(), threading.Event()

    def note(text: str, *values: Any) -> None:
        told.append(text % values)
        if told[-1].startswith("waiting"):
            given.set()

    monkeypatch.setattr(slots.logger, "warning", note)
    config = Config.from_dict(toy_config(experiment_name="slots", slots={"test-gpu": 2}))

    def hold() -> None:
        with taken({"test-gpu": 2}, flows_on):
            held.set()
            given.wait(30)

    holder = threading.Thread(target=contextvars.copy_context().run, args=(hold,))
    holder.start()
    assert held.wait(30)
    outcome: Any = run(config)
    assert outcome["status"] == "complete" and given.is_set(), "it began once the slots were free"
    holder.join(30)
    with prefect_server.client() as client:
        limit = client.read_global_concurrency_limit_by_name("test-gpu")
    assert (limit.limit, limit.active_slots) == (2, 0)
    assert [line[:8] for line in told] == ["made the", "waiting "], told
    again: Any = run(config)
    assert again["skipped"]


def test_a_run_that_is_stopped_while_it_waits_for_slots_is_interrupted(
    flows_on: Any, toy_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.slots import taken
    from flows.training import open_and_train
    from flows.view import FlowView
    from tasks.artifacts import FlowArtifacts
    from tasks.reporter import reporting

    config = Config.from_dict(toy_config(experiment_name="waits", slots={"test-turn": 1}))
    with taken({"test-turn": 1}, flows_on), reporting() as reporter:
        monkeypatch.setattr(flows_on, "why_stopped", lambda: "SIGTERM")
        outcome = open_and_train(config, flows_on, FlowView(FlowArtifacts(reporter)))
    assert (outcome.status, outcome.error) == ("interrupted", "not started: SIGTERM")
    assert not list_runs(config.project_root)


def test_old_flow_runs_are_pruned_from_the_api_and_no_file_is(
    flows_on: Any, toy_config: Make, prefect_server: PrefectServer, capfd: pytest.CaptureFixture[str]
) -> None:
    from flows.cli import main
    from flows.run import run

    config = Config.from_dict(toy_config(experiment_name="old"))
    outcome: Any = run(config)
    [flow_run] = Shown(prefect_server).flow_runs(name="old-run")
    root = config.project_root
    before = sorted(Path(root).rglob("*"))
    assert main(["prune", root, "--api", "--older-than", "1d", "--yes"]) == 0
    assert "0 flow runs" in capfd.readouterr().out
    assert main(["prune", root, "--api", "--older-than", "0h"]) == 0
    assert (
        "1 flow runs" in (said := capfd.readouterr().out) and "would be deleted" in said and "old-run" in said
    )
    assert Shown(prefect_server).artifacts(flow_run.id)
    assert main(["prune", root, "--api", "--older-than", "0h", "--yes"]) == 0
    assert not Shown(prefect_server).flow_runs(name="old-run")
    assert not Shown(prefect_server).artifacts(flow_run.id)
    assert sorted(Path(root).rglob("*")) == before and outcome["status"] == "complete"


@pytest.mark.parametrize(
    "words",
    [
        ["--api"],
        ["--older-than", "9d"],
        ["--api", "--older-than", "soon"],
        ["--api", "--older-than", "9d", "--keep-best"],
    ],
)
def test_a_prune_of_the_api_that_is_not_whole_is_refused(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from flows.cli import main

    assert main(["prune", str(tmp_path), *words]) == 2
    assert "--older-than" in capfd.readouterr().err


@pytest.mark.long
def test_an_interrupted_run_is_shown_so_and_resumes_where_it_was(
    prefect_server: PrefectServer, toy_config: Make
) -> None:
    from flows.outcome import RunOutcome
    from flows.run import run

    class Stopper:
        def on_event(self, name: str, event: dict[str, Any]) -> None:
            if event["event"] == "epoch_finished" and event["epoch"] == 1:
                stopped.interrupt("the test")

        def on_outcome(self, outcome: RunOutcome) -> None:
            pass

    config = Config.from_dict(toy_config(run_name="stopped", epoch_end=6, params={"sleep_seconds": 0.02}))
    stopped = LauncherPool(listener=Stopper())
    with using(stopped):
        state = run(config, return_state=True)
    assert state.is_cancelled() and state.name == "Interrupted"
    with using(LauncherPool()):
        outcome = run(config)
    assert outcome["status"] == "complete" and outcome["epochs"] == 6
    shown = Shown(prefect_server)
    epochs = [
        task.name
        for flow_run in sorted(shown.flow_runs(name="toy-stopped"), key=lambda found: found.start_time)
        for task in shown.task_runs(flow_run.id, 4)
        if task.name.startswith("epoch") and task.state.is_completed()
    ]
    assert epochs == [f"epoch-{epoch}" for epoch in range(6)]


@pytest.mark.parametrize("level", ["run", *rarely(["experiment"])])
def test_a_flow_run_that_is_cancelled_through_the_api_saves_and_stops(
    level: str, prefect_server: PrefectServer, toy_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"cancelled-{level}"
    monkeypatch.setattr("flows.cancellation.POLL_SECONDS", 0.2)
    pool = LauncherPool(listener=AtFirstEpoch(lambda: _cancel(prefect_server.client(), name)))
    config = toy_config(**_NAMES[level](name), epoch_end=1000, params={"sleep_seconds": 0.02})
    with using(pool):
        state = _call(level, config)
    assert state.is_cancelled()
    assert [outcome.status for outcome in pool.outcomes.values()] == ["interrupted"] * (1 + (level != "run"))
    [flow_run] = Shown(prefect_server).flow_runs(name=name)
    assert flow_run.state.is_cancelled()
    [(_, status)] = list_runs(config["project_root"])
    assert status is not None and status.status == "interrupted" and 0 < status.epochs < 1000


@pytest.mark.long
def test_cancelling_an_experiment_of_a_group_stops_its_runs_and_no_other(
    prefect_server: PrefectServer, toy_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.group import group

    monkeypatch.setattr("flows.cancellation.POLL_SECONDS", 0.2)
    slow = {"sleep_seconds": 0.02}
    endless = toy_config(experiment_name="endless", epoch_end=1000, params=slow)
    other = toy_config(experiment_name="other", epoch_end=30, params=slow)
    experiments = [{"config": endless, "sweep": {"seed": [0, 1, 2]}}, {"config": other}]
    cancel = AtFirstEpoch(lambda: _cancel(prefect_server.client(), "endless"), of="endless-")
    pool = LauncherPool(2, listener=cancel)
    with using(pool):
        spec = GroupSpec(group="one-is-cancelled", concurrency=2, experiments=experiments)
        state = group(spec, return_state=True)
    ended = {outcome.name: outcome.status for outcome in pool.outcomes.values()}
    assert ended.pop("other-run") == "complete"
    assert list(ended.values()) == ["interrupted"] * 3
    assert state.name == "Interrupted" and "3 of 4 runs" in state.message


@pytest.mark.long
def test_a_run_that_waits_for_a_slot_is_cancelled_without_one(
    prefect_server: PrefectServer, toy_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

    monkeypatch.setattr("flows.cancellation.POLL_SECONDS", 0.2)
    with prefect_server.client() as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name="taken", limit=1))
        client.increment_concurrency_slots(names=["taken"], slots=1, mode="concurrency")
    config = toy_config(experiment_name="waits", run_name="long", slots={"taken": 1})
    canceller = threading.Thread(target=_cancel_once_at_work, args=(prefect_server, "waits-long"))
    canceller.start()
    with using(LauncherPool()):
        state = _call("run", config)
    assert state.name == "Interrupted" and "cancelled in Prefect" in state.message
    assert list_runs(config["project_root"]) == [], "nothing was made"


@pytest.mark.long
def test_a_cancellation_is_heeded_after_an_absence_of_the_api(
    toy_config: Make, prefect_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import SyncPrefectClient

    from flows.server import EmbeddedServer, using_api

    monkeypatch.setattr("flows.cancellation.POLL_SECONDS", 0.2)
    monkeypatch.setenv("PREFECT_HOME", str(prefect_home))
    servers = [EmbeddedServer(), EmbeddedServer()]
    servers[0].start()

    def restart_and_cancel() -> None:
        servers[0].stop()
        servers[1].start(int(servers[0].api_url.rpartition(":")[2].partition("/")[0]))
        servers[1].wait()
        _cancel(SyncPrefectClient(servers[1].api_url), "cancelled-late")

    config = toy_config(
        experiment_name="cancelled", run_name="late", epoch_end=4000, params={"sleep_seconds": 0.02}
    )
    try:
        with (
            using_api(servers[0]),
            using(LauncherPool(listener=AtFirstEpoch(restart_and_cancel))),
        ):
            state = _call("run", config)
            with SyncPrefectClient(servers[1].api_url) as client:
                [flow_run] = client.read_flow_runs()
        assert state.is_cancelled() and flow_run.state.is_cancelled()
        [(_, status)] = list_runs(config["project_root"])
        assert status is not None and status.status == "interrupted" and 0 < status.epochs < 4000
    finally:
        for server in servers:
            server.stop()


class AtFirstEpoch:
    """A listener that does one thing when the first epoch has ended (of a run whose name begins with `of`)."""

    def __init__(self, action: Callable[[], None], of: str = "") -> None:
        self._action: Callable[[], None] | None = action
        self._of = of

    def on_event(self, name: str, event: dict[str, Any]) -> None:
        is_due = event["event"] == "epoch_finished" and name.startswith(self._of)
        if is_due and self._action is not None:
            action, self._action = self._action, None
            action()

    def on_outcome(self, outcome: Any) -> None:
        pass


# The names of a config whose flow run at that level shall have this name.
_NAMES: dict[str, Callable[[str], dict[str, str]]] = {
    "run": lambda name: dict(zip(("experiment_name", "run_name"), name.split("-"), strict=True)),
    "experiment": lambda name: {"experiment_name": name},
}


def _call(level: str, config: dict[str, Any]) -> Any:
    from flows.experiment import experiment
    from flows.run import run

    if level == "run":
        return run(Config.from_dict(config), return_state=True)
    return experiment(ExperimentSpec(config=config, sweep={"seed": [0, 1]}), return_state=True)


def _cancel_once_at_work(server: PrefectServer, name: str) -> None:
    def is_at_work() -> bool:
        with server.client() as client:
            return any(
                run.name == name and run.state.is_running() for run in client.read_flow_runs(limit=200)
            )

    wait_until(is_at_work, f"{name} to be at work", 60)
    _cancel(server.client(), name)


def _cancel(client: Any, name: str) -> None:
    """What `prefect flow-run cancel` does."""
    from prefect.client.schemas.objects import StateType
    from prefect.states import State

    with client:
        [flow_run] = [found for found in client.read_flow_runs(limit=200) if found.name == name]
        client.set_flow_run_state(flow_run.id, State(type=StateType.CANCELLING))


@pytest.mark.long
def test_where_prefect_makes_no_flow_runs_a_group_trains_all_the_same(
    prefect_server: PrefectServer, toy_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flows.experiment
    import flows.group

    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("the API is away")

    monkeypatch.setattr(flows.group, "experiment", away)
    monkeypatch.setattr(flows.experiment, "run", away)
    experiments = [{"config": toy_config(experiment_name=name)} for name in ("one", "two")]
    pool = LauncherPool()
    with using(pool):
        state = flows.group.group(GroupSpec(group="unseen", experiments=experiments), return_state=True)
    assert state.is_completed()
    assert [outcome.status for outcome in pool.outcomes.values()] == ["complete"] * 2


def test_an_experiment_whose_flow_fails_before_its_runs_is_told_run_by_run(
    flows_on: Any, toy_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flows.experiment
    from flows.group import group

    def full(*_: Any) -> list[str]:
        raise OSError("no space left")

    monkeypatch.setattr(flows.experiment, "tags_of", full)
    experiments = [{"config": toy_config(experiment_name="unbegun"), "sweep": {"seed": [0, 1]}}]
    state = group(GroupSpec(group="unbegun", experiments=experiments), return_state=True)
    assert state.is_failed() and "2 of 2 runs failed" in state.message
    errors = [outcome.error for outcome in flows_on.outcomes.values() if outcome.experiment_name == "unbegun"]
    assert len(errors) == 2 and all("no space left" in (error or "") for error in errors)


def test_a_store_that_is_away_at_the_end_costs_no_outcome(
    toy_config: Make, gcs_server: GCSServer, tmp_path: Path
) -> None:
    from danling_core.launch.plan import RunPlan
    from danling_core.runs.folder import RunFolder, Status
    from danling_core.session.open_run import open_run
    from flows.training import _ended, _release

    config = Config.from_dict(toy_config(project_root="gs://danling/away", scratch=str(tmp_path)))
    plan = RunPlan(config)
    opened = open_run(config, plan.identity)
    status = Status(status="interrupted", name=plan.identity.name, id=plan.identity.id, epochs=3)
    RunFolder(opened.work_dir).write_status(status)
    gcs_server.fault = lambda method, path: 403  # an absence is the same to us, after two minutes
    outcome = _ended(plan, opened, status="interrupted", error="SIGTERM")
    _release(opened)
    assert outcome.status == "interrupted" and outcome.epochs == 3 and outcome.folder == opened.folder.url


@pytest.mark.holds("system-6")
def test_an_unreachable_api_spoils_what_is_shown_and_not_the_run(
    prefect_server: PrefectServer, toy_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import stages
    from flows.run import run

    class Away:
        name = "away"

        def __call__(self, **parameters: Any) -> None:
            raise ConnectionError("the API is away")

    for name in ("train_epoch", "evaluate"):
        monkeypatch.setattr(stages, name, Away())
    assert run(Config.from_dict(toy_config(run_name="unseen")))["status"] == "complete"


@pytest.mark.parametrize("ending", ["interrupted", "failed"])
def test_a_flow_that_ends_before_its_body_is_the_end_of_its_run(toy_config: Make, ending: str) -> None:
    from prefect.states import Cancelled, Failed

    from flows.experiment import _train_unseen
    from flows.flow_call import FlowCall

    state: Any = (Cancelled if ending == "interrupted" else Failed)(message="before it began")
    call = FlowCall(lambda: state)
    call.start()
    call.wait_until_taken(10)
    outcome = _train_unseen(Config.from_dict(toy_config()), LauncherPool(), call, False, "follow")
    assert (outcome.status, outcome.error) == (ending, "before it began")
