"""Real processes for what tests/unit/test_optim.py tries without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Ranks
from tests.small_runner import SmallRunner, config


class Scaled(SmallRunner):
    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.lr = self.scale_lr(0.1, batch_size_base=10)


def scaled(root: str) -> float:
    return Scaled(config(root, accum_steps=3, dataloader={"batch_size": 10})).lr


@pytest.mark.holds("methods-6")
def test_scale_lr_returns_the_rate_in_a_runners_init(two_ranks: Ranks, tmp_path: Path) -> None:
    assert scaled(str(tmp_path)) == pytest.approx(0.3)
    assert two_ranks.run(scaled, str(tmp_path)) == pytest.approx([0.6, 0.6])
    assert SmallRunner(config(tmp_path)).scale_lr(0.1, lr_scale_factor=4) == pytest.approx(0.4)
