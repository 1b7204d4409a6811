"""The operator's own held-out data, which the gate measures a candidate on: `x` and `y` of an `.npz` file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from cloud_server.deployment import Deployment
from cloud_server.release.releaser import Holdout
from wire.errors import DataError


def load_holdout(deployment: Deployment) -> Holdout | None:
    """What `gate.holdout` of the settings names (relative to the state folder); None where it is empty.

    Raises:
        DataError: (operator) the file is missing, or does not hold float `x` [N, …] and integer `y` [N].
    """
    name = deployment.settings.gate.holdout
    return read_holdout(deployment.folder.root / name) if name else None


def read_holdout(path: Path) -> Holdout:
    """Reads one file; errors as in `load_holdout`."""
    hint = "np.savez(path, x=windows, y=labels)"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as held-out data: {error}", hint=hint) from error
    if len(x) != len(y) or y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or not np.isfinite(x).all():
        raise DataError(f"{path}: x {x.shape} and y {y.shape} {y.dtype} do not belong together", hint=hint)
    return Holdout(x.astype(np.float32), y.astype(np.int64))
