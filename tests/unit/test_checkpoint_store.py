"""The checkpoint store: a checkpoint is committed or does not exist, whatever happens."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from danling_core import storage
from danling_core.checkpoints import CheckpointStore, DataFile, Record
from danling_core.errors import CheckpointCorrupt, CheckpointError, Fenced
from danling_core.storage import hashing, local, operations

PAYLOAD = b"weights" * 1000


def put(
    store: CheckpointStore, step: int, *names: str, payload: bytes = PAYLOAD, attempt: str = "1.0"
) -> Record:
    return store.commit(
        lambda file: file.write(payload), step=step, attempt=attempt, info={"score": step / 10}, names=names
    )


def payload_path(store: CheckpointStore, record: Record) -> Path:
    return Path(store.url, "data", record.name, "state.pt")


def names_of(store: CheckpointStore) -> list[str]:
    return [record.name for record in store.records()]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(tmp_path / "checkpoints"))


@pytest.fixture(params=["local", "file", "memory"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CheckpointStore]:
    url = {
        "local": str(tmp_path / "checkpoints"),
        "file": f"file://{tmp_path}/checkpoints",
        "memory": f"memory://{tmp_path.name}/checkpoints",
    }[request.param]
    yield CheckpointStore(url, scratch=str(tmp_path))
    storage.delete(url, recursive=True)


# What any store does


def test_a_commit_is_listed_pointed_verified_and_opened(any_store: CheckpointStore) -> None:
    record = any_store.commit(
        lambda file: file.write(PAYLOAD),
        step=7,
        attempt="2.1",
        info={
            "progress": {"steps": 7},
            "score": float("nan"),
            "world_size": 2,
            "extra": [1],
        },
        names=("latest", "best"),
    )
    fresh = CheckpointStore(any_store.url)
    assert fresh.records() == [record]
    assert fresh.pointed("best") == fresh.pointed("latest") == record
    assert fresh.pointed("epoch-3") is None
    assert record.name == "0000000007-2.1" and record.size == len(PAYLOAD)
    assert record.progress == {"steps": 7} and record.world_size == 2
    assert record.score is not None and record.score != record.score
    fresh.verify(record)
    path = fresh.open(record)
    assert Path(path).read_bytes() == PAYLOAD
    fresh.release(record)
    assert os.path.exists(path) == any_store.is_local


def test_records_come_newest_commit_first_even_after_a_step_back(any_store: CheckpointStore) -> None:
    for step, attempt in ((1, "1.0"), (10, "1.0"), (5, "2.0")):
        put(any_store, step, "latest", attempt=attempt)
    assert [record.step for record in any_store.records()] == [5, 10, 1]


def test_the_same_step_and_attempt_twice_makes_two_checkpoints(any_store: CheckpointStore) -> None:
    put(any_store, 3, "latest", payload=b"one")
    second = put(any_store, 3, "latest", payload=b"two")
    assert names_of(any_store) == ["0000000003-1.0-2", "0000000003-1.0"]
    assert Path(any_store.open(second)).read_bytes() == b"two"


def test_newest_good_falls_back_and_says_why(any_store: CheckpointStore) -> None:
    good, bad = put(any_store, 1), put(any_store, 2)
    storage.write_bytes(storage.join(any_store.url, "data", bad.name, "state.pt"), b"x" * len(PAYLOAD))
    found, passed_over = any_store.newest_good()
    assert found == good
    assert [each.name for each in passed_over] == [bad.name] and "bits" in passed_over[0].reason


def test_pruning_keeps_the_newest_the_best_and_the_pinned(any_store: CheckpointStore) -> None:
    for step in range(8):
        put(any_store, step, "latest", *(["best"] if step == 1 else []), *(["epoch-2"] if step == 2 else []))
    fresh = CheckpointStore(any_store.url)
    removed = fresh.prune(keep_last=2)
    assert sorted(removed) == [f"000000000{step}-1.0" for step in (0, 3, 4, 5)]
    assert [record.step for record in fresh.records()] == [7, 6, 2, 1]
    assert sorted(storage.list_names(storage.join(fresh.url, "data"))) == sorted(names_of(fresh))
    assert fresh.prune(keep_last=2) == []


def test_a_remote_payload_that_came_short_is_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore("memory://short/checkpoints")
    monkeypatch.setattr(operations, "put_file", lambda local, url: storage.write_bytes(url, b"short"))
    with pytest.raises(Exception, match="the store has 5"):
        put(store, 1)
    assert store.records() == [] and storage.list_tree("memory://short") == []


# Damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def remove_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, remove, remove_folder])
def test_a_damaged_payload_is_found_named_and_passed_over(
    store: CheckpointStore, damage: Callable[[Path], None]
) -> None:
    good, bad = put(store, 1, "best"), put(store, 2, "latest")
    damage(payload_path(store, bad))
    for reader in (store, CheckpointStore(store.url)):
        with pytest.raises(CheckpointCorrupt, match=bad.name):
            reader.verify(bad)
        with pytest.raises(CheckpointCorrupt, match=bad.name):
            reader.open(bad)
        found, passed_over = reader.newest_good()
        assert found == good
        assert [each.name for each in passed_over] == [bad.name]


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit])
def test_a_damaged_record_is_found_named_and_passed_over(
    store: CheckpointStore, damage: Callable[[Path], None]
) -> None:
    good, bad = put(store, 1, "latest"), put(store, 2, "latest")
    damage(Path(store.url, "records", f"{bad.name}.json"))
    found, passed_over = store.newest_good()
    assert found == good
    assert [each.name for each in passed_over] == [bad.name] and bad.name in passed_over[0].reason
    with pytest.raises(CheckpointCorrupt, match=bad.name):
        store.pointed("latest")
    third = put(store, 3, "latest")
    assert store.pointed("latest") == third and third.sequence == 2


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", "..", ".hidden", "", "a\\b", 7])
def test_no_name_from_a_file_can_leave_the_folder(store: CheckpointStore, name: Any) -> None:
    record = put(store, 1, "latest")
    path = Path(store.url, "records", f"{record.name}.json")
    forged = Record(**{**vars(record), "files": (DataFile(name, 1, "00"),)})
    path.write_bytes(forged.to_bytes())
    assert store.records() == []
    assert store.newest_good()[1][0].name == record.name
    Path(store.url, "latest.json").write_text(json.dumps({"record": name, "as_of": 9}))
    with pytest.raises(CheckpointCorrupt, match="latest"):
        store.pointed("latest")
    with pytest.raises(CheckpointError):
        store.pointed(name)
    with pytest.raises(CheckpointError):
        put(store, 2, name)


def test_a_renamed_record_is_refused(store: CheckpointStore) -> None:
    record = put(store, 1)
    folder = Path(store.url, "records")
    os.rename(folder / f"{record.name}.json", folder / "0000000009-1.0.json")
    assert "calls itself" in store.survey()[1][0].reason


def test_a_record_of_a_newer_version_is_not_taken_for_damaged(store: CheckpointStore) -> None:
    newer = Record(**{**vars(put(store, 1)), "version": 2})
    with pytest.raises(CheckpointError, match="update") as caught:
        Record.from_bytes(newer.to_bytes(), newer.name)
    assert not isinstance(caught.value, CheckpointCorrupt)


def test_a_damaged_pointer_is_made_good_by_the_records(store: CheckpointStore) -> None:
    record = put(store, 1, "best")
    Path(store.url, "best.json").write_text("{")
    assert store.pointed("best") == record


def test_a_pointer_can_be_set_back_and_the_next_commit_moves_it_on(store: CheckpointStore) -> None:
    first, _ = put(store, 1, "latest"), put(store, 2, "latest")
    store.point("latest", first)
    assert store.pointed("latest") == first
    third = put(store, 3, "latest")
    assert store.pointed("latest") == third


# Pruning


def test_pruning_never_removes_the_last_good_one(store: CheckpointStore) -> None:
    records = [put(store, step, "latest") for step in range(5)]
    for record in records[2:]:
        flip_a_bit(payload_path(store, record))
    assert store.prune(keep_last=2) == [records[2].name, records[0].name]
    assert store.newest_good()[0] == records[1]


def test_leftovers_go_by_age_only(tmp_path: Path) -> None:
    now = [os.stat(tmp_path).st_mtime]
    store = CheckpointStore(str(tmp_path / "checkpoints"), clock=lambda: now[0])
    record, damaged = put(store, 1, "latest"), put(store, 2)
    truncate(Path(store.url, "records", f"{damaged.name}.json"))
    orphan = Path(store.url, "data", "0000000009-1.0")
    orphan.mkdir()
    (orphan / "state.pt").write_bytes(b"half")
    temporary = Path(store.url, "records", f".0000000009-1.0.json{local.TEMPORARY_MARK}1-a")
    temporary.write_bytes(b"{")
    assert store.prune() == [] and orphan.exists() and temporary.exists()
    now[0] += 4000
    store.prune()
    assert not orphan.exists() and not temporary.exists() and store.survey()[1] == []
    store.prune()
    assert os.listdir(Path(store.url, "data")) == [record.name]


def test_a_checkpoint_being_written_is_no_leftover(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), clock=lambda: 4e9)

    def write(file: BinaryIO) -> None:
        file.write(PAYLOAD)
        store.prune()

    store.verify(store.commit(write, step=1, attempt="1.0", info={}))


# Faults


def assert_nothing_is_left(store: CheckpointStore, *records: Record) -> None:
    assert store.records() == list(records)
    assert sorted(os.listdir(Path(store.url, "data"))) == sorted(record.name for record in records)
    assert not [name for _, _, files in os.walk(store.url) for name in files if local.is_unfinished(name)]
    for record in records:
        store.verify(record)


def test_a_full_disk_frees_its_partial_data_and_says_how_much_is_needed(store: CheckpointStore) -> None:
    good = put(store, 1, "latest")

    def write(file: BinaryIO) -> None:
        file.write(PAYLOAD)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"needs 1,234,567 bytes, [\d,]+ are free"):
        store.commit(write, step=2, attempt="1.0", info={}, names=("latest",), expected_bytes=1_234_567)
    assert_nothing_is_left(store, good)
    assert store.pointed("latest") == good


def test_an_error_that_is_wrapped_on_its_way_is_still_seen_as_what_it_was(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def write(file: BinaryIO) -> None:
        writer: Any = file
        writer._file = Full()
        try:
            file.write(PAYLOAD)
        except OSError as error:
            raise RuntimeError("something vague") from error

    with pytest.raises(CheckpointError, match="are free"):
        store.commit(write, step=2, attempt="1.0", info={})
    assert_nothing_is_left(store)


@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace", "open"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO])
def test_a_fault_in_any_call_leaves_the_last_good_one(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    good = put(store, 1, "latest")
    modules = [os] if call != "open" else [hashing, local]
    real: Callable[..., Any] = getattr(os, call) if call != "open" else open

    for nth in range(100):
        calls = iter(range(1000))

        def fail_once(*arguments: Any, **options: Any) -> Any:
            if next(calls) == nth:  # noqa: B023
                raise OSError(code, os.strerror(code))
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            for module in modules:
                patch.setattr(module, call, fail_once, raising=False)
            try:
                store.publish(lambda file: file.write(PAYLOAD), step=2, attempt="1.0", info={})
            except CheckpointError as error:
                assert os.strerror(code) in str(error)
            else:
                break
        assert_nothing_is_left(store, good)
    assert nth > 0, "the fault was never met"
    assert [record.step for record in store.records()] == [2, 1]


def test_a_pointer_that_cannot_be_written_is_an_error_but_the_record_stands(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, 1, "latest")
    real = os.replace

    def refuse(source: str, target: str) -> None:
        if target.endswith("latest.json"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(CheckpointError, match="latest"):
            put(store, 2, "latest")
    second = store.records()[0]
    assert second.step == 2 and store.pointed("latest") == second
    store.repoint(second)
    assert second.name in Path(store.url, "latest.json").read_text()


def test_a_file_where_the_folder_should_be_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="checkpoints"):
        put(CheckpointStore(str(tmp_path / "checkpoints")), 1)


def test_a_folder_deleted_during_the_run_is_a_clear_error(store: CheckpointStore) -> None:
    put(store, 1)
    shutil.rmtree(store.url)
    with pytest.raises(CheckpointError, match="disappeared"):
        put(store, 2)
    assert not os.path.exists(store.url)


def test_a_fenced_writer_commits_nothing(tmp_path: Path) -> None:
    def guard() -> None:
        raise Fenced("another process owns this run")

    store = CheckpointStore(str(tmp_path), guard=guard)
    with pytest.raises(Fenced):
        put(store, 1, "latest")
    assert store.records() == [] and os.listdir(tmp_path / "data") == []


# Crashes
