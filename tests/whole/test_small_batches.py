"""Real processes for what tests/unit/test_small_batches.py tries without them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankFailed, Ranks
from tests.small_runner import SmallRunner, config, train, weights
from tests.unit.test_small_batches import NORM


def test_a_share_of_one_is_explained_on_several_ranks(two_ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"a batch of 1 on rank \d.*drop_last"):
        two_ranks.run(train, str(tmp_path), params={**NORM, "samples": 22})


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
