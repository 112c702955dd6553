"""Real processes for what tests/unit/test_resume_here.py tries without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.ranks import Ranks
from tests.small_runner import config
from tests.unit.test_resume_here import Tempered


class Fixed(Tempered):
    is_trained = False


def trained_with_criterion(root: str, runner_class: type[Tempered]) -> Any:
    runner = runner_class(
        config(root, epoch_end=1, dataloader={"batch_size": 5, "train": {"shuffle": False}})
    )
    runner.train()
    criterion = runner.unwrap(runner.criterion)
    return criterion.scale.item(), criterion.seen.item(), runner.results[0]["train"]["loss"]


def test_a_criterion_that_trains_is_reduced_over_the_ranks(two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(trained_with_criterion, str(tmp_path), Tempered)
    assert first == second and first[0] != 1.0
    fixed = two_ranks.run(trained_with_criterion, str(tmp_path / "fixed"), Fixed)
    assert fixed[0][0] == fixed[1][0] == 1.0
