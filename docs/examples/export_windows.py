"""Writes smartwatch windows into files, as a device's sensors would: `python docs/examples/export_windows.py FOLDER`.

FOLDER/operator.npz                          x, y: the operator's two people, to build the first model from
FOLDER/holdout.npz                           x, y: later windows of the same people, for the gate
FOLDER/watch-N/labelled.npy, labelled.labels.npy    what device N has seen and labelled
FOLDER/watch-N/later.npy, later.labels.npy          what it sees afterwards
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from models.data import smartwatch

WEARERS: tuple[tuple[int, smartwatch.Wrist], ...] = ((3, "left"), (4, "left"), (5, "right"))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    operator = smartwatch.operator_windows()
    np.savez(folder / "operator.npz", x=operator.train_x, y=operator.train_y)
    np.savez(folder / "holdout.npz", x=operator.val_x, y=operator.val_y)
    for number, (person, wrist) in enumerate(WEARERS, start=1):
        place = folder / f"watch-{number}"
        place.mkdir(exist_ok=True)
        windows = smartwatch.device_windows(person, wrist)
        np.save(place / "labelled.npy", windows.train_x)
        np.save(place / "labelled.labels.npy", windows.train_y)
        np.save(place / "later.npy", windows.test_x)
        np.save(place / "later.labels.npy", windows.test_y)
    print(f"wrote windows of {len(WEARERS)} devices into {folder}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: export_windows.py FOLDER")
    main(Path(sys.argv[1]))
