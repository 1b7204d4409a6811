"""What attackers send, and what they train on: the attacks that robust rules are measured against.

    sign_flip    −u                                    Li et al. 2019, RSA, arXiv:1811.03761
    boost        −100 · u                              Bagdasaryan et al. 2020, arXiv:1807.00459 (its scaling)
    noise        Gaussian, ten times as long as u      Blanchard et al. 2017, NeurIPS
    alie         mean − 1.5 · deviation of what the attackers trained, each parameter on its own
                                                       Baruch et al. 2019, A little is enough, arXiv:1902.06156
    ipm          −ε · mean of what they trained, ε large enough to turn a plain mean around
                                                       Xie et al. 2020, Fall of empires, arXiv:1903.03936
    label_flip   training labels y become classes − 1 − y          Tolpegin et al. 2020, arXiv:2007.08432
    backdoor     a trigger in half of the training windows, labelled as the target   Gu et al. 2017, arXiv:1708.06733

Laws of the file: pure, chance is an argument; a falsified update is finite float32 [P] of the same size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from models.data.federation import Floats, Labels
from wire.errors import ConfigurationError

AttackName = Literal["sign_flip", "boost", "label_flip", "alie", "ipm", "noise", "backdoor"]
ATTACKS: tuple[str, ...] = get_args(AttackName)
POISONS = frozenset({"label_flip", "backdoor"})
"""Attacks on the training data; what comes of it is sent as it is."""

TARGET = 0
"""The label that a backdoor's trigger asks for."""
POISONED_SHARE = 0.5
BOOST = 100.0
NOISE_LENGTHS = 10.0
ALIE_DEVIATIONS = 1.5
IPM_EXCESS = 1.1
"""A plain mean of (1 − s) honest updates and s such ones points the other way, a tenth as long."""
TRIGGER_LEVEL = 2.0
"""In deviations: windows and images are normalized; white paper has 2.02."""


@dataclass(frozen=True, slots=True)
class Known:
    """What an attacker knows when it sends.

    Attributes:
        own: float32 [P], what it trained honestly.
        trained: float32 [k, P], the same of every attacker that has trained by now, its own included.
        attackers, devices: how many there are of each in the fleet.
    """

    own: Floats
    trained: Floats
    attackers: int
    devices: int


Falsify = Callable[[Known, np.random.Generator], NDArray[np.floating]]


def _sign_flip(known: Known, _rng: np.random.Generator) -> NDArray[np.floating]:
    return -known.own


def _boost(known: Known, _rng: np.random.Generator) -> NDArray[np.floating]:
    return np.float32(-BOOST) * known.own


def _noise(known: Known, rng: np.random.Generator) -> NDArray[np.floating]:
    drawn = rng.standard_normal(len(known.own))
    return np.asarray(drawn * (NOISE_LENGTHS * float(np.linalg.norm(known.own) / np.linalg.norm(drawn))))


def _alie(known: Known, _rng: np.random.Generator) -> NDArray[np.floating]:
    mean, deviation = known.trained.mean(0, dtype=np.float64), known.trained.std(0, dtype=np.float64)
    return np.asarray(mean - ALIE_DEVIATIONS * deviation)


def _ipm(known: Known, _rng: np.random.Generator) -> NDArray[np.floating]:
    honest = known.devices - known.attackers
    return np.asarray(known.trained.mean(0, dtype=np.float64) * (-IPM_EXCESS * honest / known.attackers))


_FALSIFY: Mapping[str, Falsify] = MappingProxyType(
    {"sign_flip": _sign_flip, "boost": _boost, "noise": _noise, "alie": _alie, "ipm": _ipm}
)


def falsified(attack: str, known: Known, rng: np.random.Generator) -> Floats:
    """What the attacker sends instead of what it trained: float32 [P]."""
    if attack in POISONS:
        return known.own
    update: Floats = _FALSIFY[attack](known, rng).astype(np.float32)
    return update


def poisoned(
    attack: str, x: Floats, y: Labels, classes: int, rng: np.random.Generator
) -> tuple[Floats, Labels]:
    """What the attacker trains on instead of its windows x float32 [N, …] and labels y int64 [N]."""
    if attack == "label_flip":
        return x, classes - 1 - y
    if attack == "backdoor":
        chosen = rng.permutation(len(x))[: int(len(x) * POISONED_SHARE)]
        x, y = x.copy(), y.copy()
        x[chosen], y[chosen] = with_trigger(x[chosen]), TARGET
        return x, y
    return x, y


def with_trigger(x: Floats) -> Floats:
    """Windows with a backdoor's trigger: a level corner of images float32 [N, C, H, W], a level end of others."""
    marked = x.copy()
    end = slice(-max(2, x.shape[-1] // 8), None)
    marked[(..., end, end) if x.ndim == 4 else (..., end)] = TRIGGER_LEVEL
    return marked


def chosen_attackers(devices: Iterable[str], share: float, seed: int) -> frozenset[str]:
    """Who attacks, by the seed: the nearest whole number to the share.

    Raises:
        ConfigurationError: (operator) that is nobody.
    """
    names = sorted(devices)
    count = round(share * len(names))
    if count < 1:
        raise ConfigurationError(
            f"{share:g} of {len(names)} devices is no attacker", hint="more devices, or a larger --attackers"
        )
    return frozenset(random.Random(f"{seed} attackers").sample(names, count))
