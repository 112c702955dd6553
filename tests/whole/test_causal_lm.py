"""The example of `transformers`: exact weights by tokens, the same bits after a resume, and its own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from danling_core.config import Config
from danling_core.errors import RunInterrupted
from danling_core.runs.folder import RunFolder
from danling_core.tools.export import export
from examples.causal_lm import CausalLMRunner
from tests.ranks import Ranks
from tests.small_runner import weights

FILE = str(Path(__file__).parents[2] / "examples" / "causal_lm" / "run.yaml")


def short(root: Path, **fields: Any) -> Config:
    """A few steps without dropout, on one rank."""
    stated = Config.load(FILE, ["params.width=32", "params.depth=1", "params.heads=2", "params.length=24"])
    changes: dict[str, Any] = {
        "project_root": str(root),
        "nproc_per_node": 1,
        "epoch_end": 2,
        "experiment_id": "e" * 40,
        "limit_batches": {"train": 6, "val": 2},
        "sanity_batches": 0,
        "log": False,
        "progress_bar": False,
    }
    return stated.replace(**{**changes, **fields})


class Stopping(CausalLMRunner):
    at: int | None = None

    def train_step(self, data: Any) -> Any:
        if self.steps == self.at:
            self.request_stop("asked by the test")
        return super().train_step(data)


def test_the_example_of_transformers_resumes_and_is_exported(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    peace = CausalLMRunner(short(tmp_path / "peace"))
    peace.train()
    first = Stopping(short(tmp_path / "again"))
    first.at = 7
    with pytest.raises(RunInterrupted):
        first.train()
    again = Stopping(short(tmp_path / "again"))
    again.run()
    assert again.resumed is not None
    assert weights(again) == weights(peace) and again.results == peace.results
    assert peace.results[1]["train"]["loss"] < peace.results[0]["train"]["loss"]

    done = export(
        RunFolder(again.dir), str(tmp_path / "out"), overrides=["runner=examples.causal_lm:CausalLMRunner"]
    )
    assert {"README.md", "config.json", "config.yaml", "model.safetensors", "tokenizer.json"} <= set(
        done.files
    )
    assert 'GPT2LMHeadModel.from_pretrained(".")' in (tmp_path / "out" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer("The object is", return_tensors="pt")
    again.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**tokens).logits, again.model(**tokens).logits)
    assert tokenizer.decode(tokens["input_ids"][0]) == "The object is"


def _gradients(root: Path, batch_size: int, accum: int) -> dict[str, torch.Tensor]:
    runner = CausalLMRunner(
        short(
            root,
            dataloader={"batch_size": batch_size, "shuffle": False},
            accum_steps=accum,
            clip_grad_norm=None,
        ).replace(optim={"name": "sgd", "lr": 1.0}, scheduler=None, limit_batches={})
    )
    model = runner.model
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with runner.training() as loop:
        for window in loop:
            for batch, step in window:
                with runner.in_step(step):
                    runner.train_step(batch)
            break
    return {name: (before[name] - p.detach()) for name, p in model.named_parameters()}


def test_a_step_is_that_of_all_tokens_however_they_are_spread(two_ranks: Ranks, tmp_path: Path) -> None:
    """Texts are of unequal length: a mean of means would be another gradient."""
    whole = _gradients(tmp_path / "whole", 16, 1)
    spread = _gradients(tmp_path / "spread", 4, 4)
    ranks = two_ranks.run(_gradients, tmp_path / "ranks", 4, 2)
    for name, gradient in whole.items():
        torch.testing.assert_close(spread[name], gradient, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(ranks[0][name], gradient, rtol=1e-3, atol=1e-6)
