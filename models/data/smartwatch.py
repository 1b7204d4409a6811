"""Shoulder exercises seen by a smartwatch: 10 people × 2 wrists, 7 exercises, 6 channels at 50 Hz.

Laws of the file: a recording is split in time, first part for training, next for validation (federated
evaluation), last for test ("later" windows); no sample is in two parts, so no window crosses a border.
Normalization comes from the operator's people (1 and 2) and their training parts alone; all constants are
fixed here. Source: D. M. Burns et al., https://arxiv.org/abs/1802.01489, by way of
seglearn 1.2.5 (`make_smartwatch.py`).
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from models.data.federation import Federation, Floats, Split
from wire.errors import DataError

Wrist = Literal["left", "right"]

FILE = Path(__file__).with_name("smartwatch.npz")
FILE_SHA256 = "fcb952813ac8e406f58a05ba7fbca7160eb7fcbdfb3ee170d38e72ae447d31d6"
LABELS = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
CHANNELS = ("ax", "ay", "az", "wx", "wy", "wz")
RATE_HZ = 50
PEOPLE = tuple(range(1, 11))
WRISTS: tuple[Wrist, Wrist] = ("left", "right")
OPERATOR_PEOPLE = (1, 2)

WINDOW = 100
INPUT_SHAPE = (len(CHANNELS), WINDOW)
# Parts of a recording, in hundredths of its samples, and the step between two windows. Windows for training
# overlap (2 s of data every half second), those for test do not share a sample with anything.
TRAIN_PERCENT, VALIDATION_PERCENT = 50, 20
TRAIN_STRIDE, VALIDATION_STRIDE, TEST_STRIDE = 25, 50, 100

# Of the training parts of people 1 and 2, both wrists; g and rad/s.
MEAN = (0.012, 0.3878, -0.2773, 0.006, 0.0059, 0.0107)
DEVIATION = (0.736, 0.4763, 0.4549, 0.7836, 1.8539, 1.1982)


@dataclass(frozen=True, eq=False)
class Recording:
    """One exercise of one person; `samples` is float32 [T, 6] in g and rad/s, `label` indexes `LABELS`."""

    person: int
    wrist: Wrist
    label: int
    samples: Floats


@lru_cache(maxsize=1)
def load_recordings() -> tuple[Recording, ...]:
    """All 140 recordings, by person, wrist (left first) and label. Their arrays are read-only.

    Raises:
        DataError: (operator) the file is missing or is another one.
    """
    arrays = _read(FILE)
    steps = np.cumsum(arrays["differences"], axis=1, dtype=np.int16)
    samples = (steps.astype(np.float64) * arrays["scale"][:, None]).T.astype(np.float32)
    samples.setflags(write=False)
    parts = np.split(samples, np.cumsum(arrays["length"].astype(np.int64))[:-1])
    rows = zip(arrays["person"], arrays["is_right"], arrays["label"], parts, strict=True)
    return tuple(Recording(int(p), WRISTS[int(side)], int(y), part) for p, side, y, part in rows)


def recordings_of(person: int, wrist: Wrist) -> tuple[Recording, ...]:
    """The seven recordings of one device.

    Raises:
        DataError: (operator) there is no such person or wrist.
    """
    found = tuple(r for r in load_recordings() if (r.person, r.wrist) == (person, wrist))
    if not found:
        raise DataError(
            f"there is no person {person} with a {wrist} wrist",
            hint=f"people are {PEOPLE[0]} to {PEOPLE[-1]}, wrists are left and right",
        )
    return found


def device_windows(person: int, wrist: Wrist) -> Split:
    """The windows of one person's wrist; errors as in `recordings_of`."""
    return split_recordings(recordings_of(person, wrist))


def operator_windows() -> Split:
    """The windows of the operator's own people, both wrists: the first bundle is trained on these alone."""
    return split_recordings(r for r in load_recordings() if r.person in OPERATOR_PEOPLE)


def participants() -> tuple[tuple[int, Wrist], ...]:
    """(person, wrist) of every device that takes part: the 8 people who are not the operator's."""
    return tuple((person, wrist) for person in PEOPLE if person not in OPERATOR_PEOPLE for wrist in WRISTS)


def borders(length: int) -> tuple[int, int]:
    """Where the validation part and the test part of a recording of `length` samples begin."""
    return length * TRAIN_PERCENT // 100, length * (TRAIN_PERCENT + VALIDATION_PERCENT) // 100


def split_recordings(recordings: Iterable[Recording]) -> Split:
    """Windows of any recordings (also of virtual people), each split in time by `borders`."""
    parts: dict[str, list[tuple[Floats, int]]] = {"train": [], "val": [], "test": []}
    for recording in recordings:
        first, second = borders(len(recording.samples))
        parts["train"].append((cut_windows(recording.samples[:first], TRAIN_STRIDE), recording.label))
        parts["val"].append(
            (cut_windows(recording.samples[first:second], VALIDATION_STRIDE), recording.label)
        )
        parts["test"].append((cut_windows(recording.samples[second:], TEST_STRIDE), recording.label))
    arrays: dict[str, Any] = {}
    for name, windows in parts.items():
        arrays[f"{name}_x"] = np.concatenate(
            [x for x, _ in windows] or [np.zeros((0, *INPUT_SHAPE), np.float32)]
        )
        arrays[f"{name}_y"] = np.repeat([y for _, y in windows], [len(x) for x, _ in windows]).astype(
            np.int64
        )
    return Split(**arrays)


def cut_windows(samples: Floats, stride: int) -> Floats:
    """Normalized windows float32 [N, 6, 100] of samples float32 [T, 6]; none where T < 100."""
    if len(samples) < WINDOW:
        return np.zeros((0, *INPUT_SHAPE), np.float32)
    normalized = (samples - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    views = np.lib.stride_tricks.sliding_window_view(normalized, WINDOW, axis=0)
    return np.ascontiguousarray(views[::stride], np.float32)


def federation() -> Federation:
    """The demo's fleet: the 8 people who are not the operator's, one device on each wrist."""
    return Federation(
        name="smartwatch",
        labels=LABELS,
        input_shape=INPUT_SHAPE,
        operator=operator_windows(),
        devices={
            f"person-{person:02d}-{wrist}": device_windows(person, wrist) for person, wrist in participants()
        },
    )


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    hint = "install from a clone, or make the file with models/data/make_smartwatch.py"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint=hint) from error
    if hashlib.sha256(data).hexdigest() != FILE_SHA256:
        raise DataError(f"{path} is not the smartwatch data", hint=hint)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} holds no arrays", hint=hint) from error
