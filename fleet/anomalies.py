"""Data for an anomaly score: a fleet that never sees one class, and windows that are unlike what it sees.

Laws of the file: the hidden class is in no part of any device's data, nor in the operator's; what the score is measured
on is made of later windows alone; faults depend on the seed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from models.data.federation import Federation, Floats, Labels, Split

NOISE = 0.5
"""Standard deviation of the noise of a loose contact, in units of the normalized channels."""


def without_class(federation: Federation, label: int, *, seed: int) -> Federation:
    """The federation without a class; its `unseen` are three kinds of windows that the devices never met.

    These are the later windows of the hidden class, and, made of all other later windows, those of a sensor with
    noise on every channel, and of one with a channel that is stuck at its first value.
    """
    later = np.concatenate([split.test_x for split in federation.devices.values()])
    labels = np.concatenate([split.test_y for split in federation.devices.values()])
    usual = later[labels != label]
    rng = np.random.default_rng([seed, label])
    return replace(
        federation,
        name=f"{federation.name}, without {federation.labels[label]}",
        operator=_without(federation.operator, label),
        devices={device: _without(split, label) for device, split in federation.devices.items()},
        unseen={
            f"class {federation.labels[label]}": later[labels == label],
            "noise on every channel": _noisy(usual, rng),
            "one channel stuck": _stuck(usual, rng),
        },
    )


def _without(split: Split, label: int) -> Split:
    def kept(x: Floats, y: Labels) -> tuple[Floats, Labels]:
        return x[y != label], y[y != label]

    train, val, test = (
        kept(x, y)
        for x, y in ((split.train_x, split.train_y), (split.val_x, split.val_y), (split.test_x, split.test_y))
    )
    return Split(*train, *val, *test)


def _noisy(x: Floats, rng: np.random.Generator) -> Floats:
    noise = NOISE * rng.standard_normal(x.shape, np.float32)
    return np.asarray(x + noise, np.float32)


def _stuck(x: Floats, rng: np.random.Generator) -> Floats:
    broken = x.copy()
    windows, channels = np.arange(len(x)), rng.integers(0, x.shape[1], len(x))
    broken[windows, channels] = broken[windows, channels, :1]
    return broken
