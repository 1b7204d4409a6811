"""Handwritten digits in 8 × 8 pixels: three linear layers, about 26,000 parameters; the smallest thing to try first."""

from __future__ import annotations

from torch import nn

from models.task import Task

INPUT_SHAPE = (64,)
CLASSES = 10
HIDDEN = 128
TASK = Task.classification(CLASSES)


def make_model() -> nn.Module:
    """A freshly initialised model: pixels `float32 [N, 64]` to logits `[N, 10]`."""
    return nn.Sequential(
        nn.Linear(64, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, CLASSES),
    )
