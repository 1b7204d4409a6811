"""Clothes in 28 × 28 pixels: two convolutions with max-pooling and one linear layer, about 20,000 parameters."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from models.task import Task

INPUT_SHAPE = (1, 28, 28)
CLASSES = 10
TASK = Task.classification(CLASSES)


class FashionCnn(nn.Module):
    """Grey images `float32 [N, 1, 28, 28]` to logits `[N, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Linear(32 * 7 * 7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.features(x).flatten(1)))


def make_model() -> nn.Module:
    """A freshly initialised model."""
    return FashionCnn()
