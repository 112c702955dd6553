"""Real processes for what tests/unit/test_charlm.py tries without them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_charlm import ROOT, RUN, TINY, only_run
from tests.whole_runs import Ended

STATED_LOSS = 1.65  # nats per character, as the README says


def two_ranks(
    root: Path, *overrides: str, timeout_seconds: float = 100, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The example's run under torchrun, on two ranks of gloo."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [
            sys.executable,
            *torchrun,
            "-m",
            "danling_core.worker",
            str(RUN),
            *overrides,
            f"project_root={root}",
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )


# two ranks
@pytest.mark.long
@pytest.mark.timeout(300)  # three launches
def test_an_interrupted_run_on_two_ranks_ends_with_the_same_bits(tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    done = two_ranks(straight, *TINY)
    assert done.returncode == 0, done.stderr
    two_ranks(stopped, *TINY, SIGTERM_AT_STEP="7")
    status = json.loads((only_run(stopped) / "status.json").read_text())
    assert status["status"] == "interrupted" and status["steps"] in (8, 9)
    done = two_ranks(stopped, *TINY)
    assert done.returncode == 0, done.stderr
    status = json.loads((only_run(stopped) / "status.json").read_text())
    assert (status["status"], status["steps"], status["epochs"]) == ("complete", 14, 2)
    results = json.loads((only_run(stopped) / "results.json").read_text())
    assert list(results["results"]) == ["5", "10", "14"]
    Ended(only_run(straight), None).must_equal(Ended(only_run(stopped), None))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_example_reaches_its_stated_loss(tmp_path: Path) -> None:
    done = two_ranks(tmp_path, timeout_seconds=850)
    assert done.returncode == 0, done.stderr
    status = json.loads((only_run(tmp_path) / "status.json").read_text())
    assert status["status"] == "complete"
    assert status["best_score"] <= STATED_LOSS
