"""Stores on loopback that tests of whole runs use as their project root."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from danling_core import storage
from tests.gcs_server import GCSServer
from tests.s3_faults import CANARY, FaultyProxy


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_proxy(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Between this process (and the ranks it launches) and a healthy S3 server: flawless until told."""
    with FaultyProxy(moto_url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTKEY00001234")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        storage.reconnect()
        yield proxy
        storage.configure({}, retry=storage.Retry())
        storage.reconnect()


@pytest.fixture
def s3_root(s3_proxy: FaultyProxy, moto_url: str) -> str:
    """A new bucket's URL with a folder."""
    import boto3

    bucket = f"b{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=moto_url).create_bucket(Bucket=bucket)
    return f"s3://{bucket}/experiments"


@pytest.fixture
def gcs_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with GCSServer("danling") as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        storage.reconnect()
        yield f"gs://danling/{uuid.uuid4().hex}"
        storage.configure({}, retry=storage.Retry())
        storage.reconnect()
