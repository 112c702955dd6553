"""Real processes for what tests/unit/test_metric_states.py tries without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankFailed, Ranks
from tests.small_runner import config
from tests.unit.test_metric_states import Hits
from tests.unit.test_resume_here import Stopped


class SelfReduced(Hits):
    reduces_itself = True


def judged(root: str, metric: Any) -> Any:
    runner = Stopped(config(root))
    runner.metrics = metric
    return runner.evaluate("val")["val"]


def test_a_metric_that_would_report_one_ranks_part_is_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="how does a Hits reduce over ranks.*Additive.*torchmetrics"):
        two_ranks.run(judged, str(tmp_path), Hits())
    assert all("self_reduced" in found for found in two_ranks.run(judged, str(tmp_path), SelfReduced()))
