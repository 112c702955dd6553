"""Identity: the same for the same code and config anywhere, another for anything that can change a result."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import pytest

from danling_core.config import Config
from danling_core.errors import ConfigError, RunInterrupted
from danling_core.identity import code_state
from danling_core.identity.ids import NO_SOURCE, experiment_id_of, identify, new_timestamp
from danling_core.identity.imports import hidden_imports
from danling_core.runner.resolve import import_runner
from danling_core.session.other_code import tell_of_hidden_imports

SETTINGS = [
    "diff.external=false",
    "diff.noprefix=true",
    "diff.mnemonicPrefix=true",
    "color.ui=always",
    "diff.context=9",
    "diff.renames=copy",
    "diff.algorithm=histogram",
    "core.quotePath=false",
    "diff.interHunkContext=5",
    "core.pager=false",
    "diff.relative=true",
    "core.fsmonitor=false",
    "diff.submodule=log",
    "diff.orderFile=missing",
    "diff.indentHeuristic=true",
    "diff.ignoreSubmodules=all",
    "core.abbrev=5",
    "diff.wordRegex=.",
    "diff.statGraphWidth=3",
    "diff.suppressBlankEmpty=true",
    "diff.wsErrorHighlight=all",
]
STATED = "0123456789abcdef0123456789abcdef01234567"


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always"]
    done = subprocess.run(
        ["git", *settings, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def make_repository(folder: Path) -> Path:
    """A repository with one commit and a runner in a folder below; returns the runner's file."""
    (folder / "my package").mkdir(parents=True)
    source = folder / "my package" / "runner.py"
    source.write_text("class Mine: pass\n\n\ndef later():\n    from helping import tool\n")
    (folder / "other.txt").write_text("text\n")
    (folder / ".gitignore").write_text("ignored/\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    return source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "a repository é")


def root_of(source: Path) -> Path:
    return source.parents[1]


def config(**values: Any) -> Config:
    return Config(**{"epoch_end": 3, "runner": "package.runner:Mine", **values})


# the code ----------------------------------------------------------------------
@pytest.mark.holds("levels-1")
def test_a_clean_tree_is_its_commit(source: Path) -> None:
    assert experiment_id_of(str(source)) == git(root_of(source), "rev-parse", "HEAD")


def test_a_detached_head_is_its_commit(source: Path) -> None:
    git(root_of(source), "checkout", "-q", "--detach")
    assert experiment_id_of(str(source)) == git(root_of(source), "rev-parse", "HEAD")


def test_a_worktree_is_its_own_commit(source: Path, tmp_path: Path) -> None:
    git(root_of(source), "worktree", "add", "-q", str(tmp_path / "tree"))
    assert experiment_id_of(str(tmp_path / "tree" / "my package" / "runner.py")) == experiment_id_of(
        str(source)
    )


@pytest.mark.holds("levels-1")
@pytest.mark.parametrize(
    "edit",
    [
        lambda root: (root / "other.txt").write_text("changed\n"),
        lambda root: (root / "other.txt").write_bytes(b"\x00\xff"),
        lambda root: (root / "other.txt").unlink(),
        lambda root: (root / "my package" / "runner.py").write_text("class Mine: x = 1\n"),
        lambda root: (root / "my package" / "helping.py").write_text("x = 1\n"),
        lambda root: (root / "my package" / "helping.py").write_text(""),
        lambda root: [(root / "staged.txt").write_text("x"), git(root, "add", "staged.txt")],
    ],
    ids=["text", "binary", "deleted", "source", "untracked", "untracked-empty", "staged"],
)
def test_what_is_not_committed_changes_the_id_and_undoing_it_restores_it(source: Path, edit: Any) -> None:
    root, clean = root_of(source), experiment_id_of(str(source))
    edit(root)
    dirty = experiment_id_of(str(source))
    assert dirty == experiment_id_of(str(source))
    assert dirty.startswith(f"{clean}-") and len(dirty) == 53
    git(root, "reset", "-q", "--hard")
    git(root, "clean", "-fdq")
    assert experiment_id_of(str(source)) == clean


@pytest.mark.parametrize(
    "name", ["helping.py", "helping/__init__.py", "helping/tool.py", "helping/inner.py", "ignored/far.py"]
)
@pytest.mark.parametrize("is_in_git", [True, False])
def test_each_file_that_is_imported_counts_whether_git_knows_it_or_not(
    source: Path, tmp_path: Path, name: str, is_in_git: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_in_git:
        source = Path(shutil.copytree(source.parent, tmp_path / "elsewhere")) / source.name
    folder = source.parent
    if name.startswith("helping/"):
        (folder / "helping").mkdir()
        (folder / "helping" / "tool.py").write_text("from . import inner\n")
    if name.startswith("ignored/"):
        (folder / "helping.py").write_text("import far\n")
        (folder / "ignored").mkdir()
        monkeypatch.syspath_prepend(str(folder / "ignored"))
    ids = {experiment_id_of(str(source))}
    for text in ("x = 1\n", "x = 2\n"):
        previous = (folder / name).read_text() if (folder / name).exists() else ""
        (folder / name).write_text(previous + text)
        ids.add(experiment_id_of(str(source)))
    assert len(ids) == 3


def test_what_the_runner_does_not_import_changes_nothing(source: Path) -> None:
    clean, root = experiment_id_of(str(source)), root_of(source)
    (root / "data.csv").write_text("1,2\n")
    (root / "ignored").mkdir()
    (root / "ignored" / "x.py").write_text("x = 1\n")
    (root / "my package" / "stray.py").write_text("x = 1\n")
    (root / "my package" / "torch.py").write_text("what an installed package is called\n")
    assert experiment_id_of(str(source)) == clean


def test_a_runner_that_git_ignores_is_still_seen(source: Path) -> None:
    mine = root_of(source) / "ignored" / "mine.py"
    mine.parent.mkdir()
    ids = set()
    for text in ("x = 1\n", "x = 2\n"):
        mine.write_text(text)
        ids.add(experiment_id_of(str(mine)))
    assert len(ids) == 2


def test_the_storage_root_is_no_code(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, clean = root_of(source), experiment_id_of(str(source))
    (root / "runs").mkdir()
    (root / "runs" / "helping.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(root / "runs"))
    assert experiment_id_of(str(source)) != clean
    assert experiment_id_of(str(source), [str(root / "runs"), "s3://bucket/x"]) == clean
    monkeypatch.chdir(root)
    assert experiment_id_of(str(source), ["runs"]) == clean
    assert identify(config(project_root="runs"), str(source)).experiment_id == clean


def test_a_storage_root_around_the_code_does_not_hide_edits(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = experiment_id_of(str(source))
    source.write_text("class Mine: x = 1\n")
    monkeypatch.chdir(root_of(source))
    for place in (".", "my package", "..", "/"):
        assert identify(config(project_root=place), str(source)).experiment_id != clean


def test_the_users_git_settings_and_environment_do_not_change_the_id(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = root_of(source)
    (root / "other.txt").rename(root / "renamed.txt")
    git(root, "add", "-A")
    source.write_text("class Mine: x = 1\n")
    before = experiment_id_of(str(source))
    for setting in SETTINGS:
        git(root, "config", *setting.split("="))
    for name, value in {
        "GIT_DIR": "/x",
        "GIT_INDEX_FILE": "/x",
        "GIT_EXTERNAL_DIFF": "false",
        "GIT_DIFF_OPTS": "-u0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert experiment_id_of(str(source)) == before


def test_reading_does_not_write_to_the_repository(source: Path) -> None:
    index = root_of(source) / ".git" / "index"
    for path in (source, root_of(source) / "other.txt"):
        os.utime(path, (1, 1))  # git takes them for changed, until it has looked
    before = index.stat().st_mtime_ns
    experiment_id_of(str(source))
    assert index.stat().st_mtime_ns == before


def test_a_submodule_counts_and_is_its_own_repository(source: Path, tmp_path: Path) -> None:
    inner = make_repository(tmp_path / "inner")
    root = root_of(source)
    git(root, "submodule", "--quiet", "add", str(root_of(inner)), "sub module")
    git(root, "commit", "-q", "-m", "two")
    clean = experiment_id_of(str(source))
    assert clean == git(root, "rev-parse", "HEAD")
    below = root / "sub module" / "my package" / "runner.py"
    assert experiment_id_of(str(below)) == experiment_id_of(str(inner))
    ids = {clean}
    for text in ("x = 1\n", "x = 2\n"):
        below.write_text(text)
        ids.add(experiment_id_of(str(source)))
    assert len(ids) == 3
    assert experiment_id_of(str(source), [str(root / "sub module")]) == clean


@pytest.mark.holds("levels-1")
def test_outside_git_the_id_is_the_source(tmp_path: Path) -> None:
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text("x = 1\n")
    second.write_bytes(b"x = 1\r\n")
    before = experiment_id_of(str(first))
    assert len(before) == 40 and before == experiment_id_of(str(second))
    first.write_text("x = 2\n")
    assert experiment_id_of(str(first)) != before


def test_without_a_commit_or_without_git_the_id_is_the_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "runner.py"
    outside.write_text(source.read_text())
    expected = experiment_id_of(str(outside))
    git(tmp_path, "init", "-q")
    assert experiment_id_of(str(outside)) == expected
    monkeypatch.setenv("PATH", str(tmp_path))
    assert experiment_id_of(str(source)) == expected


def test_a_git_that_hangs_or_fails_is_an_error_not_another_id(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_state, "_TIMEOUT_SECONDS", 0.0)
    with pytest.raises(ConfigError, match="state experiment_id"):
        experiment_id_of(str(source))
    monkeypatch.undo()
    (root_of(source) / ".git" / "index").write_bytes(b"broken")
    with pytest.raises(ConfigError, match="git diff failed"):
        experiment_id_of(str(source))


def test_code_in_no_file_has_a_known_id_and_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert experiment_id_of(None) == NO_SOURCE
    with pytest.raises(ConfigError, match="is not a file"):
        experiment_id_of(str(tmp_path / "gone.py"))


RUNNER = """
import torch
import danling_core as dl

class Mine(dl.TorchRunner):
    def __init__(self, config):
        super().__init__(config)
        inputs = torch.arange(16.0).reshape(8, 2) / 16
        self.datasets["train"] = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0.4).long())
        self.model = torch.nn.Linear(2, 2)
        self.criterion = torch.nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.until = None

    def train_step(self, data):
        if self.steps == self.until:
            self.request_stop("asked by the test")
        return super().train_step(data)
"""


@pytest.mark.parametrize("is_committed", [True, False])
def test_code_that_changes_in_the_middle_of_a_run_is_said_and_the_old_id_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_committed: bool
) -> None:
    name, code = f"runner_of_a_commit_{is_committed}".lower(), tmp_path / "code"
    code.mkdir()
    (code / f"{name}.py").write_text(RUNNER)
    git(code, "init", "-q")
    git(code, "add", ".")
    git(code, "commit", "-q", "-m", "one")
    monkeypatch.syspath_prepend(str(code))

    def make(**fields: Any) -> Any:
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        place = {"project_root": str(tmp_path / "runs"), "runner": f"{name}:Mine", "device": "cpu"}
        values = {"epoch_end": 3, "dataloader": {"batch_size": 2}, "sanity_batches": 0, "progress_bar": False}
        return import_runner(f"{name}:Mine")({**place, **values, **fields})

    first, old = make(), git(code, "rev-parse", "HEAD")
    assert first.identity.experiment_id == old
    first.until = 5
    with pytest.raises(RunInterrupted):
        first.train()
    (code / f"{name}.py").write_text(RUNNER.replace("lr=0.1", "lr=0.2"))
    if is_committed:
        git(code, "commit", "-q", "-a", "-m", "two")
    caplog.clear()
    anew = make()
    anew.train()
    [line] = [record.getMessage() for record in caplog.records if "other code" in record.getMessage()]
    changed = git(code, "diff", "--shortstat", old)
    assert changed.startswith("1 file changed") and f"({changed} since its commit)" in line
    assert f"(interrupted, in {first.dir})" in line and line.endswith(f"experiment_id={old}")
    assert anew.resumed is None and anew.dir != first.dir and anew.steps == 12

    caplog.clear()
    again = make(experiment_id=old)
    again.train()
    assert again.resumed["step"] == first.steps < 12 and again.dir == first.dir and again.steps == 12
    assert "other code" not in caplog.text and len(list((tmp_path / "runs").glob("*/2*"))) == 2


# the run -----------------------------------------------------------------------
def test_the_ids_hang_together(source: Path) -> None:
    found = identify(config(experiment_name="e", run_name="r"), str(source))
    assert len(found.run_id) == 32 and int(found.run_id, 16) >= 0
    assert found.id == found.experiment_id[:8] + found.run_id[:8]
    assert found.uuid == uuid5(UUID(found.run_id), found.id)
    assert found.name == "e-r"
    assert identify(config(name="mine"), str(source)).name == "mine"


def test_the_run_id_never_changes_between_versions() -> None:
    values = {"seed": 1, "optim": {"name": "AdamW", "lr": 1e-3}, "params": {"width": 32}}
    assert identify(config(experiment_id=STATED, **values), None).run_id == "f24d50c8308e4a84b564c2b9da22996e"


@pytest.mark.holds("levels-2")
@pytest.mark.parametrize(
    "values", [{"seed": 1}, {"params": {"a": 1}}, {"nproc_per_node": 1}, {"runner": "a:Other"}]
)
def test_what_can_change_a_result_changes_the_run_id(values: dict[str, Any]) -> None:
    first, second = (identify(config(experiment_id=STATED, **given), None) for given in ({}, values))
    assert first.experiment_id == second.experiment_id and first.run_id != second.run_id


@pytest.mark.holds("levels-2")
@pytest.mark.parametrize(
    "values", [{"log_interval": 1}, {"project_root": "/x"}, {"run_name": "x"}, {"group": "x"}]
)
def test_what_cannot_change_a_result_does_not_change_the_run_id(values: dict[str, Any]) -> None:
    first, second = (identify(config(experiment_id=STATED, **given), None) for given in ({}, values))
    assert (first.id, first.uuid) == (second.id, second.uuid)


@pytest.mark.holds("bugs-8")
def test_uncommitted_code_changes_the_run_id(source: Path) -> None:
    before = identify(config(), str(source))
    (root_of(source) / "other.txt").write_text("changed\n")
    after = identify(config(), str(source))
    assert after.run_id != before.run_id and after.id != before.id


@pytest.mark.holds("levels-3")
def test_a_stated_experiment_id_makes_a_container_without_git_agree(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = identify(config(runner=f"{source}:Mine"), str(source))
    container = tmp_path / "app" / "runner.py"
    container.parent.mkdir()
    container.write_bytes(source.read_bytes())
    monkeypatch.setenv("PATH", str(tmp_path))
    there = identify(config(runner="runner.py:Mine", experiment_id=here.experiment_id), str(container))
    assert there == here


def test_the_ids_do_not_depend_on_the_current_folder_nor_on_how_the_file_is_written(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set()
    for folder, written in [(root_of(source), "my package/runner.py"), (source.parent, "./runner.py")]:
        monkeypatch.chdir(folder)
        found.add(identify(config(runner=f"{written}:Mine"), written))
    assert len(found) == 1


def test_a_script_and_its_file_are_one_runner(source: Path) -> None:
    script = identify(config(runner="__main__:Mine"), str(source))
    assert script == identify(config(runner=f"{source}:Mine"), str(source))


def test_two_files_with_a_class_of_one_name_are_two_runs(source: Path) -> None:
    other = source.parent / "sub" / "runner.py"
    other.parent.mkdir()
    other.write_text("class Mine: y = 2\n")
    git(root_of(source), "add", ".")
    git(root_of(source), "commit", "-q", "-m", "two")
    first, second = (identify(config(runner=f"{file}:Mine"), str(file)) for file in (source, other))
    assert first.experiment_id == second.experiment_id and first.run_id != second.run_id


# time --------------------------------------------------------------------------
@pytest.mark.holds("levels-4")
def test_a_timestamp_is_utc_with_microseconds_and_sorts() -> None:
    moment = datetime(2026, 11, 21, 10, 32, 49, 7, tzinfo=UTC)
    assert new_timestamp(moment) == "20261121-103249-000007"
    assert new_timestamp(moment.astimezone(timezone(timedelta(hours=8)))) == new_timestamp(moment)
    assert new_timestamp(moment) < new_timestamp(moment + timedelta(microseconds=1))
    assert len(new_timestamp()) == len(new_timestamp(moment))


@pytest.mark.parametrize("call", ['importlib.import_module("far")', '__import__("far")'])
def test_an_import_by_a_name_that_stands_in_a_call_counts(
    source: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root_of(source) / "ignored"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    source.write_text(source.read_text() + f"\n\ndef late():\n    import importlib\n    return {call}\n")
    ids = set()
    for text in ("x = 1\n", "x = 2\n"):
        (folder / "far.py").write_text(text)
        ids.add(experiment_id_of(str(source)))
    assert len(ids) == 2 and hidden_imports(source.resolve()) == []


def test_an_import_by_a_name_that_is_made_at_run_time_is_said_when_a_run_begins(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = source.read_text().count("\n")
    source.write_text(
        source.read_text() + "import importlib\nlate = lambda name: importlib.import_module(name)\n"
    )
    assert hidden_imports(source.resolve()) == [f"{source.resolve()}:{lines + 2}"]
    with caplog.at_level("WARNING", logger="danling"):
        tell_of_hidden_imports(str(source))
    assert f"{source.name}:{lines + 2}" in caplog.text and "experiment_id" in caplog.text
