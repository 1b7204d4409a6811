"""Opens a refinery from what the operator names: a model's maker and an `.npz` of samples."""

from __future__ import annotations

from pathlib import Path

from cloud_server.aggregate.fold import choose_device
from cloud_server.refine.refinement import RefineConfig, Refinery
from models.flat import buffer_slots, param_slots
from models.own_model import load_maker
from models.samples import MAX_CLASSES, read_samples
from models.task import Task
from wire.errors import ConfigurationError
from wire.manifest import Manifest


def open_refinery(
    manifest: Manifest, source: str, data: Path, config: RefineConfig, *, device: str, folder: Path
) -> Refinery:
    """A refinery for the model of a manifest.

    Args:
        source: `package.module:function`, or the name of a zoo model.
        data: `.npz` with `x` and, for a classification, `y`.
        device: a name for `choose_device`.
        folder: where the user's package lies.

    Raises:
        ConfigurationError: (operator) no such model or device, or the module is not the one of the manifest.
        DataError: (operator) the samples cannot be read.
    """
    make_module = load_maker(source, folder)
    module = make_module()
    if param_slots(module) != manifest.params or buffer_slots(module) != manifest.buffers:
        raise ConfigurationError(
            f"{source} is not the model {manifest.model} of the run",
            hint="set refine.model to the function that the bundle was built from",
        )
    spec = manifest.task
    task = Task(spec.kind, spec.loss, spec.metric, spec.higher_is_better, spec.classes)
    samples = read_samples(
        data, spec.kind, input_shape=manifest.input_shape, classes=spec.classes or MAX_CLASSES
    )
    return Refinery(make_module, task, samples.x, samples.y, config=config, device=choose_device(device))
