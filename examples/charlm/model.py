"""A decoder-only transformer of characters: `(batch, time)` indices to `(batch, time, vocabulary)` logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Causal self-attention and an MLP, each on a normalised residual stream `(batch, time, width)`."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.dropout(self._attend(self.attention_norm(stream)))
        return stream + self.dropout(self.mlp(self.mlp_norm(stream)))

    def _attend(self, stream: Tensor) -> Tensor:
        batch, time, width = stream.shape
        parts = self.qkv(stream).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project(attended.transpose(1, 2).reshape(batch, time, width))


class TinyGPT(nn.Module):
    """As GPT-2, with learned positions; the embedding of the characters is also the output layer.

    Args:
        block: the longest input.
        width: a multiple of `heads`.
    """

    def __init__(
        self, vocabulary: int, block: int, width: int, depth: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(block, width)
        self.blocks = nn.Sequential(*[Block(width, heads, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, indices: Tensor) -> Tensor:
        positions = torch.arange(indices.shape[1], device=indices.device)
        stream = self.blocks(self.characters(indices) + self.positions(positions))
        return F.linear(self.norm(stream), self.characters.weight)
