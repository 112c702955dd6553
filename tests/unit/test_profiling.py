"""Profiles of a few steps: which, where their traces are, and that the run is the same one."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from danling_core.config import Config
from danling_core.errors import ConfigError
from tests.small_runner import SmallRunner, config, weights


def profiled(root: Path, **profile: Any) -> SmallRunner:
    # five steps an epoch
    runner = SmallRunner(config(root, epoch_end=3, dataloader={"batch_size": 4}, profile=profile))
    runner.train()
    return runner


def traces(root: Path) -> list[Path]:
    return sorted((root / "profile").glob("*.json.gz"), key=lambda path: int(path.name.split(".")[1]))


@pytest.mark.parametrize(
    ("profile", "ends"),
    [
        ({}, [10]),
        ({"wait": 0, "warmup": 0, "active": 1}, [1]),
        ({"wait": 1, "warmup": 1, "active": 2, "repeat": 3}, [4, 8, 12]),
        ({"wait": 12, "warmup": 1, "active": 50}, [15]),  # the run ends inside
    ],
)
def test_a_trace_for_each_window_of_steps(profile: Any, ends: list[int], tmp_path: Path) -> None:
    runner = profiled(tmp_path, **profile)
    found = traces(Path(runner.dir))
    assert [path.name for path in found] == [f"rank0.{step}.pt.trace.json.gz" for step in ends]
    events = json.loads(gzip.decompress(found[0].read_bytes()))["traceEvents"]
    assert any("addmm" in str(event.get("name")) for event in events)
    assert "addmm" in found[0].with_name(f"rank0.{ends[0]}.txt").read_text()


def test_a_profiled_run_is_the_same_run(tmp_path: Path) -> None:
    plain = SmallRunner(config(tmp_path / "plain", epoch_end=3, dataloader={"batch_size": 4}))
    plain.train()
    runner = profiled(tmp_path / "profiled", with_stack=True, record_shapes=True, profile_memory=True)
    assert runner.id == plain.id and weights(runner) == weights(plain)
    assert not (Path(plain.dir) / "profile").exists()


def test_a_run_that_ends_before_its_profile_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("danling").addHandler(caplog.handler)
    runner = profiled(tmp_path, wait=100)
    logging.getLogger("danling").removeHandler(caplog.handler)
    assert "ended before the profile began, which needs 103 steps" in caplog.text
    assert not (Path(runner.dir) / "profile").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"active": 0}, "profile.active"),
        ({"wait": -1}, "profile.wait"),
        ({"activ": 1}, "did you mean 'active'"),
        (True, "profile"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(epoch_end=1, profile=value)


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Blocked(SmallRunner):
        def train_epoch(self, split: str = "train") -> Any:
            (Path(self.dir) / "profile").touch()  # no folder can be made there
            return super().train_epoch(split)

    logging.getLogger("danling").addHandler(caplog.handler)
    runner = Blocked(config(tmp_path, epoch_end=3, dataloader={"batch_size": 4}, profile={}))
    runner.train()
    logging.getLogger("danling").removeHandler(caplog.handler)
    assert runner.epochs == 3 and "the profile could not be written" in caplog.text
