"""The runner of the language model: optimizer, schedule, clipping and averaging are all in run.yaml."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

import danling_core as dl

from .data import VOCABULARY, TextStream, blocks, split
from .model import TinyGPT


class CharLMParams(dl.Params):
    """Hyperparameters of the language model."""

    width: int = Field(128, ge=4, description="of the residual stream; a multiple of heads")
    depth: int = Field(3, ge=1, description="transformer blocks")
    heads: int = Field(4, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    block: int = Field(64, ge=2, description="characters that the model sees at once")
    buffer: int = Field(512, ge=0, description="blocks that the stream is shuffled through")


class CharLMRunner(dl.TorchRunner):
    """Predicts the next character. The loss is in nats per character."""

    params: CharLMParams

    def __init__(self, config: dl.Config) -> None:
        super().__init__(config)
        params = self.params
        train, val = split()
        self.datasets["train"] = TextStream(train, params.block, params.buffer)
        self.datasets["val"] = blocks(val, params.block)
        self.model = TinyGPT(
            len(VOCABULARY), params.block, params.width, params.depth, params.heads, params.dropout
        )
        self.criterion = nats_per_character


def nats_per_character(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in float32 of `(batch, time, vocabulary)` logits and `(batch, time)` indices."""
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())
