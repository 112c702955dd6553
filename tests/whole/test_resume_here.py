"""Real processes for what tests/unit/test_resume_here.py tries without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankFailed, Ranks
from tests.small_runner import config
from tests.unit.test_resume_here import Tempered


class Fixed(Tempered):
    is_trained = False


def trained_with_criterion(root: str, runner_class: type[Tempered]) -> Any:
    runner = runner_class(config(root))
    runner.train()
    return runner.criterion.seen.item()


def test_a_criterion_that_trains_is_refused_on_several_ranks(two_ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="Criterion has parameters to train.*a part of the model"):
        two_ranks.run(trained_with_criterion, str(tmp_path), Tempered)
    assert len(two_ranks.run(trained_with_criterion, str(tmp_path), Fixed)) == 2
