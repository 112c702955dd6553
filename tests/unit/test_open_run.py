"""Finding or creating a run under its lease."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from danling_core import storage
from danling_core.config import Config
from danling_core.errors import ConfigError, Fenced, RunBusy
from danling_core.identity.ids import Identity, identify
from danling_core.runs.folder import RunFolder, Status, find_checkpoints
from danling_core.runs.lease import Lease
from danling_core.session.context import RunContext
from danling_core.session.files import RunFiles
from danling_core.session.open_run import OpenedRun, open_run
from danling_core.storage.settings import current


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return os.fspath(tmp_path / "root") if request.param == "local" else f"memory://open/{uuid.uuid4().hex}"


def make(root: str, tmp_path: Path, **fields: object) -> tuple[Config, Identity]:
    scratch = os.fspath(tmp_path / "scratch")
    config = Config.from_dict(
        {"project_root": root, "epoch_end": 1, "experiment_id": "a" * 40, "scratch": scratch, **fields}
    )
    return config, identify(config, None)


def finish(opened: OpenedRun, identity: Identity, status: str = "complete") -> None:
    opened.folder.write_status(Status(status=status, name=identity.name, id=identity.id))  # type: ignore[arg-type]
    assert opened.lease is not None
    opened.lease.release()


@pytest.mark.holds("files-1")
def test_a_new_run_gets_a_folder_with_config_and_metadata(root: str, tmp_path: Path) -> None:
    config, identity = make(root, tmp_path, group="sweep")
    opened = open_run(config, identity)
    assert opened.is_new and opened.complete is None and opened.generation == 1
    assert storage.parent(opened.folder.url) == storage.join(root, f"experiment-run-{identity.id}")
    assert Config.from_yamls(storage.read_bytes(opened.folder.config_url).decode()) == config
    metadata = storage.read_json(opened.folder.metadata_url)
    assert metadata["run_id"] == identity.run_id and metadata["group"] == "sweep"
    assert len(metadata["attempts"]) == 1 and metadata["packages"]
    is_local = storage.is_local(root)
    assert os.path.isdir(opened.work_dir) and (opened.work_dir == opened.folder.url) == is_local
    assert opened.remote_url == (None if is_local else opened.folder.url)
    assert os.path.exists(os.path.join(opened.work_dir, "config.yaml"))


@pytest.mark.parametrize("status", ["complete", "interrupted"])
def test_a_run_of_the_same_config_and_other_code_is_named(
    root: str, tmp_path: Path, status: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, identity = make(root, tmp_path)
    finish(open_run(first, identity), identity, status)
    finish(open_run(*make(root, tmp_path, epoch_end=2)), make(root, tmp_path, epoch_end=2)[1])
    assert "other code" not in caplog.text
    opened = open_run(*make(root, tmp_path, experiment_id="b" * 40))
    assert opened.is_new
    [line] = [record.getMessage() for record in caplog.records if "other code" in record.getMessage()]
    assert f"experiment_id={'a' * 40}" in line and f"({status}, in " in line and identity.id in line


@pytest.mark.holds("levels-5")
@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_an_incomplete_run_is_resumed_in_place(root: str, tmp_path: Path, status: str) -> None:
    config, identity = make(root, tmp_path)
    first = open_run(config, identity)
    finish(first, identity, status)
    second = open_run(config, identity)
    assert second.folder == first.folder and not second.is_new
    assert second.generation == 2 and second.work_dir == first.work_dir
    assert len(storage.read_json(second.folder.metadata_url)["attempts"]) == 2


def test_a_former_owner_that_wakes_up_on_the_same_machine_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, identity = make(f"memory://open/{uuid.uuid4().hex}", tmp_path)
    first = open_run(config, identity)
    monkeypatch.setattr(
        "danling_core.runs.lease.beats_on_this_machine", lambda *owner: False
    )  # stopped by Ctrl-Z
    second = open_run(config, identity, stale_after_seconds=0.1)
    assert second.work_dir == first.work_dir and second.generation == 2
    files = []
    for opened in (first, second):
        status = Status(status="running", name=identity.name, id=identity.id)
        context = RunContext(opened.work_dir, opened.folder.url, opened.generation)
        checkpoints = os.path.join(opened.work_dir, "checkpoints")
        files.append(
            RunFiles(context, status, checkpoint_dir=checkpoints, keep_last=2, is_given=False, writers=[])
        )
    with pytest.raises(Fenced, match="taken over by generation 2 on this machine"):
        files[0].emit("progress", step=1)
    with pytest.raises(Fenced):
        files[0].write_status(status="failed")
    files[1].emit("progress", step=1)
    for each in files:
        each.close()


@pytest.mark.parametrize("status", ["interrupted", "complete"])
def test_a_run_is_found_by_its_id_whatever_it_is_called(root: str, tmp_path: Path, status: str) -> None:
    config, identity = make(root, tmp_path, run_name="run")
    first = open_run(config, identity)
    finish(first, identity, status)
    renamed, its_identity = make(root, tmp_path, run_name="run-seed=0")
    assert its_identity.id == identity.id and its_identity.name != identity.name
    second = open_run(renamed, its_identity)
    assert second.folder == first.folder and not second.is_new
    assert (second.complete is not None) == (status == "complete")
    if second.lease is not None:
        finish(second, identity)
    fresh = open_run(renamed, its_identity, fresh=True)
    assert storage.parent(fresh.folder.url) == storage.parent(first.folder.url)
    with pytest.raises(RunBusy):
        open_run(config, identity)


@pytest.mark.holds("levels-5")
def test_a_complete_run_is_returned_without_a_lease(root: str, tmp_path: Path) -> None:
    config, identity = make(root, tmp_path)
    first = open_run(config, identity)
    finish(first, identity)
    second = open_run(config, identity)
    assert second.complete is not None and second.complete.is_complete and second.lease is None
    assert second.folder == first.folder
    status = RunFolder(second.work_dir).read_status()
    assert status is not None and status.is_complete


@pytest.mark.parametrize("status", ["complete", "interrupted"])
def test_a_newer_folder_with_a_file_of_somebody_elses_hides_no_run(
    root: str, tmp_path: Path, status: str
) -> None:
    config, identity = make(root, tmp_path)
    first = open_run(config, identity)
    finish(first, identity, status)
    ghost = storage.join(storage.parent(first.folder.url), "20990101-000000-000000")
    storage.write_bytes(storage.join(ghost, "notes.txt"), b"mine")
    second = open_run(config, identity)
    assert second.folder == first.folder and not second.is_new
    assert (second.complete is not None, second.lease is None) == (status == "complete",) * 2
    assert storage.list_names(ghost) == ["notes.txt"]


@pytest.mark.holds("levels-5")
def test_fresh_makes_a_new_folder_that_is_the_newest(root: str, tmp_path: Path) -> None:
    config, identity = make(root, tmp_path)
    first = open_run(config, identity)
    finish(first, identity)
    second = open_run(config, identity, fresh=True)
    assert second.is_new and second.folder.timestamp > first.folder.timestamp
    finish(second, identity, "failed")
    assert open_run(config, identity).folder == second.folder


def test_a_faster_clock_does_not_hide_a_fresh_run(tmp_path: Path) -> None:
    config, identity = make(os.fspath(tmp_path), tmp_path)
    future = RunFolder(os.fspath(tmp_path / f"experiment-run-{identity.id}" / "20990101-000000-999999"))
    storage.write_bytes(future.config_url, config.yamls().encode())
    assert open_run(config, identity, fresh=True).folder.timestamp == "20990101-000001-000000"


def test_a_run_that_is_owned_is_busy(root: str, tmp_path: Path) -> None:
    config, identity = make(root, tmp_path)
    open_run(config, identity)
    with pytest.raises(RunBusy, match=f"experiment-run-{identity.id} .*pid {os.getpid()}"):
        open_run(config, identity)


def test_a_creation_that_died_half_way_is_finished(root: str, tmp_path: Path) -> None:
    config, identity = make(root, tmp_path)
    above = storage.join(root, f"experiment-run-{identity.id}")
    storage.write_bytes(storage.join(above, "20260101-000000-000000", "metadata.json"), b"{}")
    opened = open_run(config, identity)
    assert opened.folder.timestamp == "20260101-000000-000000"
    assert opened.folder.holds_run()


def test_a_folder_named_by_hand_is_used_and_guarded(root: str, tmp_path: Path) -> None:
    place = storage.join(root, "mine")
    config, identity = make(root, tmp_path, dir=place)
    opened = open_run(config, identity)
    assert opened.folder.url == place and opened.is_new
    assert opened.lease is not None and opened.lease.url == storage.join(place, "lease")
    finish(opened, identity)
    with pytest.raises(ConfigError, match="holds a run already"):
        open_run(config, identity, fresh=True)
    with pytest.raises(ConfigError, match="name another dir"):
        open_run(*make(root, tmp_path, dir=place, seed=1))


def test_a_failure_gives_the_lease_back(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, identity = make(root, tmp_path)

    def fail(*arguments: object) -> None:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr("danling_core.session.open_run._create", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            open_run(config, identity)
    assert open_run(config, identity).generation == 2


def test_the_lease_is_where_the_folder_says(tmp_path: Path) -> None:
    config, identity = make(os.fspath(tmp_path), tmp_path)
    opened = open_run(config, identity)
    with pytest.raises(RunBusy):
        Lease.acquire(opened.folder.lease_parent_url, "second")


def test_the_storage_options_of_a_run_are_not_those_of_the_process(tmp_path: Path) -> None:
    config, identity = make(os.fspath(tmp_path / "root"), tmp_path, storage_options={"project": "mine"})
    before = current()
    opened = open_run(config, identity)
    assert opened.lease is not None and current() == before
    opened.lease.release()


def test_a_place_for_checkpoints_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    opened = open_run(*make("root", tmp_path, checkpoint_dir="fast/mine"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_checkpoints(opened.folder) == str(tmp_path / "fast/mine")


def test_a_place_for_checkpoints_outside_a_remote_run_is_refused(tmp_path: Path) -> None:
    config, identity = make(
        f"memory://open/{uuid.uuid4().hex}", tmp_path, checkpoint_dir=str(tmp_path / "fast")
    )
    with pytest.raises(ConfigError, match="leave it out, or name the folder by checkpoint_dir_name"):
        open_run(config, identity)
    assert storage.list_tree(config.project_root) == []
