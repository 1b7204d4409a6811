"""The operator's own held-out data, which the gate measures a candidate on: `x` and `y` of an `.npz` file."""

from __future__ import annotations

from cloud_server.deployment import Deployment
from cloud_server.release.releaser import Holdout
from models.samples import MAX_CLASSES, read_samples
from wire.manifest import Manifest


def load_holdout(deployment: Deployment, manifest: Manifest) -> Holdout | None:
    """What `gate.holdout` of the settings names (relative to the state folder); None where it is empty.

    Raises:
        DataError: (operator) the file is missing, or does not hold samples and labels of the run's model.
    """
    name = deployment.settings.gate.holdout
    if not name:
        return None
    samples = read_samples(
        deployment.folder.root / name,
        manifest.task.kind,
        input_shape=manifest.input_shape,
        classes=manifest.task.classes or MAX_CLASSES,
    )
    return Holdout(samples.x, samples.y)
