"""Compiled models, activations that are computed again, and the precision of products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import danling_core as dl
from tests.marks import rarely
from tests.small_runner import SmallRunner, config, weights

WIDE: dict[str, Any] = {"params": {"width": 4, "dropout": 0.0}, "epoch_end": 1}


@pytest.mark.parametrize(
    "compile",
    [
        {"backend": "eager", "modules": ["Linear"]},
        *rarely([{"backend": "eager"}]),
        *rarely([{"backend": "eager", "modules": ["0", "[1-3]"], "dynamic": True, "fullgraph": True}]),
    ],
)
def test_a_compiled_model_trains_as_it_is(compile: Any, tmp_path: Path) -> None:
    plain, compiled = (
        SmallRunner(config(tmp_path, **WIDE)),
        SmallRunner(config(tmp_path, compile=compile, **WIDE)),
    )
    plain.train()
    compiled.train()
    assert weights(compiled) == weights(plain) and compiled.results == plain.results
    assert list(compiled.state_dict()["model"]) == list(plain.state_dict()["model"])
    assert compiled.id != plain.id
    is_whole = isinstance(compiled.model, torch._dynamo.OptimizedModule)
    assert is_whole == ("modules" not in compile)
    linear = compiled.unwrap(compiled.model)[0]
    assert (linear._compiled_call_impl is not None) == ("modules" in compile)


def test_a_section_without_keys_is_another_run(tmp_path: Path) -> None:
    ids = {
        SmallRunner(config(tmp_path, **fields)).id
        for fields in ({}, {"compile": True}, {"compile": {}}, {"average": {}}, {"average": {"decay": 0.5}})
    }
    assert len(ids) == 5


def test_arguments_reach_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def compile_(module: nn.Module, **options: Any) -> nn.Module:
        asked.append(options)
        return torch._dynamo.OptimizedModule(module, lambda function: function)

    monkeypatch.setattr(torch, "compile", compile_)
    SmallRunner(config(tmp_path, compile={"mode": "max-autotune", "fullgraph": True}, epoch_end=1)).train()
    SmallRunner(config(tmp_path, compile={"options": {"max_autotune": True}}, epoch_end=1)).train()
    SmallRunner(config(tmp_path, compile=False, epoch_end=1)).train()
    assert asked == [{"mode": "max-autotune", "fullgraph": True}, {"options": {"max_autotune": True}}]


def test_activations_are_computed_again(tmp_path: Path) -> None:
    calls: list[bool] = []

    class Counting(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            return super().forward(input)

    class Deep(SmallRunner):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            torch.manual_seed(0)
            self.model = nn.Sequential(Counting(2, 8), nn.Dropout(0.3), nn.Sequential(Counting(8, 2)))
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    plain = Deep(config(tmp_path, epoch_end=1))
    plain.train()
    before, evaluated = calls.count(True), calls.count(False)
    calls.clear()
    again = Deep(config(tmp_path, epoch_end=1, ema_decay=0.5, activation_checkpointing=["Counting", "1"]))
    again.train()
    assert calls.count(True) == 2 * before and calls.count(False) == evaluated
    assert weights(again) == weights(plain), "dropout draws the same again"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compile": "yes, please"}, "compile: wanted true or false, found 'yes, please'"),
        ({"compile": {"mod": "default"}}, "compile: unknown key 'mod': did you mean 'mode'"),
        ({"compile": {"fullgraph": 7}}, "compile.fullgraph: wanted true or false, found 7"),
        ({"compile": {"mode": "fast"}}, "compile: mode is 'fast', wanted one of default, reduce-overhead"),
        ({"compile": {"mode": "default", "options": {}}}, "compile: mode and options are both given"),
        ({"compile": {"backend": "inductr"}}, "compile.backend is 'inductr'.*did you mean 'inductor'"),
        (
            {"compile": {"modules": ["Linea"]}},
            "compile.modules: 'Linea' names no module.*did you mean 'Linear'",
        ),
        (
            {"activation_checkpointing": ["blocks.*"]},
            r"activation_checkpointing: 'blocks.\*' names no module",
        ),
        (
            {"float32_matmul_precision": "low"},
            "float32_matmul_precision: wanted 'highest', 'high' or 'medium'",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(dl.ConfigError, match=message):
        SmallRunner(config(tmp_path, **{**WIDE, **fields})).train()


def test_the_precision_of_products_is_set(tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        SmallRunner(config(tmp_path, float32_matmul_precision="high"))
        assert torch.get_float32_matmul_precision() == "high"
        SmallRunner(config(tmp_path))
        assert torch.get_float32_matmul_precision() == "high", "null leaves it as it is"
    finally:
        torch.set_float32_matmul_precision(before)
