"""The last batch of a pass, where some rank has one sample or none, and steps that are skipped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from danling_core.errors import ConfigError
from tests.ranks import RankFailed, Ranks
from tests.small_runner import SmallRunner, config, train, weights

NORM: dict[str, Any] = {"width": 4, "batch_norm": True}


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_batch_of_one_is_warned_of_and_explained_when_it_meets_batch_norm(
    tmp_path: Path, drop_last: bool
) -> None:
    loader = {"batch_size": 5, "train": {"drop_last": drop_last}}
    runner = SmallRunner(config(tmp_path, params={**NORM, "samples": 21}, dataloader=loader))
    if drop_last:
        runner.train()
    else:
        with pytest.raises(ConfigError, match=r"a batch of 1 on rank 0.*dataloader.train.drop_last=true"):
            runner.train()
        assert runner.steps == 4
    log = Path(runner.dir, "run.log").read_text()
    assert ("21 samples in batches of 5 on 1 rank(s) leave some rank one sample" in log) is not drop_last


def test_a_share_of_one_is_explained_on_several_ranks(two_ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"a batch of 1 on rank \d.*drop_last"):
        two_ranks.run(train, str(tmp_path), params={**NORM, "samples": 22})


class OverLength(SmallRunner):
    """Normalizes each channel over the samples and a length of 2, so that one sample will do."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        head = torch.nn.Linear(2, 2)
        self.model = torch.nn.Sequential(
            torch.nn.Unflatten(1, (1, 2)), torch.nn.BatchNorm1d(1), torch.nn.Flatten(), head
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)


def test_batch_norm_over_a_length_takes_batches_of_one(tmp_path: Path) -> None:
    runner = OverLength(config(tmp_path, dataloader={"batch_size": 1}))
    runner.train()
    assert runner.steps == 40


def test_batch_norm_that_does_not_train_takes_batches_of_one(tmp_path: Path) -> None:
    class Frozen(SmallRunner):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            self.model[1].train = lambda mode=True: self.model[1]
            self.model[1].training = False

    runner = Frozen(config(tmp_path, params={**NORM, "samples": 21}))
    runner.train()
    assert runner.steps == 10


class Dummy(SmallRunner):
    """A rank without a sample computes a loss whose gradient is not finite."""

    is_wild = True

    def train_step(self, data: Any) -> Any:
        pred = self.model(data[0])
        loss = self.criterion(pred, data[1])
        if self.current_step.count == 0 and self.is_wild:
            loss = loss + (pred.sum() * 0).sqrt()
        self.advance(loss)
        return pred, loss


class Tame(Dummy):
    is_wild = False


def dummies(root: str, runner_class: type[Dummy], **fields: Any) -> list[float]:
    runner = runner_class(config(root, params={"samples": 21}, **fields))
    runner.train()
    return weights(runner)


@pytest.mark.parametrize("accum_steps", [1, 3])
def test_a_batch_that_only_keeps_a_rank_in_step_adds_nothing_whatever_its_gradient(
    accum_steps: int, two_ranks: Ranks, tmp_path: Path
) -> None:
    wild = two_ranks.run(dummies, str(tmp_path / "wild"), Dummy, accum_steps=accum_steps)
    tame = two_ranks.run(dummies, str(tmp_path / "tame"), Tame, accum_steps=accum_steps)
    assert wild == tame and all(math.isfinite(weight) for weight in wild[0])


def test_a_skipped_step_leaves_no_nan_in_the_statistics_of_batch_norm(tmp_path: Path) -> None:
    params = {**NORM, "nan_at_step": 3}
    runner = SmallRunner(config(tmp_path, non_finite="skip", params=params))
    runner.train()
    assert all(torch.isfinite(buffer).all() for buffer in runner.model.buffers())
    assert int(runner.model[1].num_batches_tracked) == 7
    assert math.isfinite(runner.results[1]["val"]["loss"])
