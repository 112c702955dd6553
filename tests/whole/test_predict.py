"""`danling predict`: in data set order, in three formats, bounded, and nothing of the run is touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from pyarrow import parquet

import danling_core as dl
from danling_core.runner.objects import load_object
from danling_core.tools.predict import predict
from tests.small_runner import SmallRunner, config
from tests.whole_runs import ROOT


class Several(SmallRunner):
    """Returns more than one output."""

    def infer_step(self, data: Any) -> Any:
        prediction = super().infer_step(data)
        return {"logits": prediction, "label": prediction.argmax(-1), "half": prediction.bfloat16()}


class Uneven(SmallRunner):
    def infer_step(self, data: Any) -> Any:
        prediction = super().infer_step(data)
        return prediction[:, : len(prediction)]


class Nothing(SmallRunner):
    def infer_step(self, data: Any) -> Any:
        return "text"


def trained(tmp_path: Path, cls: type[SmallRunner] = SmallRunner) -> SmallRunner:
    runner = cls(config(tmp_path / "runs", params={"val_samples": 13}))
    runner.train()
    return runner


def files(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def expected(runner: SmallRunner) -> torch.Tensor:
    best = SmallRunner.from_checkpoint(f"{runner.dir}/checkpoints/best")
    return best.unwrap(best.model)(torch.stack([x for x, _ in runner.datasets["val"]])).detach()


def test_one_array_in_the_order_of_the_data(tmp_path: Path) -> None:
    runner = trained(tmp_path)
    wanted, before = expected(runner), files(tmp_path / "runs")
    out = tmp_path / "out" / "val.npy"
    assert predict(f"{runner.dir}/checkpoints/best", "val", str(out)) == 13
    found = numpy.load(out)
    assert found.shape == (13, 2) and numpy.allclose(found, wanted.numpy(), atol=1e-6)
    assert files(tmp_path / "runs") == before, "the run is as it was"
    assert predict(runner.dir, "val", "memory://predictions/val.npy", ["limit_batches.val=1"]) == 5
    assert load_object("memory://predictions/val.npy").shape == (5, 2)


def test_predictions_may_be_left_early(tmp_path: Path) -> None:
    runner = trained(tmp_path)
    before = files(tmp_path / "runs")
    for output in runner.predictions("val"):
        assert output.shape == (5, 2)
        break
    again = SmallRunner(config(tmp_path / "runs", params={"val_samples": 13}))
    assert again.train() == runner.results and files(tmp_path / "runs").keys() == before.keys()
    assert len(runner.infer("val")) == 13


def test_several_outputs_by_name(tmp_path: Path) -> None:
    runner = trained(tmp_path, Several)
    wanted, place = expected(runner), f"{runner.dir}/checkpoints/best"
    predict(place, "val", str(tmp_path / "val.safetensors"), ["dataloader.batch_size=3"])
    found = load_object(tmp_path / "val.safetensors")
    torch.testing.assert_close(found["logits"], wanted, atol=1e-6, rtol=0)
    assert torch.equal(found["label"], wanted.argmax(-1)) and found["half"].dtype is torch.bfloat16
    predict(place, "val", str(tmp_path / "val.parquet"))
    table = parquet.read_table(tmp_path / "val.parquet")
    assert table.column_names == ["logits", "label", "half"] and table.num_rows == 13
    assert table["label"].to_pylist() == wanted.argmax(-1).tolist()
    assert numpy.allclose(table["logits"].to_pylist(), wanted.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("cls", "split", "file", "message"),
    [
        (SmallRunner, "val", "a.txt", "predictions are written as .npy, .safetensors, .parquet"),
        (SmallRunner, "vall", "a.npy", "split 'vall' has no data: the runner has"),
        (Several, "val", "a.npy", "npy holds one array, and infer_step returns logits, label, half"),
        (Uneven, "val", "a.npy", "'prediction' has rows of shape .* pad them in infer_step"),
        (Nothing, "val", "a.npy", "infer_step returned a str, wanted a tensor with a row for each sample"),
    ],
)
def test_what_cannot_be_written_is_said_and_nothing_is(
    cls: type[SmallRunner], split: str, file: str, message: str, tmp_path: Path
) -> None:
    if cls is Uneven:
        runner = cls(config(tmp_path / "runs", params={"val_samples": 6}))  # batches of 5 and 1
        runner.train()
    else:
        runner = trained(tmp_path, cls)
    with pytest.raises(dl.ConfigError, match=message):
        predict(f"{runner.dir}/checkpoints/best", split, str(tmp_path / file))
    assert not (tmp_path / file).exists()


def test_the_command(tmp_path: Path) -> None:
    runner = trained(tmp_path)
    words = ["predict", runner.id[:8], "--root", str(tmp_path / "runs"), "--split", "val", "--out"]

    def danling(*more: str) -> Any:
        command = [sys.executable, "-m", "flows.cli", *words, *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)

    done = danling(str(tmp_path / "val.npy"), "--checkpoint", "latest")
    assert done.returncode == 0 and "13 prediction(s) for split 'val'" in done.stdout, done.stderr
    assert numpy.load(tmp_path / "val.npy").shape == (13, 2)
    done = danling(str(tmp_path / "other.npy"), "--checkpoint", "epoch-9")
    assert done.returncode != 0 and "Traceback" not in done.stderr and "epoch-9" in done.stderr
