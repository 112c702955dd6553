"""The last batch of a pass, where some rank has one sample or none, and steps that are skipped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from danling_core.errors import ConfigError
from tests.small_runner import SmallRunner, config

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


def test_a_skipped_step_leaves_no_nan_in_the_statistics_of_batch_norm(tmp_path: Path) -> None:
    params = {**NORM, "nan_at_step": 3}
    runner = SmallRunner(config(tmp_path, non_finite="skip", params=params))
    runner.train()
    assert all(torch.isfinite(buffer).all() for buffer in runner.model.buffers())
    assert int(runner.model[1].num_batches_tracked) == 7
    assert math.isfinite(runner.results[1]["val"]["loss"])
