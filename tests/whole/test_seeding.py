"""Real processes for what tests/unit/test_seeding.py tries without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Ranks
from tests.small_runner import SmallRunner, config, weights
from tests.unit.test_seeding import Built, draws


def seeds(root: str) -> dict[str, Any]:
    runner = SmallRunner(config(root, seed=7))
    return {
        "default": runner.set_seed(),
        "stated": runner.set_seed(100),
        "zero": runner.set_seed(0, bias=False),
        "off": runner.set_seed(bias=False),
        "own": runner.set_seed(1, bias=10),
        "draw": (runner.set_seed(), draws()[2])[1],
    }


@pytest.mark.holds("methods-5")
def test_set_seed_returns_its_value_with_the_bias_of_the_rank(two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(seeds, str(tmp_path))
    names = ("default", "stated", "zero", "off", "own")
    assert [first[name] for name in names] == [7, 100, 0, 7, 11]
    assert [second[name] for name in names] == [8, 101, 0, 7, 11]
    assert first["draw"] != second["draw"]


def initial(root: str) -> list[list[float]]:
    runner = Built(config(root, epoch_end=1))
    before = weights(runner)
    runner.train()
    return [before, weights(runner)]


@pytest.mark.holds("methods-5")
def test_ranks_build_different_weights_and_train_equal_ones(two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(initial, str(tmp_path))
    assert first[0] != second[0]
    assert first[1] == second[1]
    alone = weights(Built(config(tmp_path)))
    assert first[0] == alone
