"""Anomaly score of a smartwatch window: a convolutional autoencoder that learns without labels.

The score is the mean squared error of the reconstruction; a quarter of the time steps and as few channels
make the narrow middle, so that what a person never does comes out wrong.
"""

from __future__ import annotations

from torch import nn

from models.task import Task

INPUT_SHAPE = (6, 100)
CHANNELS = 6
WIDTH = 32
CODE = 8
TASK = Task.anomaly()


def make_model() -> nn.Module:
    """A freshly initialised model: windows `float32 [N, 6, 100]` to windows of the same shape."""
    return nn.Sequential(
        nn.Conv1d(CHANNELS, WIDTH, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv1d(WIDTH, CODE, 5, stride=2, padding=2),
        nn.Tanh(),
        nn.ConvTranspose1d(CODE, WIDTH, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose1d(WIDTH, CHANNELS, 4, stride=2, padding=1),
    )
