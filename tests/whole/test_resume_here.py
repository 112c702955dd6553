"""Real processes for what tests/unit/test_resume_here.py tries without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from danling_core.errors import RunInterrupted
from danling_core.runs.folder import RunFolder
from danling_core.tools.verify import verify
from flows.cli import main
from tests.marks import rarely
from tests.ranks import Ranks
from tests.small_runner import config, events
from tests.unit.test_resume_here import Stopped, Tempered

ROOT = Path(__file__).parents[2]


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


class Counted(Stopped):
    """Has data that no generator makes: its bits would depend on the CPU, too."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        inputs = torch.arange(40.0).reshape(20, 2) % 7 / 8
        self.datasets = {
            name: TensorDataset(inputs, (inputs[:, 0] > 0.4).long()) for name in ("train", "val")
        }


@pytest.mark.parametrize("capability", rarely(["default", "native"]))
def test_a_resume_on_another_kind_of_cpu_is_not_bitwise_and_verify_says_why(
    tmp_path: Path, capability: str, capsys: pytest.CaptureFixture[str]
) -> None:
    native = torch.backends.cpu.get_cpu_capability()
    if native == "DEFAULT":
        pytest.skip("torch knows no capability of this CPU beyond DEFAULT, so that none can be taken away")
    first = Counted(config(tmp_path))
    first.stop_in = ("train", 5)
    with pytest.raises(RunInterrupted):
        first.train()
    code = (
        f"import torch\ntorch.set_num_threads({torch.get_num_threads()})\n"
        "from tests.small_runner import config\nfrom tests.whole.test_resume_here import Counted\n"
        f"Counted(config({str(tmp_path)!r})).train()\n"
    )
    chosen = {"ATEN_CPU_CAPABILITY": "default"} if capability == "default" else {}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **chosen},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    reason = f"CPU capability was {native} and is DEFAULT" if capability == "default" else None
    status = RunFolder(first.dir).read_status()
    assert status is not None and status.is_complete
    assert (status.bitwise, status.not_bitwise) == (reason is None, reason)
    began = [event["environment"]["CPU capability"] for event in events(first, "run_started")]
    assert began == [native, native if reason is None else "DEFAULT"]
    report = verify(first.dir)
    assert report.is_good and report.not_bitwise == reason
    assert main(["verify", first.dir]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not bitwise")]
    assert said == ([] if reason is None else [f"not bitwise: {reason}"])
