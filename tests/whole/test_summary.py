"""`danling summary`: counts, shapes and memory are those of the model, and nothing is left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import danling_core as dl
from danling_core.tools.summary import summarise
from tests.small_runner import SmallRunner, config
from tests.whole_runs import ROOT


class Frozen(SmallRunner):
    """Its first layer is frozen."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model[0].requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], amsgrad=True
        )


class NoModel(SmallRunner):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = None


def test_modules_shapes_and_memory(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    fields: dict[str, Any] = {"params": {"width": 6, "batch_norm": True}, "ema_decay": 0.5, "compile": True}
    wanted = config(tmp_path / "runs", runner="tests.whole.test_summary:Frozen", **fields)
    file.write_text(wanted.jsons())
    found = summarise(str(file))
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["(model)", "0", "1", "2", "3", "4"]
    assert (rows["0"].kind, rows["0"].inputs, rows["0"].output) == ("Linear", "[5, 2]", "[5, 6]")
    assert (rows["0"].parameters, rows["0"].trainable) == (18, 0)
    assert (found.parameters, found.trainable) == (18 + 12 + 14, 26)
    assert found.memory == {
        "parameters": 44 * 4,
        "buffers": 2 * 6 * 4 + 8,
        "gradients": 26 * 4,
        "optimizer": 3 * 26 * 4,  # amsgrad keeps a third
        "average": 44 * 4 + 2 * 6 * 4 + 8,
    }
    assert not (tmp_path / "runs").exists(), "nothing is left"
    assert summarise(str(file), ["params.width=12"]).parameters > found.parameters


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(config(tmp_path / "runs", runner="tests.small_runner:SmallRunner").jsons())

    def danling(*words: str) -> Any:
        command = [sys.executable, "-m", "flows.cli", "summary", str(file), *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)

    done = danling("params.width=4")
    assert (
        done.returncode == 0 and "[5, 2]" in done.stdout and "22 parameters, 0 of them frozen" in done.stdout
    )
    done = danling("params.widht=4")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "widht" in done.stderr


def test_a_runner_without_a_model_is_told(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(config(tmp_path / "runs", runner="tests.whole.test_summary:NoModel").jsons())
    with pytest.raises(dl.ConfigError, match="sets no model"):
        summarise(str(file))
