"""A causal language model of `transformers`: its batches are keywords, its output carries the loss."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import DataCollatorForLanguageModeling, GPT2Config, GPT2LMHeadModel

import danling_core as dl
from danling_core.data import count_labels
from examples.causal_lm.data import encoded, paragraphs, tokenizer_of


class CausalLMParams(dl.Params):
    vocabulary: int = 2048
    length: int = 64
    width: int = 96
    depth: int = 2
    heads: int = 4


class CausalLMRunner(dl.Runner):
    params: CausalLMParams

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        params, texts = self.params, paragraphs()
        cut = len(texts) * 9 // 10
        self.tokenizer = tokenizer_of(texts[:cut], params.vocabulary)
        self.datasets["train"] = encoded(self.tokenizer, texts[:cut], params.length)
        self.datasets["val"] = encoded(self.tokenizer, texts[cut:], params.length)
        self.collate_fn = DataCollatorForLanguageModeling(
            self.tokenizer, mlm=False
        )  # pads; labels of padding are -100
        # the loss is a mean over the tokens that are predicted: all but the first of each text
        self.size_of = partial(count_labels, shift=True)
        self.model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(self.tokenizer),
                n_positions=params.length,
                n_embd=params.width,
                n_layer=params.depth,
                n_head=params.heads,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
        )
