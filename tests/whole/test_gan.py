"""Two optimizers, two ranks, fp16 and accumulation: killed at ten moments, and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from danling_core.launch.client import Launcher
from danling_core.tools.reproduce import reproduce
from tests.whole_runs import ROOT, Ended, config, fault, launch

MOMENTS: list[tuple[str, int, int]] = [
    ("train", 0, 0),
    ("train", 4, 1),
    ("train", 11, 0),
    ("between", 2, 1),
    ("between", 9, 0),
    ("after", 5, 0),
    ("after", 14, 1),
    ("evaluate", 5, 0),
    ("evaluate", 10, 1),
    ("epoch_finished", 10, 0),
]


def wanted(root: Path) -> Any:
    return config(
        root,
        runner="tests.faulty_gan:FaultyGAN",
        score_name="loss",
        precision="fp16",
        accum_steps=2,
        clip_grad_norm=1.0,
        dataloader={"batch_size": 64},
        optim=None,
        save_interval=1,
    )


@pytest.fixture(scope="module")
def peace(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    ended = launch(launcher, wanted(tmp_path_factory.mktemp("peace")))
    assert ended.outcome is not None and ended.outcome.status == "complete", ended.outcome
    assert ended.status.steps == 15
    return ended


@pytest.mark.long
@pytest.mark.parametrize(("place", "step", "rank"), MOMENTS)
def test_a_gan_that_is_killed_anywhere_has_the_same_bits(
    launcher: Launcher, peace: Ended, tmp_path: Path, place: str, step: int, rank: int
) -> None:
    with fault("SIGKILL", step, rank=rank, place=place):
        ended = launch(launcher, wanted(tmp_path))
    assert ended.outcome is not None and ended.outcome.status == "complete", ended.outcome
    assert ended.outcome.restarts == 1 and ended.status.bitwise
    ended.must_equal(peace)


@pytest.mark.long
@pytest.mark.parametrize("epoch", [0, 2])
def test_an_epoch_of_a_gan_is_replayed_identically(launcher: Launcher, peace: Ended, epoch: int) -> None:
    report = reproduce(str(peace.path), epoch, launcher=launcher, cwd=ROOT)
    assert report.is_identical and len(report.compared) >= 2, str(report)
