"""The language model: step mode on a stream with accumulation, bf16 and EMA, resumed bit for bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import danling_core as dl
from danling_core.config import Config
from examples.charlm import CharLMRunner
from examples.charlm.data import VOCABULARY, TextStream, blocks, encoded, manual, split
from examples.charlm.model import TinyGPT
from tests.whole_runs import Ended

ROOT = Path(__file__).parents[2]
RUN = ROOT / "examples" / "charlm" / "run.yaml"
TINY = [
    "runner=tests.unit.test_charlm:ShortText",
    "experiment_id=" + "a" * 40,  # the checkout may change between two attempts
    "params.width=16",
    "params.depth=1",
    "params.heads=2",
    "params.block=16",
    "params.buffer=20",
    "params.dropout=0.1",
    "dataloader.batch_size=4",
    "step_end=14",
    "evaluate_interval_steps=5",
    "save_interval_steps=3",
    "log_interval=3",
    "scheduler.warmup_steps=3",
    "ema_decay=0.5",
    "tensorboard=false",
]


class ShortText(CharLMRunner):
    """On 1500 characters, so that a pass is 93 blocks: five full windows of 4 x 2 x 2, and one of 13.

    The environment may name a step in which the last rank gets a SIGTERM, or dies.
    """

    def __init__(self, config: dl.Config) -> None:
        super().__init__(config)
        text, params = self.datasets["train"].text, self.params
        self.datasets["train"] = TextStream(text[:1510], params.block, params.buffer)
        self.datasets["val"] = blocks(text[1510:3510], params.block)

    def train_step(self, data: Any) -> tuple[Any, Tensor]:
        if self.rank == self.world_size - 1:
            if os.environ.get("SIGTERM_AT_STEP") == str(self.steps):
                os.kill(os.getpid(), signal.SIGTERM)
            if os.environ.get("CRASH_AT_STEP") == str(self.steps):
                raise OSError("a crash, as asked")
        return super().train_step(data)


def tiny(root: Path, *overrides: str) -> Config:
    return Config.load(str(RUN), [*TINY, f"project_root={root}", "nproc_per_node=1", *overrides])


def only_run(root: Path) -> Path:
    """The folder of the one run under `root`."""
    (status,) = root.glob("*/*/status.json")
    return status.parent


# the text
def test_the_text_is_long_and_has_no_paragraph_twice() -> None:
    text = manual()
    assert len(text) > 300_000
    assert set(text) <= set(VOCABULARY)
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    long = [part for part in paragraphs if len(part) > 60]
    assert len(set(long)) > 0.99 * len(long)  # the rest differed in characters that are left out


def test_the_end_of_the_text_is_kept_for_validation() -> None:
    train, val = split()
    assert torch.equal(torch.cat([train, val]), encoded(manual()))
    assert 0.09 < len(val) / (len(train) + len(val)) < 0.11


def test_a_pass_of_the_stream_reads_all_blocks_once_in_another_order() -> None:
    text = torch.arange(1000)
    stream = TextStream(text, block=10, buffer=16)
    torch.manual_seed(0)
    first = list(stream)
    starts = [int(inputs[0]) for inputs, _ in first]
    assert len(first) in (98, 99)
    assert sorted(starts) == list(range(min(starts), min(starts) + 10 * len(first), 10)) != starts
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in first)
    torch.manual_seed(0)
    assert [int(inputs[0]) for inputs, _ in stream] == starts
    assert [int(inputs[0]) for inputs, _ in stream] != starts


def test_validation_blocks_hold_every_character_once() -> None:
    inputs, targets = blocks(torch.arange(105), 10)
    assert torch.equal(inputs.flatten(), torch.arange(100))
    assert torch.equal(targets.flatten(), torch.arange(1, 101))


def test_the_model_sees_no_character_to_come() -> None:
    torch.manual_seed(0)
    model = TinyGPT(len(VOCABULARY), block=8, width=16, depth=2, heads=2, dropout=0.0).eval()
    indices = torch.randint(len(VOCABULARY), (1, 8))
    changed = indices.clone()
    changed[0, 5:] = 0
    assert torch.equal(model(indices)[0, :5], model(changed)[0, :5])
    assert not torch.equal(model(indices)[0, 5:], model(changed)[0, 5:])


# one rank
def test_one_rank_reports_by_completed_steps_and_learns(tmp_path: Path) -> None:
    runner = ShortText(tiny(tmp_path, "step_end=26", "evaluate_interval_steps=10", "ema_decay=0.2"))
    results = runner.train()
    assert list(results) == [10, 20, 26]
    assert (runner.steps, runner.progress) == (26, 1.0)
    assert runner.epochs == 26 // 12  # 93 blocks, in windows of 4 x 2
    assert results[26]["val"]["loss"] < results[10]["val"]["loss"] < 4.56  # of a guess: the logarithm of 96
    assert results[26]["train"]["loss"] < results[10]["train"]["loss"]


def test_accumulation_over_a_stream_is_one_large_batch(tmp_path: Path) -> None:
    options = ["params.dropout=0", "precision=fp32"]
    whole = ShortText(tiny(tmp_path / "1", *options, "accum_steps=1", "dataloader.batch_size=16")).train()
    parts = ShortText(tiny(tmp_path / "4", *options, "accum_steps=4", "dataloader.batch_size=4")).train()
    assert list(whole) == list(parts) == [5, 10, 14]
    for index in whole:
        for name in ("train", "val"):
            assert parts[index][name]["loss"] == pytest.approx(whole[index][name]["loss"], rel=1e-4)


def test_after_a_crash_the_run_goes_on_from_the_last_saved_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, crashed = tmp_path / "straight", tmp_path / "crashed"
    ShortText(tiny(straight)).run()
    monkeypatch.setenv("CRASH_AT_STEP", "8")
    with pytest.raises(OSError, match="as asked"):
        ShortText(tiny(crashed)).run()
    monkeypatch.delenv("CRASH_AT_STEP")
    ShortText(tiny(crashed)).run()
    events = [json.loads(line) for line in (only_run(crashed) / "events.jsonl").read_text().splitlines()]
    (resumed,) = [event["resumed"] for event in events if event.get("resumed")]
    assert resumed["step"] in (5, 6)  # 6 is given up where the disk is still busy with 5
    Ended(only_run(straight), None).must_equal(Ended(only_run(crashed), None))
