"""`danling` with its root on S3: what is refused, what is never said, what is listed and moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from danling_core import storage
from danling_core.runs.finding import list_runs
from flows.cli import main
from tests.prefect_fixtures import PrefectServer
from tests.s3_faults import CANARY, FaultyProxy
from tests.store_fixtures import KEY_ID

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def file(s3_root: str, toy_config: Make, tmp_path: Path) -> Callable[..., str]:
    """Writes the config of a run of two ranks on S3 and returns its path."""

    def write(**changes: Any) -> str:
        fields = {
            "runner": "tests.careless_runner:CarelessRunner",
            "project_root": s3_root,
            "nproc_per_node": 2,
            "tensorboard": True,
            "scratch": str(tmp_path / "scratch"),
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(toy_config(**{**fields, **changes})))
        return str(path)

    return write


@pytest.mark.long
@pytest.mark.parametrize("refusal", ["AccessDenied", "InvalidAccessKeyId", "NoSuchBucket"])
def test_a_store_that_refuses_is_one_message_and_exit_1(
    refusal: str,
    file: Callable[..., str],
    prefect_server: PrefectServer,
    s3_root: str,
    s3_proxy: FaultyProxy,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if refusal == "NoSuchBucket":
        arguments, said = ["project_root=s3://no-such-bucket-at-all/experiments"], "no such bucket"
    else:
        s3_proxy.refusal = refusal
        arguments, said = [], "access key ending in '1234'"
    assert main(["run", file(), *arguments]) == 1
    error = capfd.readouterr().err
    [line] = [line for line in error.splitlines() if "danling: " in line]
    assert said in line and "s3://" in line
    assert "Traceback" not in error and CANARY not in error
    s3_proxy.refusal = None
    assert storage.list_tree(s3_root) == [] and not (tmp_path / "scratch").exists()


@pytest.mark.holds("config-5")
@pytest.mark.long
@pytest.mark.parametrize("is_careless", [False, True])
def test_no_secret_is_in_any_output_of_a_run(
    is_careless: bool,
    file: Callable[..., str],
    prefect_server: PrefectServer,
    s3_root: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = main(["run", file(params={"is_careless": is_careless}), "--verbose"])
    assert code == int(is_careless)
    assert main(["runs", s3_root]) == 0
    [(folder, status)] = list_runs(s3_root)
    assert status is not None and status.status == ("failed" if is_careless else "complete")
    assert main(["show", folder.url]) == 0
    printed = capfd.readouterr()
    assert "checkpoint  step " in printed.out and " ago" in printed.out
    told = {"stdout": printed.out.encode(), "stderr": printed.err.encode()}
    for entry in storage.list_tree(s3_root):
        told[entry.path] = storage.read_bytes(storage.join(s3_root, entry.path))
    for path in tmp_path.glob("scratch/**/*"):
        if path.is_file():
            told[f"scratch: {path.name}"] = path.read_bytes()
    for path in Path(prefect_server.environment["PREFECT_HOME"]).glob("prefect.db*"):  # states, artifacts
        told[f"server: {path.name}"] = path.read_bytes()
    assert {"run/000001.log", "events/000001.jsonl", "metadata.json", "config.yaml"} <= {
        name.partition("/")[2].partition("/")[2] for name in told
    }
    assert any("tfevents" in name for name in told) and "server: prefect.db" in told
    if is_careless:
        assert b"no answer from" in told["stderr"] and b"ConnectionError" in told["stderr"]
        assert any(b"no answer from" in data for name, data in told.items() if name.startswith("server: "))
    for secret in (CANARY, KEY_ID):
        assert [name for name, data in told.items() if secret.encode() in data] == []


@pytest.mark.long
def test_commands_reach_a_store_by_an_endpoint_that_only_the_command_line_names(
    toy_config: Make,
    prefect_server: PrefectServer,
    s3_root: str,
    moto_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(toy_config(project_root=str(tmp_path / "here"), epoch_end=1)))
    assert main(["run", str(file)]) == 0
    [(folder, status)] = list_runs(str(tmp_path / "here"))
    assert status is not None
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    there = ["--endpoint-url", moto_url]
    capsys.readouterr()
    assert main(["push", folder.url, s3_root, *there]) == 0
    assert main(["runs", s3_root, *there]) == 0
    assert status.name in capsys.readouterr().out
    assert main(["show", status.id, "--root", s3_root, *there]) == 0
    assert main(["verify", status.id, "--root", s3_root, *there]) == 0
    assert main(["pull", status.id, str(tmp_path / "back"), "--root", s3_root, *there]) == 0
    assert main(["prune", s3_root, "--keep-best", *there]) == 0
    assert storage.exists(str(tmp_path / "back"))
