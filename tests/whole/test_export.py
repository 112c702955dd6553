"""`danling export`: weights with a card of facts, and whole models, loaded again without danling."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from danling_core.checkpoints import codec
from danling_core.checkpoints.store import CheckpointStore
from danling_core.config import Config
from danling_core.errors import ConfigError
from danling_core.runs.folder import RunFolder
from danling_core.tools.export import export
from danling_core.tools.export.formats import difference
from flows.cli import main
from tests.small_runner import SmallRunner, config


class Two(nn.Module):
    """Takes a mapping and a keyword, and returns two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.layer.weight

    def forward(self, inputs: dict[str, torch.Tensor], scale: torch.Tensor) -> Any:
        hidden = self.layer(inputs["x"]) * scale[:, None]
        return hidden, self.tied(hidden)


class Calls(SmallRunner):
    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.model, self.metrics = Two(), None
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def call(self, x: torch.Tensor) -> Any:
        return self.model({"x": x}, scale=torch.ones(len(x)))[1]

    def train_step(self, data: Any) -> Any:
        prediction = self.call(data[0])
        loss = self.criterion(prediction, data[1])
        self.advance(loss)
        return prediction, loss

    def evaluate_step(self, data: Any) -> Any:
        prediction = self.call(data[0])
        return prediction, self.criterion(prediction, data[1])

    def infer_step(self, data: Any) -> Any:
        return self.call(data[0])


class ByTheBatch(nn.Linear):
    """Gives other outputs than a program of the first batch would: what it adds depends on how often it was called."""

    calls = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return super().forward(input) + type(self).calls


class Odd(SmallRunner):
    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.model = ByTheBatch(2, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)


def trained(root: Path, kind: Any = SmallRunner, **fields: Any) -> RunFolder:
    runner = kind(config(root, runner=f"{kind.__module__}:{kind.__qualname__}", **{"epoch_end": 3, **fields}))
    runner.run()
    return RunFolder(runner.dir)


def test_a_folder_has_weights_config_and_facts(tmp_path: Path) -> None:
    folder = trained(tmp_path, average={"name": "ema", "decay": 0.5})
    done = export(folder, str(tmp_path / "out"))
    assert done.files == ["README.md", "config.yaml", "model.safetensors"]
    runner = SmallRunner.from_checkpoint(f"{folder.url}/checkpoints/best")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    own = runner.unwrap(runner.model).state_dict()
    assert weights.keys() == own.keys() and all(torch.equal(weights[name], own[name]) for name in own)
    assert Config.from_yaml(str(tmp_path / "out" / "config.yaml")).runner == "tests.small_runner:SmallRunner"
    card, status = (tmp_path / "out" / "README.md").read_text(), folder.read_status()
    assert status is not None and status.id in card and status.evaluation is not None
    for fact in ("| weights | checkpoint best |", "3 epochs, ", "val loss", "torch ", "| val | loss "):
        assert fact in card, fact


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [(SmallRunner, ".pt2"), (SmallRunner, ".ts"), (SmallRunner, ".onnx"), (Calls, ".pt2"), (Calls, ".ts")],
)
def test_a_whole_model_is_loaded_again_without_its_code(tmp_path: Path, kind: Any, suffix: str) -> None:
    folder = trained(tmp_path, kind, epoch_end=1)
    file = tmp_path / f"model{suffix}"
    done = export(folder, str(file))
    assert done.files == [str(file)] and done.is_batch_free
    assert done.difference is not None and done.difference < (1e-5 if suffix == ".onnx" else 1e-9)
    runner = kind.from_checkpoint(folder.url)
    x = torch.randn(3, 2)
    call: tuple[Any, Any] = ((x,), {}) if kind is SmallRunner else (({"x": x},), {"scale": torch.ones(3)})
    if suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file))
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    else:
        again = torch.export.load(file).module() if suffix == ".pt2" else torch.jit.load(str(file))
        found = again(*call[0], **call[1])
    expected = runner.model(*call[0], **call[1])
    for one, other in zip(
        *(each if isinstance(each, tuple) else (each,) for each in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_the_mean_of_the_last_checkpoints(tmp_path: Path) -> None:
    folder = trained(tmp_path, keep_last=5, epoch_end=4)
    file = tmp_path / "mean.safetensors"
    done = export(folder, str(file), checkpoint="latest", average=3)
    store = CheckpointStore(f"{folder.url}/checkpoints")
    records = sorted(store.records(), key=lambda record: record.step)[-3:]
    assert [record.name in done.weights for record in records] == [True] * 3
    states = [codec.load_state(store, record)["model"] for record in records]
    for name, weight in load_file(file).items():
        mean = torch.stack([state[name].double() for state in states]).mean(0)
        assert torch.equal(weight, mean.float()), name
    with pytest.raises(ConfigError, match="keep_last=9"):
        export(folder, str(file), average=9)


def test_a_model_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    folder = trained(tmp_path, Odd, epoch_end=1)
    for suffix in (".pt2", ".ts"):
        with pytest.raises(ConfigError, match="depends on more than its inputs|cannot be written"):
            export(folder, str(tmp_path / f"model{suffix}"))
        assert not (tmp_path / f"model{suffix}").exists()
    with pytest.raises(ConfigError, match=r"\.safetensors, \.pt2"):
        export(folder, str(tmp_path / "model.pkl"))


def test_outputs_that_differ_in_shape_or_are_nan_are_not_the_same() -> None:
    one, call = nn.Linear(2, 3), ((torch.ones(4, 2),), {})
    assert difference(one, one, call) == 0.0
    assert difference(one, lambda x: one(x) * float("nan"), call) == math.inf
    assert difference(one, lambda x: one(x)[:, :1], call) == math.inf
    assert 0 < difference(one, lambda x: one(x) * 1.001, call) < 0.01


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained(tmp_path, epoch_end=1)
    words = ["export", folder.url, "--out"]
    assert main([*words, str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert f"{tmp_path}/out/model.safetensors" in told and "checkpoint best of" in told
    assert main([*words, str(tmp_path / "model.pt2")]) == 0
    assert "loaded again: the same outputs" in capsys.readouterr().out
    for more, message in (
        (["--average", "0"], "wanted 1 or more"),
        (["--checkpoint", "epoch-7"], "epoch-7"),
        (["--average", "7"], "keep_last=7"),
    ):
        assert main([*words, str(tmp_path / "bad"), *more]) in (1, 2)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
