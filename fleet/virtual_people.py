"""Virtual people: seeded crops, rotations and scalings of the real recordings.

Laws of the file: a virtual device's data depend on the seed and its number alone; every split is made
inside its own crop, so no sample is in two parts; only people who are not the operator's are used.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fleet.scenario import DataScenario
from models.data import smartwatch
from models.data.federation import Federation, Split
from wire.errors import ConfigurationError

Floats = npt.NDArray[np.float32]


def people_federation(devices: int, scenario: DataScenario, *, seed: int) -> Federation:
    """The people that a scenario asks for, virtual or real.

    Raises:
        ConfigurationError: (operator) real people, but not as many devices as they wear.
    """
    if scenario.people == "virtual":
        return virtual_federation(devices, scenario, seed=seed)
    federation = smartwatch.federation()
    if devices != len(federation.devices):
        raise ConfigurationError(
            f"the real people wear {len(federation.devices)} devices, not {devices}",
            hint=f'say --devices {len(federation.devices)}, or people = "virtual"',
        )
    return replace(federation, name=f"{federation.name}, 8 people with a device on each wrist")


def virtual_federation(devices: int, scenario: DataScenario, *, seed: int) -> Federation:
    """A federation of so many virtual wrists."""
    real = smartwatch.participants()
    return Federation(
        name=f"smartwatch, {devices} virtual people",
        labels=smartwatch.LABELS,
        input_shape=smartwatch.INPUT_SHAPE,
        operator=smartwatch.operator_windows(),
        devices={
            f"virtual-{number:05d}": _virtual_split(*real[number % len(real)], scenario, seed, number)
            for number in range(devices)
        },
    )


def _virtual_split(
    person: int, wrist: smartwatch.Wrist, scenario: DataScenario, seed: int, number: int
) -> Split:
    rng = np.random.default_rng((seed, number))
    turn = _rotation(rng, scenario.rotation_degrees)
    strength = np.float32(1.0 + rng.uniform(-scenario.scale, scenario.scale))
    recordings: list[smartwatch.Recording] = []
    for recording in smartwatch.recordings_of(person, wrist):
        length = len(recording.samples)
        kept = max(smartwatch.WINDOW, int(length * scenario.crop))
        start = int(rng.integers(0, max(1, length - kept + 1)))
        samples = recording.samples[start : start + kept] * strength
        recordings.append(replace(recording, samples=_turned(samples, turn)))
    return smartwatch.split_recordings(recordings)


def _rotation(rng: np.random.Generator, largest_degrees: float) -> Floats:
    """A rotation float32 [3, 3] about a random axis (Rodrigues' formula)."""
    axis = rng.standard_normal(3)
    x, y, z = axis / np.linalg.norm(axis)
    angle = np.deg2rad(rng.uniform(-largest_degrees, largest_degrees))
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    turn = np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * (cross @ cross)
    matrix: Floats = turn.astype(np.float32)
    return matrix


def _turned(samples: Floats, turn: Floats) -> Floats:
    """Samples float32 [T, 6]: acceleration and angular velocity turn together."""
    turned: Floats = np.concatenate([samples[:, :3] @ turn.T, samples[:, 3:] @ turn.T], axis=1)
    return turned
