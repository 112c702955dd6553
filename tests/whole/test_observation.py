"""Real processes for what tests/unit/test_observation.py tries without them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import main
from tests.prefect_fixtures import PrefectServer


@pytest.mark.long
def test_a_run_in_step_mode_is_told_in_steps_to_people_and_to_prefect(
    prefect_server: PrefectServer,
    toy_config: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ends = {"epoch_end": None, "step_end": 10, "evaluate_interval_steps": 4}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(toy_config(**ends, run_name="by-steps", progress_bar=False)))
    assert main(["run", str(file)]) == 0
    printed = capsys.readouterr()
    lines = [
        line.partition(" |")[0] for line in printed.out.splitlines() if line.startswith(("epoch", "step"))
    ]
    assert lines == ["step  4/10", "step  8/10", "step 10/10"]
    assert "repeated" not in printed.err
    wanted, names, deadline = {"step-4", "step-8", "step-10"}, set(), time.monotonic() + 30
    while not wanted <= names and time.monotonic() < deadline:  # the server takes them up in its own time
        with prefect_server.client() as client:
            names = {task.name for task in client.read_task_runs(limit=200)}
    assert wanted <= names
