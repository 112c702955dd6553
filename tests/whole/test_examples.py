"""Real processes for what tests/unit/test_examples.py tries without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from danling_core.config import Config
from examples.digits import CNNRunner, MLPRunner
from tests.marks import rarely
from tests.unit.test_examples import DIGITS


@pytest.mark.holds("system-2")
@pytest.mark.parametrize(
    ("name", "runner", "least"), [("mlp.yaml", MLPRunner, 0.94), *rarely([("run.yaml", CNNRunner, 0.98)])]
)
def test_the_best_checkpoint_is_right_on_test_digits(
    name: str, runner: type, least: float, tmp_path: Path
) -> None:
    overrides = [
        "nproc_per_node=1",
        "params.lr=0.003",
        "dataloader.batch_size=64",
        f"project_root={tmp_path}",
    ]
    trained = runner(Config.load(str(DIGITS / name), [*overrides, "tensorboard=false"]))
    status = trained.run()
    assert status.evaluation["test"]["accuracy"] >= least
