"""Credentials of a store from a block of a real Prefect server: understood, handed on, and told to nobody."""

from __future__ import annotations

import json
import os
import stat
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from prefect_aws import AwsCredentials, MinIOCredentials
from prefect_aws.client_parameters import AwsClientParameters
from prefect_gcp import GcpCredentials

from danling_core import storage
from danling_core.config import Config
from danling_core.errors import ConfigError
from danling_core.identity.ids import identify
from danling_core.runs.finding import list_runs
from danling_core.session.open_run import open_run
from flows import blocks
from flows.cli import main
from flows.credentials import store_credentials
from flows.server import using_api
from tests.gcs_server import GCSServer
from tests.prefect_fixtures import PrefectServer
from tests.s3_faults import CANARY, FaultyProxy
from tests.whole_runs import EXPERIMENT_ID

Make = Callable[..., dict[str, Any]]
# Not that of other tests: Prefect itself notes in an event, when a block is saved, which key id it has.
KEY_ID = f"AKIA{uuid.uuid4().hex[:16].upper()}"
VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_ENDPOINT_URL",
)


def config(block: str | None, root: str = "s3://bucket/experiments", **fields: Any) -> Config:
    fields = {
        "runner": "tests.toy_runner:ToyRunner",
        "experiment_id": EXPERIMENT_ID,
        "epoch_end": 1,
        **fields,
    }
    return Config.load({"project_root": root, "storage_block": block, **fields})


@pytest.fixture(scope="session")
def google_key() -> dict[str, str]:
    """What Google gives out for a service account; where its tokens come from is left to the test."""
    made = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = made.private_bytes(serialization.Encoding.PEM, *form).decode()
    names = {"type": "service_account", "project_id": "the-project", "client_email": "me@the-project.example"}
    return {**names, "private_key": pem, "private_key_id": CANARY}


@pytest.fixture
def aws_block(prefect_server: PrefectServer, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """A block with all that is needed, and an environment without any of it."""
    where = AwsClientParameters(endpoint_url=s3_proxy.url)
    keys = {"aws_access_key_id": KEY_ID, "aws_secret_access_key": CANARY, "region_name": "us-east-1"}
    AwsCredentials(**keys, aws_client_parameters=where).save("prod", overwrite=True)
    for name in (*VARIABLES, "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    storage.reconnect()
    return "aws-credentials/prod"


@pytest.fixture
def gcp_block(prefect_server: PrefectServer, gcs_server: GCSServer, google_key: dict[str, str]) -> str:
    key = {**google_key, "token_uri": f"{gcs_server.url}/token"}
    GcpCredentials(service_account_info=key).save("prod", overwrite=True)
    return "gcp-credentials/prod"


@pytest.mark.long
def test_a_blocks_identity_replaces_the_environments_and_goes_with_the_block(
    aws_block: str, s3_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "mine")
    with store_credentials([config(aws_block)]):
        found = {name: os.environ.get(name) for name in VARIABLES}
    assert found == dict(zip(VARIABLES, (KEY_ID, CANARY, None, None, s3_proxy.url), strict=True))
    assert {name: os.environ.get(name) for name in VARIABLES} == {
        **dict.fromkeys(VARIABLES),
        "AWS_PROFILE": "mine",
    }


def test_minio_and_profiles_are_understood(prefect_server: PrefectServer, aws_block: str) -> None:
    where = AwsClientParameters(endpoint_url="http://127.0.0.1:9000")
    minio = MinIOCredentials(minio_root_user="root", minio_root_password=CANARY, aws_client_parameters=where)
    minio.save("lab", overwrite=True)
    with store_credentials([config("minio-credentials/lab")]):
        assert [os.environ.get(name) for name in VARIABLES] == [
            "root",
            CANARY,
            None,
            None,
            "http://127.0.0.1:9000",
        ]
    AwsCredentials(profile_name="lab", region_name="eu-west-1").save("profile", overwrite=True)
    with store_credentials([config("aws-credentials/profile")]):
        assert [os.environ.get(name) for name in VARIABLES] == [None, None, None, "lab", None]
        assert os.environ["AWS_DEFAULT_REGION"] == "eu-west-1"


def test_a_google_key_is_in_a_file_of_its_owners_only_while_it_is_needed(
    gcp_block: str, gcs_server: GCSServer, google_key: dict[str, str], gcs_root: str
) -> None:
    gcs_server.requests.clear()
    with store_credentials([config(gcp_block, gcs_root)]):
        path = Path(os.environ["GOOGLE_APPLICATION_CREDENTIALS"])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert json.loads(path.read_text())["private_key"] == google_key["private_key"]
        assert os.environ["GOOGLE_CLOUD_PROJECT"] == "the-project"
        storage.write_bytes(f"{gcs_root}/x", b"x")
    assert ("POST", "/token") in gcs_server.requests
    assert not path.exists() and "GOOGLE_APPLICATION_CREDENTIALS" not in os.environ


def test_a_block_is_read_once_and_kept_until_the_last_run_ends(
    aws_block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        "flows.credentials.read_block", lambda name: read.append(name) or blocks.read_block(name)
    )
    with store_credentials([config(aws_block), config(aws_block)]):
        with store_credentials([config(aws_block)]):
            pass
        assert os.environ["AWS_ACCESS_KEY_ID"] == KEY_ID
        with pytest.raises(
            ConfigError, match="'aws-credentials/other' is wanted while 'aws-credentials/prod'"
        ):
            store_credentials([config("aws-credentials/other")]).__enter__()
    assert read == [aws_block]


def test_runs_that_want_different_credentials_are_not_one_command() -> None:
    on_store = {"root": "experiments", "checkpoint_dir": "s3://bucket/checkpoints"}
    for other in (config("aws-credentials/b"), config(None), config(None, **on_store)):
        with pytest.raises(ConfigError, match="wanted one storage_block .* train them apart"):
            store_credentials([config("aws-credentials/a"), other]).__enter__()


def test_what_no_variable_can_say_is_refused(prefect_server: PrefectServer) -> None:
    role = "arn:aws:iam::123456789012:role/trainer"
    AwsCredentials(assume_role_arn=role).save("role", overwrite=True)
    AwsCredentials(aws_client_parameters=AwsClientParameters(verify=False)).save("unverified", overwrite=True)
    for name, said in (("role", f"assumes the role {role}"), ("unverified", "only endpoint_url")):
        with pytest.raises(ConfigError, match=said):
            blocks.read_block(f"aws-credentials/{name}")


@pytest.fixture
def file(toy_config: Make, tmp_path: Path) -> Callable[..., str]:
    def write(block: str, root: str, **changes: Any) -> str:
        path = tmp_path / "run.yaml"
        fields = {"project_root": root, "storage_block": block, "scratch": str(tmp_path / "scratch")}
        path.write_text(yaml.safe_dump(toy_config(**{**fields, **changes})))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (
            "aws-credentials/nowhere",
            "there is no storage_block 'aws-credentials/nowhere' at the Prefect API http",
        ),
        ("azure-credentials/prod", "storage_block: wanted type and name of a Prefect block"),
        ("gcp-credentials/prod", "pip install 'danling-flows[prefect-gcp]'"),
    ],
)
def test_a_block_that_cannot_be_had_is_one_message_exit_2_and_nothing_created(
    block: str,
    said: str,
    file: Callable[..., str],
    prefect_server: PrefectServer,
    s3_root: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "prefect_gcp", None)
    assert main(["run", file(block, s3_root)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("danling: ") and said in error and "Traceback" not in error
    assert storage.list_tree(s3_root) == [] and os.listdir(tmp_path) == ["run.yaml"]


def test_an_api_that_is_not_there_is_named() -> None:
    with (
        using_api("http://127.0.0.1:9/api"),
        pytest.raises(ConfigError, match=r"cannot read .*127\.0\.0\.1:9/api"),
    ):
        blocks.read_block("aws-credentials/prod")


@pytest.fixture(params=["s3", pytest.param("gcs", marks=pytest.mark.long)])
def block_and_root(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    root = request.getfixturevalue(f"{request.param}_root")
    yield request.getfixturevalue("aws_block" if request.param == "s3" else "gcp_block"), root


@pytest.mark.long
@pytest.mark.holds("config-5")
def test_a_run_reaches_its_store_by_a_block_alone_and_the_secret_is_nowhere(
    block_and_root: tuple[str, str],
    file: Callable[..., str],
    prefect_server: PrefectServer,
    google_key: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    block, root = block_and_root
    path = file(
        block, root, nproc_per_node=2, tensorboard=True, experiment_name=f"by-{block.partition('-')[0]}"
    )
    assert main(["run", path, "--verbose"]) == 0
    printed = capfd.readouterr()
    told = {"stdout": printed.out.encode(), "stderr": printed.err.encode()}
    with store_credentials([Config.load(path)]):
        [(folder, status)] = list_runs(root)
        for entry in storage.list_tree(root):
            told[entry.path] = storage.read_bytes(storage.join(root, entry.path))
    assert status is not None and status.is_complete
    assert block in told[f"{folder.url.removeprefix(root)[1:]}/config.yaml"].decode()
    for found in [
        *tmp_path.glob("scratch/**/*"),
        *Path(prefect_server.environment["PREFECT_HOME"]).glob("prefect.db*"),
    ]:
        if found.is_file():
            told[str(found)] = found.read_bytes()
    with prefect_server.client() as client:
        runs = [
            run for run in client.read_flow_runs() if run.name.startswith(Config.load(path).experiment_name)
        ]
        told["parameters"] = repr([run.parameters for run in runs]).encode()
    assert block.encode() in told["parameters"] and any("prefect.db" in name for name in told)
    pem_line = google_key["private_key"].splitlines()[2]
    for secret in (CANARY, pem_line):
        assert [name for name, data in told.items() if secret.encode() in data] == []
    assert [name for name, data in told.items() if KEY_ID.encode() in data and "prefect.db" not in name] == []
    assert "GOOGLE_APPLICATION_CREDENTIALS" not in os.environ and "AWS_ACCESS_KEY_ID" not in os.environ


def test_without_prefect_a_block_needs_other_credentials_and_says_which(
    s3_root: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    wanted = config("aws-credentials/prod", s3_root, scratch=str(tmp_path))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ConfigError, match="set AWS_ACCESS_KEY_ID or AWS_PROFILE .*storage_block=null"):
        open_run(wanted, identify(wanted, None))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    assert storage.list_tree(s3_root) == []
    opened = open_run(wanted, identify(wanted, None))
    assert opened.lease is not None
    opened.lease.release()
    assert "using the environment's credentials" in caplog.text
