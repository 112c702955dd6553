"""Runs that begin with the weights or the whole state of another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import danling_core as dl
from tests.small_runner import SmallRunner, config, events, weights


@pytest.fixture
def trained(tmp_path: Path) -> SmallRunner:
    runner = SmallRunner(config(tmp_path / "first", params={"width": 4}, ema_decay=0.5))
    runner.train()
    return runner


class Watched(SmallRunner):
    """Keeps the weights that its first step begins with, and may be stopped."""

    stops_at: int | None = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.first: list[float] | None = None

    def train_step(self, data: Any) -> Any:
        if self.first is None:
            self.first = weights(self)
        return super().train_step(data)

    def after_step(self) -> None:
        if self.steps == self.stops_at:
            self.request_stop()


def averaged(runner: SmallRunner) -> list[float]:
    return torch.cat([v.double().flatten() for v in runner.ema.module.state_dict().values()]).tolist()


@pytest.mark.parametrize("how", ["run", "checkpoint", "file"])
def test_a_new_run_begins_with_weights(how: str, trained: SmallRunner, tmp_path: Path) -> None:
    place: Any = {"run": trained.dir, "checkpoint": f"{trained.dir}/checkpoints/best"}.get(how)
    if how == "file":
        place = str(tmp_path / "weights.pt")
        trained.save(trained.ema.module.state_dict(), place)
    runner = Watched(config(tmp_path / "second", params={"width": 4}, pretrained=place, sanity_batches=1))
    runner.train()
    best = SmallRunner.from_checkpoint(f"{trained.dir}/checkpoints/best")
    assert runner.first == (averaged(trained) if how == "file" else weights(best))
    [started] = events(runner, "run_started")
    assert started["begun_with"] == {"pretrained": place, "missing": [], "unexpected": []}
    assert (runner.steps, runner.epochs) == (8, 2), "it counts from 0"
    plain = SmallRunner(config(tmp_path / "second", params={"width": 4}))
    assert plain.id != runner.id


def test_what_fits_is_taken_and_the_rest_is_said(
    trained: SmallRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "weights.pt")
    state = {"0.weight": torch.full((4, 2), 2.0), "0.bias": torch.zeros(4), "head.weight": torch.ones(3)}
    trained.save(state, path)
    fields: dict[str, Any] = {"params": {"width": 4}, "pretrained": {"path": path, "strict": False}}
    runner = Watched(config(tmp_path / "second", **fields))
    runner.train()
    assert runner.first is not None and runner.first[:8] == [2.0] * 8
    said = capsys.readouterr().err
    assert (
        f"begins with the weights of {path}; not in it: 3.weight, 3.bias; left out of it: head.weight" in said
    )
    with pytest.raises(
        dl.ConfigError, match=r"pretrained is .*weights.pt: the weights do not fit Sequential"
    ):
        SmallRunner(config(tmp_path / "third", params={"width": 4}, pretrained=path)).train()


def test_a_new_run_begins_with_a_whole_state(trained: SmallRunner, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"params": {"width": 4}, "ema_decay": 0.5, "epoch_end": 4}
    whole = SmallRunner(config(tmp_path / "whole", **fields))
    whole.train()
    runner = Watched(config(tmp_path / "second", checkpoint=trained.dir, **fields))
    runner.train()
    assert runner.first == weights(trained) and (runner.steps, runner.epochs) == (16, 4)
    assert weights(runner) == weights(whole) and runner.results == whole.results
    assert runner.dir != trained.dir


def test_a_resume_asks_no_longer_for_what_the_run_began_with(
    trained: SmallRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pt"
    trained.save(trained.unwrap(trained.model).state_dict(), str(path))
    fields: dict[str, Any] = {"params": {"width": 4}, "pretrained": str(path), "save_interval_steps": 1}
    whole = Watched(config(tmp_path / "whole", **fields))
    whole.train()
    monkeypatch.setattr(Watched, "stops_at", 3)
    with pytest.raises(dl.RunInterrupted):
        Watched(config(tmp_path / "cut", **fields)).train()
    monkeypatch.setattr(Watched, "stops_at", None)
    path.unlink()
    resumed = Watched(config(tmp_path / "cut", **fields))
    resumed.train()
    assert weights(resumed) == weights(whole) and resumed.results == whole.results


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pretrained": "nowhere/at/all"},
            "pretrained is nowhere/at/all: there is no committed checkpoint at",
        ),
        ({"pretrained": "nowhere.pt"}, "pretrained is nowhere.pt: "),
        ({"checkpoint": "nowhere"}, "checkpoint is nowhere: there is no committed checkpoint at nowhere"),
        ({"pretrained": "a.pt", "checkpoint": "b"}, "pretrained and checkpoint are both given"),
        ({"pretrained": {"strict": False}}, "pretrained.path: is missing"),
        ({"pretrained": 3}, "pretrained: wanted a mapping of keys"),
        (
            {"pretrained": "https://user:secret@host/weights.pt"},
            "pretrained.path: .*credential|secret|password",
        ),
        (
            {"pretrained": {"path": "a.pt", "stric": True}},
            "pretrained: unknown key 'stric': did you mean 'strict'",
        ),
    ],
)
def test_what_is_not_there_is_said(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(dl.ConfigError, match=message) as raised:
        SmallRunner(config(tmp_path, **fields)).train()
    assert "user:secret" not in str(raised.value)


def test_weights_are_no_whole_state(trained: SmallRunner, tmp_path: Path) -> None:
    path = str(tmp_path / "weights.pt")
    trained.save(trained.unwrap(trained.model).state_dict(), path)
    with pytest.raises(dl.ConfigError, match="checkpoint is .*this is no checkpoint of a run"):
        SmallRunner(config(tmp_path / "second", params={"width": 4}, checkpoint=path)).train()
