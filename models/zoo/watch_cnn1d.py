"""Gestures from a smartwatch: three strided 1D convolutions, a mean over time, one linear layer.

About 24,000 parameters and no norm, so nothing but plain weights travels. Strides take the place of pooling:
they cost less than they save, and quantize without loss.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from models.task import Task

INPUT_SHAPE = (6, 100)
CLASSES = 7
TASK = Task.classification(CLASSES)


class WatchCnn1d(nn.Module):
    """`float32 [N, 6, 100]` (accelerometer and gyroscope, 2 s at 50 Hz) to logits `[N, 7]`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(6, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv1d(32, 64, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv1d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.features(x).mean(2)))


def make_model() -> nn.Module:
    """A freshly initialised model."""
    return WatchCnn1d()
