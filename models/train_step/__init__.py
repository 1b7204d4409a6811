"""A module's forward, backward and optimizer as one ONNX graph that plain onnxruntime executes on a device.

`export_train_step` is the way in. `SUPPORTED_LAYERS` says what a model may be made of.
Source: docs/architecture.md, "Train step graph".
"""

from models.train_step.export import export_train_step
from models.train_step.sample_privacy import SamplePrivacy
from models.train_step.support import SUPPORTED_LAYERS, check_supported
from models.train_step.train_step_export import TrainStepExport
from models.train_step.verify import verify_train_step

__all__ = [
    "SUPPORTED_LAYERS",
    "SamplePrivacy",
    "TrainStepExport",
    "check_supported",
    "export_train_step",
    "verify_train_step",
]
