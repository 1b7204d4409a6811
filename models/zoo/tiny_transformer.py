"""Gestures from a smartwatch: a transformer over ten patches of a window, about 72,000 parameters.

Norms come before attention and feed-forward, which trains without warm-up.
Source: Vaswani et al., arXiv:1706.03762; Xiong et al., "On layer normalization in the transformer architecture",
arXiv:2002.04745.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.task import Task

INPUT_SHAPE = (6, 100)
CLASSES = 7
PATCH = 10
WIDTH = 64
HEADS = 4
LAYERS = 2
TASK = Task.classification(CLASSES)


class Block(nn.Module):
    """Self-attention and feed-forward over tokens `[N, T, WIDTH]`, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention_out = nn.Linear(WIDTH, WIDTH)
        self.forward_norm = nn.LayerNorm(WIDTH)
        self.expand = nn.Linear(WIDTH, 2 * WIDTH)
        self.contract = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.attention_norm(x))
        hidden = functional.gelu(self.expand(self.forward_norm(x)))
        return x + cast(Tensor, self.contract(hidden))

    def _attend(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        packed = self.query_key_value(x).reshape(batch, tokens, 3, HEADS, WIDTH // HEADS)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return cast(Tensor, self.attention_out(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH)))


class TinyTransformer(nn.Module):
    """Windows `float32 [N, 6, 100]` to logits `[N, 7]`."""

    def __init__(self) -> None:
        super().__init__()
        channels, length = INPUT_SHAPE
        self.embed = nn.Linear(channels * PATCH, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(1, length // PATCH, WIDTH))
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        channels, length = INPUT_SHAPE
        patches = x.reshape(-1, channels, length // PATCH, PATCH).transpose(1, 2).flatten(2)
        tokens = self.blocks(self.embed(patches) + self.position)
        return cast(Tensor, self.classifier(self.norm(tokens).mean(1)))


def make_model() -> nn.Module:
    """A freshly initialised model."""
    return TinyTransformer()
