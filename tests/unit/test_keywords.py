"""Batches that are keywords of the model's call, as `transformers` has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import danling_core as dl
from danling_core.data import count_labels
from danling_core.metrics import Accuracy, MetricGroup
from tests.ranks import Ranks
from tests.small_runner import config, weights


@dataclass
class Output:
    """An output as `transformers` returns it."""

    loss: torch.Tensor | None
    logits: torch.Tensor


class Tagger(nn.Module):
    """Names each token; its loss is the mean over those whose label counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: Any = None, labels: torch.Tensor | None = None
    ) -> Output:
        logits = self.head(self.embedding(input_ids))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return Output(loss, logits)


class Tokens(Dataset[Any]):
    """Sequences of five, of which some labels do not count."""

    def __init__(self, count: int, *, labelled: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(7, (count, 5), generator=generator)
        self.labels = torch.where(torch.rand(count, 5, generator=generator) < 0.5, self.ids % 3, -100)
        self.labels[:, 0] = 1
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        own = {"input_ids": self.ids[index], "attention_mask": torch.ones(5)}
        return {**own, "labels": self.labels[index]} if self.labelled else own


class TaggingRunner(dl.TorchRunner):
    """Nothing but a model and data."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.datasets = {"train": Tokens(12), "val": Tokens(7), "infer": Tokens(6, labelled=False)}
        self.model = Tagger()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.size_of = count_labels


def fields(**more: Any) -> dict[str, Any]:
    return {"dataloader": {"batch_size": 4}, "epoch_end": 2, "sanity_batches": 1, **more}


def test_a_model_that_computes_its_own_loss_needs_no_step(tmp_path: Path) -> None:
    runner = TaggingRunner(config(tmp_path, **fields(epoch_end=20)))
    results = runner.train()
    assert results[19]["train"]["loss"] < 0.5 * results[0]["train"]["loss"]
    outputs = runner.infer("infer")
    assert outputs.shape == (6, 5, 3)
    data = runner.datasets["val"]
    model = runner.unwrap(runner.model)
    whole = float(model(data.ids, labels=data.labels).loss)
    assert results[19]["val"]["loss"] == pytest.approx(whole, rel=1e-5), "each label counts once"


def test_labels_weigh_the_gradient_too(two_ranks: Ranks, tmp_path: Path) -> None:
    one = tagged(str(tmp_path / "one"), **fields(dataloader={"batch_size": 6}))
    halves = tagged(str(tmp_path / "halves"), **fields(dataloader={"batch_size": 3}, accum_steps=2))
    first, second = two_ranks.run(tagged, str(tmp_path / "two"), **fields(dataloader={"batch_size": 3}))
    assert (
        one == pytest.approx(halves, abs=1e-6) and one == pytest.approx(first, abs=1e-6) and first == second
    )


def tagged(root: str, **more: Any) -> list[float]:
    runner = TaggingRunner(config(root, **more))
    runner.train()
    return weights(runner)


def test_a_criterion_and_metrics_may_take_over(tmp_path: Path) -> None:
    class Own(TaggingRunner):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.criterion = lambda logits, labels: nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=0.3
            )
            self.metrics = MetricGroup(accuracy=Accuracy(ignore_index=-100, class_dim=-1))

    plain, own = TaggingRunner(config(tmp_path, **fields())), Own(config(tmp_path, **fields()))
    plain.train()
    own.train()
    assert own.results[1]["val"]["loss"] > plain.results[1]["val"]["loss"]
    assert 0 < own.results[1]["val"]["accuracy"] <= 1


def test_what_the_model_does_not_take_is_said_before_the_first_step(tmp_path: Path) -> None:
    class Others(TaggingRunner):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.collate_fn = lambda samples: {
                "ids": torch.stack([sample["input_ids"] for sample in samples])
            }
            self.size_of = None

    class Unlabelled(TaggingRunner):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.datasets["train"] = Tokens(12, labelled=False)
            self.size_of = None

    with pytest.raises(
        dl.ConfigError, match=r"a mapping of \['ids'\], and Tagger.forward does not take these"
    ):
        Others(config(tmp_path, **fields())).train()
    with pytest.raises(dl.ConfigError, match="the model returned no `loss`: give it `labels` in the batch"):
        Unlabelled(config(tmp_path, **fields())).train()
