"""The paragraphs of Python's own manual, and a tokenizer that is trained on them."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.charlm.data import manual

END = "<|end|>"


def paragraphs() -> list[str]:
    """Return the manual's paragraphs of some length, in its order."""
    return [text for text in manual().split("\n\n") if len(text) > 40]


def tokenizer_of(texts: list[str], vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer; the same texts give the same one."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, padding_side="right"
    )


def encoded(tokenizer: Any, texts: list[str], length: int) -> list[dict[str, list[int]]]:
    """Return each text as `input_ids`, ended and cut to `length` tokens."""
    ids = tokenizer([text + END for text in texts], truncation=True, max_length=length)["input_ids"]
    return [{"input_ids": each} for each in ids]
