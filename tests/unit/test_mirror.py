"""What the mirror brings to a store, in which order, and what it does when the store is away."""

from __future__ import annotations

import io
import json
import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from danling_core import storage
from danling_core.checkpoints import CheckpointStore, Record
from danling_core.errors import CheckpointError, Fenced, StoreUnavailable
from danling_core.mirror.pull import pull
from danling_core.mirror.segments import SegmentedFile
from danling_core.mirror.service import FENCED, INCOMPLETE, MirrorService
from danling_core.mirror.uploader import Uploader
from danling_core.runs.folder import RunFolder, read_log
from danling_core.runs.lease import Lease, check_generation
from danling_core.runs.segments import segments_by_file
from tests.other_user import as_owner_of


@pytest.fixture
def local(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def remote() -> str:
    return f"memory://mirror/{uuid.uuid4().hex}/digits-1/20261121-103249-123456"


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every remote write and delete, in order, as paths below the run folder."""
    seen: list[str] = []

    def watch(name: str, sign: str, position: int) -> None:
        original = getattr(storage, name)

        def watched(*arguments: object, **options: object) -> object:
            url = str(arguments[position])
            result = original(*arguments, **options)
            if url.startswith("memory://"):
                seen.append(sign + "/".join(url.split("/")[6:]))
            return result

        monkeypatch.setattr(storage, name, watched)

    watch("write_bytes", "", 0)
    watch("put_file", "", 1)
    watch("delete", "-", 0)
    return seen


def uploader(local: Path, remote: str, guard: Callable[[], None] = lambda: None) -> Uploader:
    return Uploader(os.fspath(local), remote, guard)


def commit(local: Path, step: int, *names: str, data: bytes = b"weights") -> Record:
    store = CheckpointStore(os.fspath(local / "checkpoints"))
    return store.commit(lambda file: file.write(data), step=step, attempt="1.0", info={}, names=names)


def append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(text)


def fill(local: Path) -> Record:
    """A working folder with one of everything."""
    for name in ("config.yaml", "results.json", "notes/mine.txt"):
        append(local / name, name)
    append(local / "status.json", '{"status": "complete", "name": "n", "id": "i"}')
    append(local / "events.jsonl", '{"event": "a"}\n{"event": "b"}\n')
    append(local / "run.log", "line\n")
    append(local / "logs/rank-1.log", "rank\n")
    append(local / "tensorboard/events.out.tfevents.1", "tb")
    for name in ("lease/000001.json", ".hidden", "mirror.json", "results.json.tmp"):
        append(local / name, "stays here")
    return commit(local, 5, "latest", "best")


def test_everything_goes_up_in_the_order_that_readers_rely_on(
    local: Path, remote: str, writes: list[str]
) -> None:
    record = fill(local)
    uploader(local, remote).run_pass()
    assert writes[:2] == [
        f"checkpoints/data/{record.name}/state.pt",
        f"checkpoints/records/{record.name}.json",
    ]
    assert sorted(writes[2:4]) == ["checkpoints/best.json", "checkpoints/latest.json"]
    assert writes[-1] == "status.json"
    assert sorted(writes[4:-1]) == [
        "config.yaml",
        "events/000001.jsonl",
        "logs/rank-1/000001.log",
        "notes/mine.txt",
        "results.json",
        "run/000001.log",
        "tensorboard/events.out.tfevents.1",
    ]
    store = CheckpointStore(storage.join(remote, "checkpoints"))
    assert store.pointed("best") == record and store.newest_good()[0] == record
    assert read_log(remote, "logs/rank-1.log") == b"rank\n"


def test_a_second_pass_writes_only_what_changed(local: Path, remote: str, writes: list[str]) -> None:
    fill(local)
    mirror = uploader(local, remote)
    mirror.run_pass()
    writes.clear()
    mirror.run_pass()
    assert writes == []
    append(local / "events.jsonl", '{"event": "c"}\n')
    append(local / "results.json", "more")
    mirror.run_pass()
    assert writes == ["events/000001.jsonl", "results.json"]


def test_the_state_file_tells_the_lag(local: Path, remote: str) -> None:
    record = fill(local)
    mirror = uploader(local, remote)
    mirror.run_pass()
    state = json.loads((local / "mirror.json").read_text())
    assert state["pending_bytes"] == 0 and state["error"] is None and state["synced_at"]
    assert state["committed"]["record"] == record.name
    commit(local, 6, "latest", data=b"x" * 1000)
    assert mirror.pending_bytes(mirror._scan()) == 1000


def test_what_was_pruned_here_is_pruned_there_record_first(
    local: Path, remote: str, writes: list[str]
) -> None:
    old = commit(local, 1, "latest", "epoch-0")
    mirror = uploader(local, remote)
    mirror.run_pass()
    commit(local, 2, "latest")
    store = CheckpointStore(os.fspath(local / "checkpoints"))
    store.remove(next(record for record in store.records() if record.name == old.name))
    writes.clear()
    mirror.run_pass()
    assert writes[-3:] == [
        "-checkpoints/epoch-0.json",
        f"-checkpoints/records/{old.name}.json",
        f"-checkpoints/data/{old.name}",
    ]
    store = CheckpointStore(storage.join(remote, "checkpoints"))
    assert [record.step for record in store.records()] == [2] and store.newest_good()[0] is not None
    assert storage.list_names(storage.join(remote, "checkpoints/data")) == [store.records()[0].name]


def test_remote_checkpoints_that_were_never_here_stay(local: Path, remote: str) -> None:
    """A working folder that was lost must not empty the store."""
    commit(local, 1, "latest")
    uploader(local, remote).run_pass()
    for path in sorted(local.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    uploader(local, remote).run_pass()
    assert [record.step for record in CheckpointStore(storage.join(remote, "checkpoints")).records()] == [1]


def test_a_checkpoint_pruned_while_it_goes_up_is_whole_or_absent(
    local: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(local, 1, "latest")
    put, store = storage.put_file, CheckpointStore(os.fspath(local / "checkpoints"))

    def put_and_prune(source: str, url: str, **options: Any) -> None:
        monkeypatch.setattr(storage, "put_file", put)
        commit(local, 2, "latest")
        store.prune(keep_last=1)
        put(source, url, **options)

    monkeypatch.setattr(storage, "put_file", put_and_prune)
    mirror = uploader(local, remote)
    mirror.run_pass()
    assert [record.step for record in CheckpointStore(storage.join(remote, "checkpoints")).records()] == [1]
    mirror.run_pass()
    remote_store = CheckpointStore(storage.join(remote, "checkpoints"))
    assert [record.step for record in remote_store.records()] == [2]
    assert remote_store.newest_good()[1] == []


def test_checkpoints_that_come_faster_than_the_store_takes_them_do_not_hold_up_the_rest(
    local: Path, remote: str, monkeypatch: pytest.MonkeyPatch, writes: list[str]
) -> None:
    fill(local)
    put, steps = storage.put_file, iter(range(6, 12))

    def put_and_commit(source: str, url: str, **options: Any) -> None:
        put(source, url, **options)
        if (step := next(steps, None)) is not None:
            commit(local, step, "latest")

    monkeypatch.setattr(storage, "put_file", put_and_commit)
    mirror = uploader(local, remote)
    mirror.run_pass()
    assert len([path for path in writes if "/data/" in path]) == 1
    assert "status.json" in writes and "events/000001.jsonl" in writes
    mirror.run_pass()
    assert "checkpoints/latest.json" in writes


@pytest.mark.parametrize("name", ["status.json", "results.json", "notes/mine.txt", "run/000001.log"])
def test_a_write_that_came_late_is_found_and_put_right_at_the_end(
    name: str, local: Path, remote: str
) -> None:
    record = fill(local)
    mirror = uploader(local, remote)
    mirror.run_pass()
    url, pointer = storage.join(remote, name), storage.join(remote, "checkpoints/latest.json")
    wanted = storage.read_bytes(url)
    storage.write_bytes(url, b"x" * (len(wanted) - (name not in ("status.json", "results.json"))))
    storage.write_bytes(pointer, b'{"record": "0000000001-1.0", "as_of": 9}')
    storage.delete(storage.join(remote, "checkpoints/records", f"{record.name}.json"))
    mirror.run_pass(is_final=True)
    assert storage.read_bytes(url) == wanted
    assert CheckpointStore(storage.join(remote, "checkpoints")).pointed("latest") == record


def test_links_and_pipes_hold_nothing_up_and_are_left_out(
    local: Path, remote: str, writes: list[str]
) -> None:
    fill(local)
    append(local / "controlnet/weights.mmap", "mine")
    (local / "notes/elsewhere").symlink_to(local / "logs", target_is_directory=True)
    (local / "notes/loop").symlink_to(local / "notes/loop")
    (local / "notes/file").symlink_to(local / "status.json")
    os.mkfifo(local / "notes/pipe")
    mirror = uploader(local, remote)
    mirror.run_pass()
    mirror.run_pass()
    assert "status.json" in writes and "controlnet/weights.mmap" in writes
    assert not {"notes/elsewhere", "notes/loop", "notes/file", "notes/pipe"} & set(writes)


def test_what_may_not_be_read_holds_nothing_up_and_is_said_once(
    remote: str, writes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert storage.list_tree(remote) == []  # imports the client, which another user may not be able to do
    with tempfile.TemporaryDirectory() as folder, as_owner_of(folder):
        local = Path(folder)
        append(local / "status.json", "{}")
        append(local / "notes/mine/hers.txt", "hers")
        append(local / "notes/closed.txt", "hers")
        os.chmod(local / "notes/mine", 0)
        os.chmod(local / "notes/closed.txt", 0)
        mirror = uploader(local, remote)
        mirror.run_pass()
        mirror.run_pass()
        assert sorted(mirror._state["unreadable"]) == ["notes/closed.txt", "notes/mine"]
        os.chmod(local / "notes/mine", 0o700)
    assert writes == ["status.json"]
    for name in ("notes/mine", "notes/closed.txt"):
        assert len([record for record in caplog.records if name in record.getMessage()]) == 1


@pytest.mark.parametrize("status", ["complete", "interrupted"])
def test_the_scratch_loses_its_payloads_once_the_store_has_a_complete_run(
    status: str, local: Path, remote: str
) -> None:
    record = fill(local)
    (local / "status.json").write_text(json.dumps({"status": status, "name": "n", "id": "i"}))
    assert MirrorService(uploader(local, remote), io.StringIO(""), io.StringIO()).run() == 0
    assert (local / "checkpoints/data" / record.name).exists() == (status != "complete")
    assert [each.name for each in CheckpointStore(str(local / "checkpoints")).records()] == [record.name]
    pull(RunFolder(remote), os.fspath(local))
    CheckpointStore(str(local / "checkpoints")).verify(record)


def test_a_torn_local_checkpoint_is_not_brought_up(local: Path, remote: str, writes: list[str]) -> None:
    record = commit(local, 1, "latest")
    (local / "checkpoints/data" / record.name / "state.pt").write_bytes(b"short")
    uploader(local, remote).run_pass()
    assert not any("records" in path or "latest" in path for path in writes)


def test_complete_is_never_said_before_everything_is_there(
    local: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store fails at one write after the other; a reader looks each time."""
    fill(local)
    write, budget = storage.write_bytes, 0

    def limited(url: str, data: bytes, **options: Any) -> None:
        nonlocal budget
        if url.startswith("memory://"):
            if budget == 0:
                raise StoreUnavailable("away")
            budget -= 1
        write(url, data, **options)

    monkeypatch.setattr(storage, "write_bytes", limited)
    mirror = uploader(local, remote)
    passes = 0
    while passes < 12:
        passes, budget = passes + 1, 1
        try:
            mirror.run_pass()
            break
        except StoreUnavailable:
            store = CheckpointStore(storage.join(remote, "checkpoints"))
            assert store.newest_good()[1] == []
        if RunFolder(remote).read_status() is not None:
            assert read_log(remote, "events.jsonl").count(b"\n") == 2
    assert passes > 3 and RunFolder(remote).read_status() is not None


def test_a_fenced_mirror_writes_nothing(local: Path, remote: str, writes: list[str]) -> None:
    fill(local)
    first = Lease.acquire(storage.parent(remote), "first")
    mirror = uploader(local, remote, lambda: check_generation(first.url, first.generation))
    first.release()
    Lease.acquire(storage.parent(remote), "second")
    writes.clear()
    with pytest.raises(Fenced):
        mirror.run_pass(is_final=True)
    assert writes == []


# Segments


def segmented(local: Path, remote: str, size: int = 16, generation: int = 1) -> SegmentedFile:
    sizes = {entry.path: entry.size for entry in storage.list_tree(remote)}
    known = segments_by_file(sizes).get("run.log", [])
    return SegmentedFile(
        os.fspath(local / "run.log"), remote, "run.log", known, lambda: None, generation, size
    )


def test_segments_are_a_prefix_of_whole_lines_at_every_moment(local: Path, remote: str) -> None:
    lines = [f"{number} {'x' * (number % 23)}\n" for number in range(60)]
    log = segmented(local, remote)
    for number, line in enumerate(lines):
        append(local / "run.log", line[:3])
        log.upload()
        append(local / "run.log", line[3:])
        if number % 3 == 0:
            log.upload()
            assert read_log(remote, "run.log").decode() == "".join(lines[: number + 1])
        if number % 10 == 0:
            log = segmented(local, remote)  # a new process goes on
    log.upload()
    assert read_log(remote, "run.log").decode() == "".join(lines)


def test_a_full_segment_is_never_written_again(local: Path, remote: str, writes: list[str]) -> None:
    log = segmented(local, remote)
    for number in range(10):
        append(local / "run.log", f"line {number}\n")
        log.upload()
    assert [writes.count(f"run/{number:06d}.log") for number in (1, 2, 3, 4, 5)] == [2, 2, 2, 2, 2]


def test_an_unfinished_line_waits_for_the_end(local: Path, remote: str) -> None:
    append(local / "run.log", "whole\nunfini")
    log = segmented(local, remote)
    log.upload()
    assert read_log(remote, "run.log") == b"whole\n"
    log.upload(is_final=True)
    assert read_log(remote, "run.log") == b"whole\nunfini"


def test_a_log_that_was_replaced_starts_over(local: Path, remote: str) -> None:
    append(local / "run.log", "old line\n" * 10)
    log = segmented(local, remote)
    log.upload()
    (local / "run.log").write_text("new\n")
    log.upload()
    assert read_log(remote, "run.log") == b"new\n"


def test_a_new_owner_begins_with_the_last_segment_under_a_name_of_its_own(local: Path, remote: str) -> None:
    append(local / "run.log", "one\n" * 8)
    segmented(local, remote).upload()
    append(local / "run.log", "two\n")
    segmented(local, remote, generation=3).upload()
    names = storage.list_names(storage.join(remote, "run"))
    assert names == ["000001.log", "000002-000003.log", "000002.log", "000003-000003.log"]
    assert read_log(remote, "run.log") == b"one\n" * 8 + b"two\n"


@pytest.mark.parametrize("late", ["000002.log", "000003.log", "000004.log"])
def test_what_an_earlier_owner_writes_too_late_is_passed_over(late: str, local: Path, remote: str) -> None:
    append(local / "run.log", "one\n" * 8)
    segmented(local, remote).upload()
    append(local / "run.log", "two\n")
    segmented(local, remote, generation=2).upload()
    storage.write_bytes(storage.join(remote, "run", late), b"an older line\n")
    assert read_log(remote, "run.log") == (local / "run.log").read_bytes()
    append(local / "run.log", "three\n")
    segmented(local, remote, generation=3).upload()
    assert read_log(remote, "run.log") == (local / "run.log").read_bytes()


# Pull


def test_a_new_machine_gets_what_a_resume_needs(local: Path, remote: str, tmp_path: Path) -> None:
    commit(local, 1, "best", data=b"best")
    for step in (2, 3):
        commit(local, step, "latest", f"epoch-{step}", data=b"%d" % step)
    fill_files = ("results.json", "config.yaml")
    for name in fill_files:
        append(local / name, name)
    append(local / "events.jsonl", "one\ntwo\n")
    append(local / "tensorboard/events.out.tfevents.1", "big")
    uploader(local, remote).run_pass(is_final=True)
    other = tmp_path / "other"
    other.mkdir()
    pull(RunFolder(remote), os.fspath(other))
    store = CheckpointStore(os.fspath(other / "checkpoints"))
    newest, bad = store.newest_good()
    assert newest is not None and newest.step == 3 and bad == []
    assert store.pointed("best").step == 1  # type: ignore[union-attr]
    assert [record.step for record in store.records()] == [3, 2, 1]
    assert sorted(os.listdir(other / "checkpoints/data")) == [f"{step:010d}-1.0" for step in (1, 3)]
    assert (other / "events.jsonl").read_text() == "one\ntwo\n"
    assert all((other / name).read_text() == name for name in fill_files)
    assert not (other / "tensorboard").exists() and not (other / "events").exists()


def test_a_damaged_remote_checkpoint_is_passed_over(local: Path, remote: str, tmp_path: Path) -> None:
    for step in (1, 2):
        commit(local, step, "latest")
    uploader(local, remote).run_pass()
    storage.write_bytes(storage.join(remote, "checkpoints/data/0000000002-1.0/state.pt"), b"WEIGHTS")
    other = tmp_path / "other"
    other.mkdir()
    pull(RunFolder(remote), os.fspath(other))
    newest, bad = CheckpointStore(os.fspath(other / "checkpoints")).newest_good()
    assert newest is not None and newest.step == 1 and bad == []


def test_a_run_whose_remote_checkpoints_are_all_damaged_is_not_begun_anew(
    local: Path, remote: str, tmp_path: Path
) -> None:
    commit(local, 1, "latest")
    uploader(local, remote).run_pass()
    storage.write_bytes(storage.join(remote, "checkpoints/data/0000000001-1.0/state.pt"), b"WEIGHTS")
    (tmp_path / "other").mkdir()
    with pytest.raises(
        CheckpointError, match=r"every checkpoint in memory://.* is damaged(.|\n)*changed bits"
    ):
        pull(RunFolder(remote), os.fspath(tmp_path / "other"))


def test_a_working_folder_that_is_ahead_is_kept(local: Path, remote: str) -> None:
    commit(local, 1, "latest")
    append(local / "events.jsonl", "one\n")
    append(local / "config.yaml", "old")
    uploader(local, remote).run_pass()
    append(local / "events.jsonl", "two\n")
    commit(local, 2, "latest")
    storage.write_bytes(storage.join(remote, "config.yaml"), b"new")
    pull(RunFolder(remote), os.fspath(local))
    assert (local / "events.jsonl").read_text() == "one\ntwo\n"
    newest = CheckpointStore(os.fspath(local / "checkpoints")).newest_good()[0]
    assert newest is not None and newest.step == 2
    assert (local / "config.yaml").read_text() == "new"


def test_a_working_folder_that_another_machine_overtook_is_replaced(local: Path, remote: str) -> None:
    append(local / "events.jsonl", "one\n")
    commit(local, 1, "latest")
    uploader(local, remote).run_pass()
    append(local / "events.jsonl", "mine\n")
    commit(local, 9, "latest")
    storage.write_bytes(storage.join(remote, "events/000001.jsonl"), b"one\ntheirs\n")
    pull(RunFolder(remote), os.fspath(local))
    assert (local / "events.jsonl").read_text() == "one\ntheirs\n"
    assert [record.step for record in CheckpointStore(os.fspath(local / "checkpoints")).records()] == [1]


# The service and its process


class Scripted:
    """An uploader whose passes do what the script says."""

    def __init__(self, *script: Exception | None) -> None:
        self.script = list(script)
        self.passes: list[tuple[bool, bool]] = []
        self.errors: list[BaseException | None] = []

    def run_pass(self, is_final: bool, is_full: bool) -> None:
        self.passes.append((is_final, is_full))
        step = self.script.pop(0) if self.script else None
        if step is not None:
            raise step

    def make_room(self) -> None:
        self.passes.append((True, True))

    def note_error(self, error: BaseException | None) -> None:
        self.errors.append(error)


def serve(script: Scripted, text: str, **options: float) -> tuple[int, str]:
    replies = io.StringIO()
    code = MirrorService(script, io.StringIO(text), replies, **options).run()  # type: ignore[arg-type]
    return code, replies.getvalue()


def test_the_end_of_input_is_a_final_pass() -> None:
    script = Scripted()
    assert serve(script, "sync\nsync\n") == (0, "ok 1\nok 2\n")
    assert script.passes[-1][0] and script.errors == []


def test_a_fenced_service_says_so_and_ends() -> None:
    assert serve(Scripted(Fenced("taken over")), "sync\n") == (FENCED, "fenced\n")


def test_a_store_that_stays_away_is_reported_at_the_end() -> None:
    script = Scripted(*[StoreUnavailable("away")] * 9)
    code, replies = serve(script, "sync\n", drain_seconds=0)
    assert (code, replies) == (INCOMPLETE, "")
    assert str(script.errors[-1]) == "away"


def test_a_mirror_that_cannot_write_its_state_down_delivers(local: Path, remote: str) -> None:
    fill(local)
    (local / "mirror.json").unlink()
    (local / "mirror.json").mkdir()
    assert MirrorService(uploader(local, remote), io.StringIO(""), io.StringIO()).run() == 0
    assert storage.exists(storage.join(remote, "status.json"))
