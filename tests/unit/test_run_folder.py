"""The files of a run, and finding runs under a root."""

from __future__ import annotations

import json
import math
import os
import tempfile
import uuid

import pytest

from danling_core import storage
from danling_core.errors import ConfigError, NotFound, StorageError
from danling_core.runs.finding import find_folders, list_runs, resolve
from danling_core.runs.folder import RunFolder, Status, read_log

ID = "abcdef1212345678"
OTHER = "abcd000012345678"
FIRST, SECOND = "20261121-103249-123456", "20261122-000000-000000"


@pytest.fixture(autouse=True)
def cache(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.join(tmp_path, "cache"))
    return os.path.join(tmp_path, "cache", "danling")


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: os.PathLike[str]) -> str:
    return os.path.join(tmp_path, "root") if request.param == "local" else f"memory://runs/{uuid.uuid4().hex}"


def make(root: str, name: str, id: str, timestamp: str, status: str | None = "running") -> RunFolder:
    folder = RunFolder(storage.join(root, f"{name}-{id}", timestamp))
    storage.write_bytes(folder.config_url, b"seed: 0\n")
    if status is not None:
        folder.write_status(Status(status=status, name=name, id=id, timestamp=timestamp))  # type: ignore[arg-type]
    return folder


@pytest.mark.holds("files-1")
def test_every_file_has_its_place() -> None:
    folder = RunFolder("s3://bucket/root/digits-1/20261121-103249-123456")
    assert folder.config_url == "s3://bucket/root/digits-1/20261121-103249-123456/config.yaml"
    names = ["metadata.json", "events.jsonl", "results.json", "latest.json", "best.json"]
    names += ["evaluation.json", "status.json", "checkpoints", "tensorboard"]
    urls = [folder.metadata_url, folder.events_url, folder.results_url, folder.latest_url]
    urls += [folder.best_url, folder.evaluation_url, folder.status_url, folder.checkpoints_url]
    urls += [folder.tensorboard_url]
    assert [storage.base_name(url) for url in urls] == names
    assert folder.timestamp == "20261121-103249-123456"
    assert folder.lease_parent_url == "s3://bucket/root/digits-1"
    assert RunFolder("mine/here").lease_parent_url == "mine/here"


def test_a_status_survives_the_file_with_nan_in_it(root: str) -> None:
    folder = make(root, "digits", ID, FIRST, None)
    assert folder.read_status() is None
    evaluation = {"test": {"loss": math.nan}}
    status = Status(
        status="complete",
        name="digits",
        id=ID,
        best_score=math.inf,
        latest_score=math.nan,
        evaluation=evaluation,
    )
    folder.write_status(status)
    found = folder.read_status()
    assert found is not None and found.is_complete
    assert math.isnan(found.latest_score or 0) and found.best_score == math.inf
    assert "NaN" in json.dumps(json.loads(storage.read_bytes(folder.status_url)))


def test_a_status_of_a_newer_version_is_read_and_a_torn_one_refused() -> None:
    assert (
        Status.parse(b'{"status": "failed", "name": "n", "id": "i", "invented_later": 1}').status == "failed"
    )
    with pytest.raises(StorageError, match="not JSON"):
        Status.parse(b'{"status": "fai')
    with pytest.raises(StorageError, match="status"):
        Status.parse(b'{"status": "daydreaming", "name": "n", "id": "i"}')


def test_runs_are_listed_and_foreign_files_are_not(root: str) -> None:
    first, second = make(root, "a", ID, FIRST, "complete"), make(root, "a", ID, SECOND, None)
    third = make(root, "b", OTHER, FIRST, "failed")
    storage.write_bytes(storage.join(third.url, "checkpoints/data/1/state.pt"), b"x")
    storage.write_bytes(storage.join(third.url, "sub", FIRST, "status.json"), b"{}")
    for foreign in ("README.md", f"a-{ID}/lease/000001.json", "notes/today/status.json", "x/y/z/config.yaml"):
        storage.write_bytes(storage.join(root, foreign), b"?")
    found = list_runs(root)
    assert [folder.url for folder, _ in found] == [first.url, second.url, third.url]
    assert [status and status.status for _, status in found] == ["complete", None, "failed"]
    assert list_runs(storage.join(root, "nowhere")) == []


def test_complete_remote_runs_are_read_once(monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    root = f"memory://cached/{uuid.uuid4().hex}"
    complete, running = make(root, "a", ID, FIRST, "complete"), make(root, "b", OTHER, FIRST)
    expected = list_runs(root)
    read: list[str] = []
    read_many = storage.read_many

    def watched(urls: list[str]) -> list[bytes | None]:
        read.extend(urls)
        return read_many(urls)

    monkeypatch.setattr(storage, "read_many", watched)
    assert list_runs(root) == expected and read == [running.status_url]
    read.clear()
    complete.write_status(Status(status="complete", name="a", id=ID, best_score=1.0))
    assert list_runs(root)[0][1].best_score == 1.0  # type: ignore[union-attr]
    assert complete.status_url in read
    for name in os.listdir(cache):
        storage.write_bytes(os.path.join(cache, name), b"{torn")
    assert [status is not None for _, status in list_runs(root)] == [True, True]


def test_a_run_with_an_unreadable_status_is_listed(root: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(root, "a", ID, FIRST)
    storage.write_bytes(folder.status_url, b"{torn")
    assert list_runs(root) == [(folder, None)]
    assert folder.status_url in caplog.text
    with pytest.raises(StorageError):
        folder.read_status()


def test_folders_of_a_run_are_found_newest_first(root: str) -> None:
    first, second = make(root, "a", ID, FIRST), make(root, "a", ID, SECOND)
    storage.write_bytes(storage.join(root, f"a-{ID}", "lease", "000001.json"), b"{}")
    assert find_folders(root, "a", ID) == [second, first]
    assert find_folders(root, "b", ID) == [second, first]  # a name is a label
    assert find_folders(root, "a", OTHER) == []


@pytest.mark.parametrize("text", [f"digits-cnn-{ID}", ID, ID[:8], "digits-cnn"])
def test_a_run_is_resolved_by_what_people_type(root: str, text: str) -> None:
    make(root, "digits-cnn", ID, FIRST)
    newest = make(root, "digits-cnn", ID, SECOND)
    make(root, "other", OTHER, FIRST)
    assert resolve(root, text) == newest


def test_of_several_runs_of_one_name_the_newest_is_meant_and_the_others_are_named(
    root: str, caplog: pytest.LogCaptureFixture
) -> None:
    make(root, "digits-cnn", ID, FIRST)
    newest = make(root, "digits-cnn", OTHER, SECOND)
    with caplog.at_level("WARNING", "danling"):
        assert resolve(root, "digits-cnn") == newest
    assert f"the others: digits-cnn-{ID}" in caplog.text


def test_a_run_is_resolved_by_its_place(root: str) -> None:
    first, newest = make(root, "a", ID, FIRST), make(root, "a", ID, SECOND)
    assert resolve("elsewhere", first.url) == first
    assert resolve("elsewhere", storage.parent(first.url)) == newest


def test_an_ambiguous_or_unknown_name_says_what_there_is(root: str) -> None:
    make(root, "a", ID, FIRST)
    make(root, "b", OTHER, FIRST)
    with pytest.raises(ConfigError, match=f"a-{ID}, b-{OTHER}"):
        resolve(root, "abcd")
    with pytest.raises(NotFound, match=f"no run 'zzz' under .*a-{ID}"):
        resolve(root, "zzz")
    with pytest.raises(NotFound, match="none at all"):
        resolve(storage.join(root, "empty"), "zzz")


def test_a_log_is_read_whole_or_from_segments(root: str) -> None:
    folder = make(root, "a", ID, FIRST)
    with pytest.raises(NotFound):
        read_log(folder, "events.jsonl")
    for number, data in ((1, b"one\n"), (2, b"two\n"), (10, b"ten\n")):
        storage.write_bytes(storage.join(folder.url, f"events/{number:06d}.jsonl"), data)
    storage.write_bytes(storage.join(folder.url, "events/notes.txt"), b"foreign")
    assert read_log(folder, "events.jsonl") == b"one\ntwo\nten\n"
    storage.write_bytes(folder.events_url, b"whole\n")
    assert read_log(folder.url, "events.jsonl") == b"whole\n"


def test_a_folder_that_may_not_be_read_does_not_hide_the_runs_beside_it() -> None:
    """Such as the lost+found at the top of a disk. Root may read everything: then as nobody."""
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        folder = RunFolder(f"{root}/toy-{1:016x}/20261121-120000-000001")
        folder.write_status(Status(status="complete", name="toy", id=f"{1:016x}"))
        os.mkdir(f"{root}/lost+found", 0o700)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        else:
            os.chmod(f"{root}/lost+found", 0)
        try:
            assert [found for found, _ in list_runs(root)] == [folder]
        finally:
            os.seteuid(user)
            os.chmod(f"{root}/lost+found", 0o700)
