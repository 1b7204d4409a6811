"""Clothes in 28 × 28 pixels with depthwise separable convolutions, GroupNorm and ReLU6, as phones' networks have them.

Source: Howard et al., "MobileNets", arXiv:1704.04861; Wu and He, "Group normalization", arXiv:1803.08494.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from models.task import Task

INPUT_SHAPE = (1, 28, 28)
CLASSES = 10
GROUPS = 8
TASK = Task.classification(CLASSES)


class FashionMobile(nn.Module):
    """Grey images `float32 [N, 1, 28, 28]` to logits `[N, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(GROUPS, 16),
            nn.ReLU6(),
            _separable(16, 32, stride=2),
            _separable(32, 64, stride=1),
            _separable(64, 64, stride=1),
            _separable(64, 128, stride=2),
        )
        self.classifier = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.features(x).mean((2, 3))))


def _separable(channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False),
        nn.GroupNorm(GROUPS, channels),
        nn.ReLU6(),
        nn.Conv2d(channels, out_channels, 1, bias=False),
        nn.GroupNorm(GROUPS, out_channels),
        nn.ReLU6(),
    )


def make_model() -> nn.Module:
    """A freshly initialised model."""
    return FashionMobile()
