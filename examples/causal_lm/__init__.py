"""Example: a tiny GPT-2 of Hugging Face's `transformers`, with a tokenizer that is trained on the spot."""

from examples.causal_lm.runner import CausalLMRunner

__all__ = ["CausalLMRunner"]
