"""What others of the machine, and whoever wrote a run's files, can not do."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from danling_core import storage
from danling_core.errors import DanLingError, StorageError
from danling_core.session.scratch import scratch_folder
from flows.cli import main
from tests.small_runner import SmallRunner, config

URL = "s3://bucket/project/run-0123456789abcdef/20260101-000000-000000"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of the machine; returns what belongs to this user in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"danling-{os.getuid()}"


def test_a_scratch_folder_is_private_at_each_level_and_the_same_every_time(system: Path) -> None:
    path = Path(scratch_folder(URL, None))
    assert path.parent == system and scratch_folder(URL, None) == str(path)
    assert [folder.stat().st_mode & 0o777 for folder in (path, system)] == [0o700, 0o700]
    system.chmod(0o755)  # as older versions made it
    scratch_folder(URL, None)
    assert system.stat().st_mode & 0o777 == 0o700


def test_a_scratch_folder_that_another_may_have_made_is_refused(system: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    system.symlink_to(elsewhere)
    with pytest.raises(StorageError, match="is a link"):
        scratch_folder(URL, None)
    system.unlink()
    system.mkdir()
    system.chmod(0o777)
    with pytest.raises(StorageError, match="lets others write"):
        scratch_folder(URL, None)
    system.chmod(0o700)
    path = Path(scratch_folder(URL, None))
    path.rmdir()
    path.symlink_to(elsewhere)
    with pytest.raises(StorageError, match="is a link"):
        scratch_folder(URL, None)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_scratch_folder_of_another_user_is_refused(system: Path) -> None:
    system.mkdir()
    os.chown(system, 65534, 65534)
    with pytest.raises(StorageError, match="belongs to somebody else"):
        scratch_folder(URL, None)


def test_copies_follow_no_link_out_of_a_run(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path / "root"))
    runner.train()
    private = tmp_path / "private"
    private.mkdir()
    (private / "key").write_text("private")
    (Path(runner.dir) / "key").symlink_to(private / "key")
    (Path(runner.dir) / "logs").symlink_to(private)
    assert main(["pull", runner.dir, str(tmp_path / "copy")]) == 0
    assert not [path for path in (tmp_path / "copy").rglob("*") if path.name in ("key", "logs")]


def test_prune_leaves_the_checkpoints_of_another_run_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = SmallRunner(config(tmp_path / "victim", save_interval=1))
    victim.train()
    thief = SmallRunner(config(tmp_path / "root"))
    thief.train()
    stated = Path(thief.dir) / "config.yaml"
    text = stated.read_text()
    assert "checkpoint_dir: null" in text
    stated.write_text(text.replace("checkpoint_dir: null", f"checkpoint_dir: {victim.dir}/checkpoints"))
    before = sorted(Path(victim.dir).rglob("*"))
    assert main(["prune", str(tmp_path / "root"), "--keep-last", "1", "--yes"]) == 0
    assert "of another run" in capsys.readouterr().out
    assert sorted(Path(victim.dir).rglob("*")) == before


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/records", "checkpoints/data", ""])
def test_nothing_is_deleted_or_saved_through_a_link_to_another_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = SmallRunner(config(tmp_path / "victim", save_interval=1))
    victim.train()
    thief = SmallRunner(config(tmp_path / "root", save_interval=1))
    thief.train()
    place = Path(thief.dir) / name
    shutil.rmtree(place)
    place.symlink_to(Path(victim.dir) / name)
    before = {path: path.read_bytes() for path in Path(victim.dir).rglob("*") if path.is_file()}
    assert main(["prune", str(tmp_path / "root"), "--keep-last", "1", "--yes"]) in (0, 1)
    said = capsys.readouterr()
    assert ("of another run" if name in ("checkpoints", "") else "is a link") in said.out + said.err
    if name:
        (Path(thief.dir) / "status.json").unlink()
        with pytest.raises(DanLingError, match=r"holds checkpoints of run|is a link|is damaged"):
            SmallRunner(config(tmp_path / "root", save_interval=1)).train()
    assert {path: path.read_bytes() for path in Path(victim.dir).rglob("*") if path.is_file()} == before


def test_what_a_runs_files_say_is_shown_and_not_obeyed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.train()
    status = Path(runner.dir) / "status.json"
    evil = "\x1b]0;owned\x07\x1b[2J\u202egnp\x9b31m"
    status.write_text(
        json.dumps({**json.loads(status.read_text()), "name": evil, "error": evil, "group": evil})
    )
    for words in (
        ["runs", str(tmp_path)],
        ["show", runner.dir],
        ["verify", runner.dir],
        ["runs", str(tmp_path), "--json"],
    ):
        main(words)
        said = capsys.readouterr()
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(said.out + said.err), words
    main(["runs", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)[0]["name"] == evil
    assert storage.read_json(str(status))["name"] == evil
