"""Where a launched run's text log goes: the run's folder, where the config says, a store, or nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from danling_core import storage
from danling_core.launch.client import Launcher
from tests.s3_faults import FaultyProxy
from tests.small_runner import SmallRunner
from tests.small_runner import config as small_config
from tests.whole_runs import Ended, config, launch


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as launcher:
        yield launcher


def trained(launcher: Launcher, root: Path, **fields: object) -> Ended:
    ended = launch(launcher, config(root, epoch_end=1, **fields))
    assert ended.outcome is not None and ended.outcome.status == "complete"
    return ended


@pytest.mark.long
@pytest.mark.holds("attributes-24")
def test_the_config_may_put_the_log_elsewhere(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ended = trained(launcher, tmp_path, log_path="~/logs/mine.log")
    assert "epoch" in (tmp_path / "home" / "logs" / "mine.log").read_text()
    assert not (ended.path / "run.log").exists()


@pytest.mark.long
def test_a_run_without_a_log_leaves_none(launcher: Launcher, tmp_path: Path) -> None:
    ended = trained(launcher, tmp_path, log=False)
    assert not list(ended.path.rglob("*.log"))


@pytest.mark.long
def test_a_log_on_a_store_is_there_at_the_end(launcher: Launcher, tmp_path: Path, s3_root: str) -> None:
    ended = trained(launcher, tmp_path, log_path=f"{s3_root}/mine.log")
    assert storage.read_bytes(f"{s3_root}/mine.log").decode() in ended.log
    assert b"epoch" in storage.read_bytes(f"{s3_root}/mine.log")


@pytest.mark.long
def test_a_log_goes_to_its_store_once_and_while_the_run_is_held(
    tmp_path: Path, s3_root: str, s3_proxy: FaultyProxy
) -> None:
    fields = {"scratch": str(tmp_path / "scratch"), "log_path": f"{s3_root}/mine.log"}
    runner = SmallRunner(small_config(s3_root, epoch_end=1, **fields))
    runner.train()
    runner.close()
    puts = [path.partition("?")[0] for method, path in s3_proxy.requests if method == "PUT"]
    assert [path.endswith("/mine.log") for path in puts].count(True) == 1
    assert "/lease/" in puts[-1], "the release of the run comes last"
