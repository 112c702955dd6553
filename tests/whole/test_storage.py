"""The contract of storage, kept by every backend: local disk, memory, S3 (of two makes) and GCS."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from danling_core import storage
from danling_core.errors import AccessDenied, Fenced, NotFound, RunBusy, StorageError, StoreUnavailable
from danling_core.runs.lease import Lease, check_generation, lease_url
from danling_core.storage import failures, operations
from danling_core.storage.local import LocalBackend
from danling_core.storage.remote import RemoteBackend
from tests.gcs_server import GCSServer
from tests.other_user import as_owner_of
from tests.s3_faults import CANARY

FAST = storage.Retry(deadline_seconds=20, first_wait_seconds=0.01, max_wait_seconds=0.05)


# Where of two creators one is refused; rclone's server has no conditional writes.
EXCLUSIVE = ["local", "memory", "s3", "gcs"]


@pytest.fixture(params=[*EXCLUSIVE, "rclone"])
def root(request: pytest.FixtureRequest, tmp_path: os.PathLike[str]) -> Iterator[str]:
    with storage.using(retry=FAST):
        if request.param == "local":
            yield os.path.join(tmp_path, "experiments")
        elif request.param == "memory":
            yield f"memory://danling/{uuid.uuid4().hex}"
        else:
            yield request.getfixturevalue(f"{request.param}_root")


# The contract


def test_what_was_written_is_read_back(root: str) -> None:
    url = storage.join(root, "a b/ü.bin")
    storage.write_bytes(url, b"one")
    storage.write_bytes(url, b"two")
    assert storage.read_bytes(url) == b"two"
    assert storage.size(url) == 3


def test_an_empty_object_is_an_object(root: str) -> None:
    url = storage.join(root, "empty")
    storage.write_bytes(url, b"")
    assert storage.exists(url) and storage.size(url) == 0 and storage.read_bytes(url) == b""


def test_what_is_missing_is_not_found(root: str, tmp_path: os.PathLike[str]) -> None:
    url = storage.join(root, "none/such")
    storage.write_bytes(storage.join(root, "there"), b"x")
    for operation in (storage.read_bytes, storage.size, storage.read_json):
        with pytest.raises(NotFound, match="such"):
            operation(url)
    with pytest.raises(NotFound):
        storage.get_file(url, os.path.join(tmp_path, "copy"))
    assert os.listdir(tmp_path) in ([], ["experiments"])
    assert not storage.exists(url)
    assert storage.list_names(url) == [] and storage.list_tree(url) == []


def test_a_missing_local_file_cannot_be_put(root: str) -> None:
    with pytest.raises(NotFound, match="no such local file"):
        storage.put_file("/nowhere/at/all", storage.join(root, "x"))


@pytest.mark.parametrize("root", EXCLUSIVE, indirect=True)
def test_a_created_object_cannot_be_created_again(root: str) -> None:
    url = storage.join(root, "lease/000001.json")
    assert storage.create_exclusive(url, b"first")
    assert not storage.create_exclusive(url, b"second")
    assert storage.read_bytes(url) == b"first"


@pytest.mark.parametrize("root", EXCLUSIVE, indirect=True)
def test_of_many_creators_at_once_exactly_one_wins(root: str) -> None:
    url = storage.join(root, "lease/000001.json")
    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(lambda i: storage.create_exclusive(url, f"writer {i}".encode()), range(8)))
    assert sum(wins) == 1
    assert storage.read_bytes(url) == f"writer {wins.index(True)}".encode()


def test_without_conditional_writes_every_creator_is_told_yes_and_one_of_them_is_kept(
    rclone_root: str,
) -> None:
    """What docs/storage.md says of such a store; should rclone learn them, it belongs into `EXCLUSIVE`."""
    url = storage.join(rclone_root, "lease/000001.json")
    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(lambda i: storage.create_exclusive(url, f"writer {i}".encode()), range(8)))
    assert all(wins)
    assert storage.read_bytes(url) in {f"writer {i}".encode() for i in range(8)}


def test_without_conditional_writes_the_lease_still_refuses_whoever_comes_later(rclone_root: str) -> None:
    parent = storage.join(rclone_root, "digits-1")
    first = Lease.acquire(parent, "first")
    with pytest.raises(RunBusy, match="first, pid"):
        Lease.acquire(parent, "second")
    first.release()
    second = Lease.acquire(parent, "second")
    assert second.generation == 2
    with pytest.raises(Fenced, match=r"generation 1 of .* was taken over by second"):
        check_generation(first.url, first.generation)


def test_without_conditional_writes_of_two_owners_of_one_generation_the_first_is_fenced_at_its_next_beat(
    rclone_root: str,
) -> None:
    url = lease_url(storage.join(rclone_root, "digits-1"))
    first, second = (Lease._try_create(url, 1, name, time.time) for name in ("first", "second"))
    assert first is not None and second is not None, "both listed before either had created"
    with pytest.raises(Fenced, match=r"generation 1 of .* was taken over by second"):
        first.beat()
    second.beat()


@pytest.mark.parametrize("size", [0, 1, 5 * 2**20, 17 * 2**20 + 3])
def test_a_file_goes_up_and_comes_back(root: str, tmp_path: os.PathLike[str], size: int) -> None:
    source, copy = os.path.join(tmp_path, "source"), os.path.join(tmp_path, "folder", "copy")
    data = os.urandom(1024) * (size // 1024) + os.urandom(size % 1024)
    with open(source, "wb") as file:
        file.write(data)
    url = storage.join(root, "data/state.pt")
    storage.put_file(source, url)
    storage.get_file(url, copy)
    with open(copy, "rb") as file:
        assert file.read() == data
    assert storage.size(url) == size
    assert os.listdir(os.path.dirname(copy)) == ["copy"]


def test_listings_see_what_was_written_a_moment_ago(root: str) -> None:
    assert storage.list_names(root) == []
    for path in ("b/1", "b/c/2", "a", "bb"):
        storage.write_bytes(storage.join(root, path), path.encode())
        assert storage.exists(storage.join(root, path))
    assert storage.list_names(root) == ["a", "b", "bb"]
    assert storage.list_names(storage.join(root, "b")) == ["1", "c"]
    assert storage.list_names(storage.join(root, "a")) == []
    entries = storage.list_tree(root)
    assert [(entry.path, entry.size) for entry in entries] == [("a", 1), ("b/1", 3), ("b/c/2", 5), ("bb", 2)]
    assert all(entry.mtime > 1.7e9 for entry in entries)
    assert [entry.path for entry in storage.list_tree(storage.join(root, "b"))] == ["1", "c/2"]
    assert storage.exists(storage.join(root, "b"))


def test_deleting_is_done_when_nothing_is_left(root: str) -> None:
    for path in ("b/1", "b/c/2", "bb"):
        storage.write_bytes(storage.join(root, path), b"x")
    storage.delete(storage.join(root, "b/1"))
    storage.delete(storage.join(root, "b/1"))
    storage.delete(storage.join(root, "b"), recursive=True)
    storage.delete(storage.join(root, "b"), recursive=True)
    assert [entry.path for entry in storage.list_tree(root)] == ["bb"]


def test_many_small_reads_keep_their_order(root: str) -> None:
    urls = [storage.join(root, f"{i}.json") for i in range(20)]
    for i, url in enumerate(urls):
        if i != 7:
            storage.write_bytes(url, str(i).encode())
    assert storage.read_many(urls) == [None if i == 7 else str(i).encode() for i in range(20)]


def test_json_is_valid_with_nan_in_it(root: str) -> None:
    url = storage.join(root, "status.json")
    storage.write_json(url, {"loss": math.nan, "best": -math.inf, "nested": [{"x": math.inf, "ü": 1}]})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(storage.read_bytes(url), parse_constant=refuse)
    assert found == {"loss": "NaN", "best": "-Infinity", "nested": [{"x": "Infinity", "ü": 1}]}
    assert storage.read_json(url) == found
    storage.write_bytes(url, b"{torn")
    with pytest.raises(StorageError, match=r"status\.json.* not JSON"):
        storage.read_json(url)


@pytest.mark.parametrize("operation", ["write", "create", "put", "delete", "delete_tree"])
def test_an_answer_lost_after_the_deed_changes_nothing(
    root: str, operation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    """The store does what it was asked, and the connection breaks before it says so."""
    backend = LocalBackend if storage.is_local(root) else RemoteBackend
    act, attempts = getattr(backend, operation), []

    def act_and_lose(self: object, *arguments: object) -> None:
        attempts.append(arguments)
        act(self, *arguments)
        if len(attempts) == 1:
            raise ConnectionResetError("reset by peer")

    url, local = storage.join(root, "folder/x"), os.path.join(tmp_path, "local")
    for path in (local, storage.join(root, "folder/y")):
        storage.write_bytes(path, b"attempt 1")
    if operation.startswith("delete"):
        storage.write_bytes(url, b"attempt 1")
    monkeypatch.setattr(backend, operation, act_and_lose)
    calls = {
        "write": lambda: storage.write_bytes(url, b"attempt 1"),
        "create": lambda: storage.create_exclusive(url, b"attempt 1"),
        "put": lambda: storage.put_file(local, url),
        "delete": lambda: storage.delete(url),
        "delete_tree": lambda: storage.delete(storage.parent(url), recursive=True),
    }
    assert calls[operation]() in (None, True)
    assert len(attempts) == 2
    if operation.startswith("delete"):
        assert not storage.exists(url)
    else:
        assert storage.read_bytes(url) == b"attempt 1"


def test_a_forked_child_reaches_the_store(root: str) -> None:
    url = storage.join(root, "parent")
    storage.write_bytes(url, b"parent")
    process = multiprocessing.get_context("fork").Process(target=_child, args=(url,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def _child(url: str) -> None:
    data = b"parent" if url.startswith("memory") else storage.read_bytes(url)
    storage.write_bytes(url + "-child", data)
    os._exit(0 if storage.read_bytes(url + "-child") == b"parent" else 1)


# The local disk


def test_a_write_that_fails_leaves_the_old_bytes_and_no_litter(tmp_path: os.PathLike[str]) -> None:
    url = os.path.join(tmp_path, "results.json")
    storage.write_bytes(url, b"old")
    with pytest.raises(StorageError):
        storage.write_bytes(url, "not bytes")  # type: ignore[arg-type]
    assert storage.read_bytes(url) == b"old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_disk_without_hard_links_still_creates_once(
    tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    url = os.path.join(tmp_path, "lease.json")
    assert storage.create_exclusive(url, b"first") and not storage.create_exclusive(url, b"second")
    assert storage.read_bytes(url) == b"first" and os.listdir(tmp_path) == ["lease.json"]


def test_a_folder_that_may_not_be_written_is_denied_at_once(tmp_path: os.PathLike[str]) -> None:
    with pytest.raises(StorageError, match="/proc/nowhere"):
        storage.write_bytes("/proc/nowhere/x", b"")


def test_a_folder_of_its_own_that_is_read_only_is_denied() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with as_owner_of(folder):
            os.chmod(folder, 0o500)
            with pytest.raises(AccessDenied):
                storage.write_bytes(os.path.join(folder, "x"), b"")
        os.chmod(folder, 0o700)


def test_urls_are_joined_and_taken_apart() -> None:
    assert storage.join("s3://b", "a", "", "c/") == "s3://b/a/c"
    assert storage.join("memory://", "a") == "memory://a"
    assert storage.join("/", "a") == "/a"
    assert storage.parent("s3://b/a/c/") == "s3://b/a" and storage.parent("s3://b") == "s3://b"
    assert storage.base_name("s3://b/a/") == "a"
    assert (
        storage.local_path("file:///a/b") == "/a/b"
        and storage.is_local("a/b")
        and not storage.is_local("gs://b")
    )
    for part in ("../x", "/x", "a/../../x", "s3://other"):
        with pytest.raises(StorageError, match="leaves the folder"):
            storage.join("s3://b/a", part)
    with pytest.raises(StorageError, match="chained"):
        storage.read_bytes("simplecache::s3://b/a")
    with pytest.raises(StorageError, match="local path is needed"):
        storage.local_path("s3://b/a")


# Retries


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def retry(self, **arguments: float) -> storage.Retry:
        return storage.Retry(clock=lambda: self.now, sleep=self.sleep, chance=lambda: 0.5, **arguments)


def test_waits_double_up_to_a_limit_until_the_deadline() -> None:
    clock = Clock()
    retry = clock.retry(deadline_seconds=60, first_wait_seconds=1, max_wait_seconds=8)

    def fail() -> None:
        raise ConnectionResetError("reset by peer")

    with pytest.raises(
        StoreUnavailable, match=r"cannot read 's3://b/x': .*reset by peer.*10 attempts in 55 s"
    ):
        retry.call("read", "s3://b/x", fail)
    assert clock.waits == [1, 2, 4, 8, 8, 8, 8, 8, 8]


def test_what_passes_is_retried_and_what_does_not_is_said_at_once() -> None:
    clock = Clock()
    answers: list[Exception | bytes] = [TimeoutError(), OSError(5, "EIO"), b"done"]

    def call() -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert clock.retry().call("read", "s3://b/x", call) == b"done"
    for error, expected in ((PermissionError("no"), AccessDenied), (OSError(28, "full"), StorageError)):
        clock.waits.clear()
        answers[:] = [error]
        with pytest.raises(expected):
            clock.retry().call("write", "s3://b/x", call)
        assert clock.waits == []


def test_a_message_never_holds_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_STORE_PASSWORD", CANARY)
    error = OSError(f"https://user:hunter2hunter2@host/x?X-Amz-Signature=abcdef&sig=abc said {CANARY}")
    message = str(failures.translate(error, "read", "sftp://me:hunter2hunter2@host/x"))
    for secret in (CANARY, "hunter2", "abcdef"):
        assert secret not in message
    assert "sftp://***@host/x" in message
    asked = "asked http://me:hunter2hunter2@host:9000 as the AWS chain"
    refused = str(failures.translate(PermissionError("no"), "read", "s3://b/x", asked))
    assert "http://***@host:9000" in refused and "hunter2" not in refused


# S3 and GCS


@pytest.mark.parametrize(
    ("scheme", "operation"),
    # gcsfs tells a missing bucket from an empty folder only when it reads or writes.
    [
        *((scheme, operation) for scheme in ("s3", "gs") for operation in ("read", "write", "create", "put")),
        ("s3", "list"),
    ],
)
def test_a_missing_bucket_is_said_at_once(
    scheme: str, operation: str, s3_root: str, gcs_root: str, tmp_path: os.PathLike[str]
) -> None:
    url = f"{scheme}://no-such-bucket-here/a/b"
    local = os.path.join(tmp_path, "x")
    with open(local, "wb") as file:
        file.write(b"x")
    calls = {
        "read": lambda: storage.read_bytes(url),
        "write": lambda: storage.write_bytes(url, b"x"),
        "create": lambda: storage.create_exclusive(url, b"x"),
        "put": lambda: storage.put_file(local, url),
        "list": lambda: storage.list_tree(url),
    }
    clock = Clock()
    with storage.using(retry=clock.retry()), pytest.raises(NotFound, match="no-such-bucket-here"):
        calls[operation]()
    assert clock.waits == []


def test_a_refusal_names_the_identity_and_the_address(gcs_root: str, gcs_server: GCSServer) -> None:
    gcs_server.fault = lambda method, path: 403
    clock = Clock()
    with storage.using(retry=clock.retry()), pytest.raises(AccessDenied, match="127.0.0.1") as caught:
        storage.write_bytes(storage.join(gcs_root, "x"), b"x")
    assert clock.waits == [] and "Google's default credentials" in str(caught.value)


def test_a_wrong_key_is_denied_at_once_without_showing_the_secret(s3_root: str, moto_url: str) -> None:
    def check_keys_after(requests: str) -> None:
        url, plain = f"{moto_url}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, requests.encode(), plain)).close()

    clock = Clock()
    check_keys_after("0")
    try:
        with storage.using(retry=clock.retry()), pytest.raises(AccessDenied) as caught:
            storage.write_bytes(storage.join(s3_root, "x"), b"x")
    finally:
        check_keys_after("inf")
    told = "".join(traceback.format_exception(caught.value))
    assert clock.waits == []
    assert "access key ending in '1234'" in str(caught.value) and "http://127.0.0.1" in str(caught.value)
    assert CANARY not in told and "AKIATESTKEY" not in str(caught.value)


@pytest.mark.parametrize("fault", [pytest.param(503, marks=pytest.mark.long), "reset", "lost"])
def test_every_operation_survives_a_faulty_store(
    fault: str | int, gcs_root: str, gcs_server: GCSServer, tmp_path: os.PathLike[str]
) -> None:
    """Every fourth request fails."""
    count = 0

    def every_fourth(method: str, path: str) -> str | int | None:
        nonlocal count
        count += 1
        return fault if count % 4 == 0 else None

    local = os.path.join(tmp_path, "x")
    with open(local, "wb") as file:
        file.write(b"y" * (6 * 2**20))
    gcs_server.fault = every_fourth
    with storage.using(retry=FAST):
        storage.write_bytes(storage.join(gcs_root, "a"), b"1")
        assert storage.create_exclusive(storage.join(gcs_root, "b"), b"attempt-17")
        assert not storage.create_exclusive(storage.join(gcs_root, "b"), b"attempt-18")
        storage.put_file(local, storage.join(gcs_root, "c/d"))
        assert storage.size(storage.join(gcs_root, "c/d")) == 6 * 2**20
        assert [entry.path for entry in storage.list_tree(gcs_root)] == ["a", "b", "c/d"]
        storage.delete(gcs_root, recursive=True)
        assert storage.list_names(gcs_root) == []


def test_options_say_where_the_store_is(gcs_server: GCSServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    with storage.using({"endpoint_url": gcs_server.url, "region": "eu"}, retry=FAST):
        storage.write_bytes("gs://danling/options/x", b"x")
    assert "options/x" in gcs_server.buckets["danling"]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    storage.reconnect()
    with pytest.raises(StorageError, match=r"pip install 'danling-flows\[s3\]'"):
        storage.read_bytes("s3://bucket/x")


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(StorageError, match="nosuch"):
        storage.read_bytes("nosuch://x/y")


def test_settings_hold_for_a_block_only() -> None:
    before = operations.current()
    with storage.using({"project": "p"}):
        assert operations.current().options == {"project": "p"}
    assert operations.current() is before
