"""Real processes for what tests/unit/test_runner_progress.py tries without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Ranks
from tests.small_runner import trained


@pytest.mark.holds("attributes-6")
@pytest.mark.parametrize("fields", [{"iter_end": 9, "accum_steps": 2}, {"step_end": 5}, {"epoch_end": 2}])
def test_each_end_drives_the_loop_on_two_ranks(
    fields: dict[str, Any], two_ranks: Ranks, tmp_path: Path
) -> None:
    first, second = two_ranks.run(trained, str(tmp_path), params={"samples": 38}, **fields)
    alone = trained(str(tmp_path / "alone"), params={"samples": 18}, **fields)
    assert first["counters"] == second["counters"] == alone["counters"]
    assert first["ends"] == second["ends"] == alone["ends"]
