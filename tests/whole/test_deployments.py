"""The deployments that ship: they load, they are the examples, and the API checks their parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from danling_core.config import Config
from danling_core.config.sweep import ExperimentSpec, GroupSpec
from danling_core.parallel import loopback
from danling_core.runs.finding import list_runs
from flows.cli import main
from flows.cli_deploy import deployment_of
from tests.prefect_fixtures import PrefectServer
from tests.processes import wait_until

ROOT = Path(__file__).resolve().parents[2]
FILE = "deployments/prefect.yaml"
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / FILE).read_text())["deployments"]


def _parameters(entrypoint: str, name: str = "digits") -> dict[str, Any]:
    wanted = (f"danling_flows.{entrypoint}", name)
    [found] = [one for one in DEPLOYMENTS if (one["entrypoint"], one["name"]) == wanted]
    return dict(found["parameters"])


def test_the_default_parameters_are_the_digits_example() -> None:
    examples = ROOT / "examples" / "digits"
    assert Config(**_parameters("run")["config"]) == Config.load(examples / "run.yaml")
    experiment = ExperimentSpec(**_parameters("experiment")["spec"])
    assert experiment.configs() == ExperimentSpec.load(examples / "experiment.yaml").configs()
    group = GroupSpec(**_parameters("group")["spec"])
    assert group.configs() == GroupSpec.load(examples / "group.yaml").configs()


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda one: f"{one['entrypoint']}-{one['name']}")
def test_every_entrypoint_loads_and_takes_its_parameters(deployment: dict[str, Any]) -> None:
    from prefect.flows import load_flow_from_entrypoint

    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    flow.validate_parameters(deployment["parameters"])


def test_the_nightly_schedule_is_a_cron_in_a_stated_timezone() -> None:
    [nightly] = [one for one in DEPLOYMENTS if one["name"] == "digits-nightly"]
    assert nightly["schedules"] == [{"cron": "0 2 * * *", "timezone": "UTC", "active": True}]


def _prefect(server: PrefectServer, *words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prefect", *words]
    environment = {**server.environment, "PWD": str(folder), "COLUMNS": "400"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=110)


@pytest.fixture(scope="module")
def deployed(prefect_server: PrefectServer) -> PrefectServer:
    """The server with the pool and all deployments, made by the command of the README."""
    from prefect.client.schemas.actions import WorkPoolCreate

    with prefect_server.client() as client:
        client.create_work_pool(WorkPoolCreate(name="danling", type="process"), overwrite=True)
    done = _prefect(prefect_server, "deploy", "--all", "--prefect-file", FILE)
    assert done.returncode == 0, done.stdout + done.stderr
    return prefect_server


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"config": {"epoch_end": 3, "sed": 1}}, r"\bsed\b"),
        ({"config": {"epoch_end": "many"}}, "epoch_end"),
        ({"overrides": 3}, "overrides"),
        ({"fresh": "perhaps"}, "fresh"),
    ],
)
def test_the_api_refuses_a_wrong_parameter(
    deployed: PrefectServer, parameters: dict[str, Any], said: str
) -> None:
    with deployed.client() as client:
        deployment = client.read_deployment_by_name("run/digits")
        with pytest.raises(Exception, match=said):
            client.create_flow_run_from_deployment(deployment.id, parameters=parameters)


@pytest.mark.holds("system-3")
def test_the_nightly_schedule_makes_scheduled_runs(deployed: PrefectServer) -> None:
    from prefect.client.schemas.filters import FlowRunFilter

    with deployed.client() as client:
        nightly = client.read_deployment_by_name("run/digits-nightly")
        # what the scheduler service does every minute; the server of the tests runs without services
        client.request(
            "POST", "/deployments/{id}/schedule", path_params={"id": nightly.id}, json={"min_runs": 3}
        )
        of_nightly = FlowRunFilter.model_validate({"deployment_id": {"any_": [nightly.id]}})
        flow_runs = client.read_flow_runs(flow_run_filter=of_nightly)
        for flow_run in flow_runs:
            client.delete_flow_run(flow_run.id)
    assert len(flow_runs) >= 3 and all(flow_run.state.is_scheduled() for flow_run in flow_runs)
    assert {run.expected_start_time.strftime("%H:%M") for run in flow_runs} == {"02:00"}
    assert all(flow_run.parameters["fresh"] is True for flow_run in flow_runs)


@pytest.mark.holds("system-3")
@pytest.mark.long
def test_a_worker_runs_a_deployment_to_its_end(
    deployed: PrefectServer, toy_config: Callable[..., dict[str, Any]]
) -> None:
    config = toy_config(experiment_name="deployed", nproc_per_node=2)
    done = _prefect(deployed, "deployment", "run", "run/digits", "--param", f"config={json.dumps(config)}")
    assert done.returncode == 0, done.stdout + done.stderr
    done = _prefect(deployed, "worker", "start", "--pool", "danling", "--run-once")
    assert done.returncode == 0, done.stdout + done.stderr
    with deployed.client() as client:
        [flow_run] = [run for run in client.read_flow_runs() if run.name == "deployed-run"]
    assert flow_run.state.is_completed(), flow_run.state
    assert "experiment:deployed" in flow_run.tags
    [(_, status)] = list_runs(config["project_root"])
    assert status is not None and status.is_complete


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of the user's own, with a runner and the `prefect.yaml` that the README shows."""
    text = (ROOT / "deployments" / "README.md").read_text()
    [block] = [part for part in text.split("```")[1::2] if "entrypoint:" in part]
    (tmp_path / "prefect.yaml").write_text(block.removeprefix("yaml\n"))
    for package in ("flows", "tasks"):  # called as ours are
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("NAME = __file__\n")
    (tmp_path / "toy.py").write_text(
        "from flows import NAME\nfrom tests.toy_runner import ToyRunner as Toy\n\n"
        "class ToyRunner(Toy):\n    assert NAME.startswith(__file__.removesuffix('toy.py'))\n"
    )
    return tmp_path


@pytest.mark.long
def test_a_project_of_the_users_own_is_deployed_and_run_by_a_worker(
    deployed: PrefectServer, project: Path
) -> None:
    for words in (
        ["--no-prompt", "deploy", "--all"],
        ["deployment", "run", "run/toy"],
        ["worker", "start", "--pool", "danling", "--run-once"],
    ):
        done = _prefect(deployed, *words, folder=project)
        assert done.returncode == 0, done.stdout + done.stderr
    with deployed.client() as client:
        runs = [run for run in client.read_flow_runs() if run.name == "toy-run"]
    [flow_run] = [run for run in runs if run.deployment_id is not None]  # others share the server
    assert flow_run.state.is_completed(), flow_run.state
    [(_, status)] = list_runs(str(project / "experiments"))
    assert status is not None and status.is_complete and status.epochs == 5


def test_the_commands_of_the_readme_are_those_tested_here() -> None:
    text = (ROOT / "deployments" / "README.md").read_text()
    assert "prefect work-pool create danling --type process" in text
    assert f"prefect deploy --all --prefect-file {FILE}" in text
    assert "prefect worker start --pool danling" in text


@pytest.mark.long
def test_up_and_deploy_bring_an_empty_folder_to_a_completed_run(tmp_path: Path) -> None:
    from prefect.client.orchestration import SyncPrefectClient

    with loopback.listen(0) as listener:
        _, port = loopback.address(listener)
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    project = tmp_path / "project"
    project.mkdir()

    def danling(*words: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "danling_entry", *words],
            cwd=project,
            env={**environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def lines_of(up: subprocess.Popen[str]) -> list[str]:
        lines: list[str] = []
        assert up.stdout is not None
        while not lines or "Ctrl-C" not in lines[-1]:
            lines.append(up.stdout.readline())
            assert lines[-1], lines
        return lines

    up = danling("up", "--port", str(port))
    try:
        lines = lines_of(up)
        assert [line.split()[0] for line in lines[:5]] == [
            "server",
            "work",
            "worker",
            "automation",
            "deployments",
        ]
        api = {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
        deployed = danling("deploy", "--example", **api)
        out, _ = deployed.communicate(timeout=60)
        assert deployed.returncode == 0 and "deployed to" in out and "run/toy" in out, out
        again = danling("up", "--port", str(port))
        out, _ = again.communicate(timeout=60)
        assert again.returncode == 0 and out.count("(there already)") == 4, out
        refused = danling("deploy", "other.yaml", **api)
        out, _ = refused.communicate(timeout=60)
        assert refused.returncode == 2 and "is not written again" in out
        with SyncPrefectClient(api["PREFECT_API_URL"]) as client:
            deployment = client.read_deployment_by_name("run/toy")
            flow_run = client.create_flow_run_from_deployment(deployment.id)
            wait_until(lambda: client.read_flow_run(flow_run.id).state.is_final(), "the end of the run", 60)
            assert client.read_flow_run(flow_run.id).state.is_completed()
        [(_, status)] = list_runs(str(project / "experiments"))
        assert status is not None and status.is_complete
    finally:
        up.terminate()
        up.communicate(timeout=90)
    assert up.returncode == 0
    again = danling("up", "--port", str(port))
    try:
        [worker] = [line for line in lines_of(again) if line.startswith("worker")]
        assert "(started" in worker, "Prefect takes the worker of before for living"
    finally:
        again.terminate()
        again.communicate(timeout=90)


def test_deploy_without_a_file_or_an_api_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.chdir(tmp_path)
    assert main(["deploy"]) == 2
    assert "danling deploy --example" in capfd.readouterr().err
    (tmp_path / "bad.yaml").write_text("epoch_ned: 3\n")
    assert main(["deploy", "bad.yaml"]) == 2
    assert "epoch_ned" in capfd.readouterr().err
    (tmp_path / "good.yaml").write_text("runner: toy.py:Toy\nepoch_end: 3\n")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        for words in (["good.yaml"], ["good.yaml"], ["--example"]):
            assert main(["deploy", *words]) == 2, "the same command again is answered as before"
            assert "cannot be used" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml", "good.yaml"]


@pytest.mark.parametrize(
    ("name", "kind"), [("run", Config), ("experiment", ExperimentSpec), ("group", GroupSpec)]
)
def test_a_file_becomes_a_deployment_that_means_the_same(name: str, kind: Any) -> None:
    file = ROOT / "examples" / "digits" / f"{name}.yaml"
    made = yaml.safe_load(yaml.safe_dump(deployment_of(str(file), "pool"), sort_keys=False))
    assert made["entrypoint"] == f"danling_flows.{name}" and made["work_pool"]["name"] == "pool"
    [stated] = made["parameters"].values()
    loaded, read = kind(**stated), kind.load(file)
    assert configs_of(loaded) == configs_of(read)


def configs_of(value: Config | ExperimentSpec | GroupSpec) -> list[Config]:
    if isinstance(value, Config):
        return [value]
    if isinstance(value, ExperimentSpec):
        return value.configs()
    return [config for plan in value.configs() for config in plan.configs]


@pytest.mark.parametrize(("kind", "file"), [("systemd", "danling.service"), ("compose", "compose.yaml")])
def test_service_files_are_written_once_and_name_this_folder(
    kind: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["up", "--write", kind]) == 0
    text = (tmp_path / file).read_text()
    assert str(tmp_path) in text and "@" not in text.replace("@database", "")
    if kind == "compose":
        assert set(yaml.safe_load(text)["services"]) == {"database", "server", "worker"}
    else:
        [command] = [line for line in text.splitlines() if line.startswith("ExecStart=")]
        assert Path(command.removeprefix("ExecStart=").split()[0]).name == "danling"
    assert main(["up", "--write", kind]) == 2 and "is not written again" in capsys.readouterr().err


@pytest.mark.long
def test_a_pinned_deployment_names_its_code(
    deployed: PrefectServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from danling_flows import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", deployed.api_url)
    (tmp_path / "run.yaml").write_text("runner: toy.py:ToyRunner\nepoch_end: 1\ndevice: cpu\n")
    (tmp_path / "toy.py").write_text((ROOT / "flows" / "templates" / "toy.py").read_text())
    assert main(["deploy", "run.yaml", "--pin"]) == 0
    [entry] = yaml.safe_load((tmp_path / "prefect.yaml").read_text())["deployments"]
    assert len(entry["parameters"]["expected_id"]) == 8
    assert main(["deploy", "run.yaml", "--pin"]) == 2
    (tmp_path / "toy.py").write_text((tmp_path / "toy.py").read_text() + "\nCHANGED = True\n")
    state = run(**entry["parameters"], return_state=True)
    assert state.is_failed() and "is expected: the code is another one" in str(state.message)
    capsys.readouterr()
