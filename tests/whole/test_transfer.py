"""`danling pull`, `push` and `prune`: whole runs arrive whole, and only what nobody needs is deleted."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from danling_core import storage
from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import CheckpointCorrupt, ConfigError, RunBusy
from danling_core.launch.client import Launcher
from danling_core.runs.finding import list_runs
from danling_core.runs.folder import RunFolder
from danling_core.runs.lease import Lease, current_owner
from danling_core.storage.settings import current
from danling_core.tools.threads import map_threads
from danling_core.tools.transfer import copy_run, dead_owners
from flows.cli import main
from tests.marks import rarely
from tests.whole_runs import Ended, config, launch


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    """A complete run of three epochs, each with a checkpoint that is kept."""
    with Launcher() as launcher:
        wanted = config(tmp_path_factory.mktemp("made"), nproc_per_node=1, save_interval=1, tensorboard=True)
        yield launch(launcher, wanted)


@pytest.fixture
def run(made: Ended, tmp_path: Path) -> Ended:
    """A copy of that run, under `tmp_path / "here"`."""
    folder = tmp_path / "here" / made.path.parent.name / made.path.name
    shutil.copytree(made.path, folder)
    return Ended(folder, made.outcome)


@pytest.fixture(params=["s3", *rarely(["gcs"])])
def root(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_root"))


def files_of(path: Path) -> dict[str, bytes]:
    """The files of a run that are the same on every machine."""
    found = {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}
    return {name: data for name, data in found.items() if not name.startswith((".", "mirror.json"))}


def test_a_run_goes_to_a_store_and_comes_back_the_same(
    run: Ended, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(tmp_path / "here"), root]) == 0
    [(remote, status)] = list_runs(root)
    assert status is not None and status.is_complete
    assert main(["pull", status.name, str(tmp_path / "back"), "--root", root]) == 0
    back = tmp_path / "back" / run.path.parent.name / run.path.name
    empty = {name for name, data in files_of(run.path).items() if not data}
    assert files_of(back) == {name: data for name, data in files_of(run.path).items() if name not in empty}
    Ended(back, None).must_equal(run)
    assert "checked" in capsys.readouterr().out
    assert remote.url == storage.join(root, run.path.parent.name, run.path.name)


def test_a_copy_that_was_interrupted_goes_on(run: Ended, s3_root: str) -> None:
    def stop_in_the_middle(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    source = RunFolder(str(run.path))
    with pytest.raises(KeyboardInterrupt):
        copy_run(source, s3_root, stop_in_the_middle)
    assert [status for _, status in list_runs(s3_root)] in ([], [None]), "it is not complete yet"
    done = copy_run(source, s3_root)
    assert 0 < done.copied < done.size
    assert done.target.read_status() == run.status


def test_a_target_that_went_on_by_itself_is_not_overwritten(run: Ended, tmp_path: Path) -> None:
    target = tmp_path / "there" / run.path.parent.name / run.path.name
    shutil.copytree(run.path, target)
    (target / "events.jsonl").write_bytes(b'{"event": "another life"}\n')
    with pytest.raises(ConfigError, match="has gone on by itself"):
        copy_run(RunFolder(str(run.path)), str(tmp_path / "there"))


def test_a_run_that_is_written_is_not_copied(run: Ended, tmp_path: Path) -> None:
    lease = Lease.acquire(RunFolder(str(run.path)).lease_parent_url, "the trainer")
    with pytest.raises(RunBusy, match="the trainer"):
        copy_run(RunFolder(str(run.path)), str(tmp_path / "there"))
    lease.release()


def test_a_busy_run_does_not_keep_the_others_of_a_root_from_being_copied(
    run: Ended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = tmp_path / "here" / "a-busy-0123456789abcdef" / run.path.name
    shutil.copytree(run.path, busy)
    (busy.parent / "lost+found").touch()
    lease = Lease.acquire(str(busy.parent), "the trainer")
    assert main(["push", str(tmp_path / "here"), str(tmp_path / "there")]) == 1
    lease.release()
    assert "the trainer" in capsys.readouterr().out
    assert [folder.url for folder, _ in list_runs(str(tmp_path / "there"))] == [
        str(tmp_path / "there" / run.path.parent.name / run.path.name)
    ]


def test_owners_that_may_be_dead_are_watched_together(
    run: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = [str(tmp_path / name) for name in ("a", "b")]
    folders = [RunFolder(f"{parent}/{run.path.name}") for parent in parents]
    for parent in parents:
        Lease.acquire(parent, "the trainer")
    together = threading.Barrier(2)

    def watched(parent_url: str) -> bool:
        together.wait(60)
        return parent_url == parents[0]

    monkeypatch.setattr("danling_core.tools.transfer.is_held", watched)
    assert [owner is not None for owner in dead_owners(folders)] == [False, True]


def test_an_owner_that_was_watched_is_not_watched_again_unless_it_beats(run: Ended, tmp_path: Path) -> None:
    source = RunFolder(str(run.path))
    lease = Lease.acquire(source.lease_parent_url, "the trainer")
    dead = current_owner(source.lease_parent_url)
    assert copy_run(source, str(tmp_path / "there"), dead_owner=dead).copied > 0
    lease.beat()
    with pytest.raises(RunBusy, match="the trainer"):
        copy_run(source, str(tmp_path / "there"), dead_owner=dead)


def test_runs_are_pruned_at_once_with_the_settings_of_the_caller() -> None:
    together = threading.Barrier(2)

    def work(number: int) -> tuple[int, object]:
        together.wait(60)
        return number, current().options.get("project")

    with storage.using({"project": "mine"}):
        assert map_threads(2, work, [1, 2]) == [(1, "mine"), (2, "mine")]


def test_damage_is_found_before_anything_is_sent(run: Ended, tmp_path: Path) -> None:
    payload = next(run.path.glob("checkpoints/data/*/state.pt"))
    damaged = bytearray(payload.read_bytes())
    damaged[100] ^= 1
    payload.write_bytes(damaged)
    with pytest.raises(CheckpointCorrupt, match="changed bits"):
        copy_run(RunFolder(str(run.path)), str(tmp_path / "there"))
    assert not list((tmp_path / "there").rglob("state.pt"))


def checkpoints(root: str) -> set[str]:
    [(folder, _)] = list_runs(root)
    return {record.name for record in CheckpointStore(folder.checkpoints_url).records()}


def test_prune_says_first_and_deletes_when_told(
    run: Ended, s3_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run.path), s3_root]) == 0
    before = checkpoints(s3_root)
    best, latest = run.store().pointed("best"), run.store().pointed("latest")
    assert best is not None and latest is not None and len(before) >= 3
    capsys.readouterr()
    assert main(["prune", s3_root, "--keep-best"]) == 0
    said = capsys.readouterr().out
    assert checkpoints(s3_root) == before
    assert main(["prune", s3_root, "--keep-best", "--yes"]) == 0
    assert checkpoints(s3_root) == {best.name, latest.name}
    gone = before - {best.name, latest.name}
    assert all(name in said for name in gone) and f"{len(gone)} checkpoints, " in said
    [(folder, _)] = list_runs(s3_root)
    left = storage.list_tree(folder.checkpoints_url)
    names = {part.removesuffix(".json") for entry in left for part in entry.path.split("/")}
    assert not names & gone
    assert main(["pull", folder.url, str(tmp_path / "back")]) == 0, "what is left is a whole run"


def test_prune_leaves_alone_what_is_trained_or_damaged(
    run: Ended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, before = str(tmp_path / "here"), {record.name for record in run.store().records()}
    lease = Lease.acquire(RunFolder(str(run.path)).lease_parent_url, "the trainer")
    assert main(["prune", root, "--keep-last", "1", "--yes"]) == 0
    assert "it is being trained" in capsys.readouterr().out
    lease.release()
    latest = run.store().pointed("latest")
    assert latest is not None
    os.truncate(run.path / "checkpoints" / "data" / latest.name / "state.pt", 10)
    assert main(["prune", root, "--keep-last", "1", "--yes"]) == 0
    assert "damaged" in capsys.readouterr().out
    assert {record.name for record in run.store().records()} == before


@pytest.mark.parametrize("words", [[], ["--keep-last", "0"]])
def test_prune_must_be_told_what_stays(words: list[str], tmp_path: Path) -> None:
    assert main(["prune", str(tmp_path), *words]) == 2


def test_pull_wants_a_local_folder(run: Ended) -> None:
    assert main(["pull", str(run.path), "s3://bucket/experiments"]) == 2
