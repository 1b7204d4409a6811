"""What an export gives: the graph's bytes and the layout of its flat vectors."""

from __future__ import annotations

from dataclasses import dataclass

from wire.manifest import TensorSlot


@dataclass(frozen=True, slots=True)
class TrainStepExport:
    """A train step graph that was compared with torch.

    Attributes:
        model: the serialized ONNX model (docs/architecture.md, "Train step graph"); equal steps have equal
            bytes.
        optimizer: "sgd" or "adam".
        input_shape: shape of one sample.
        params_size: P, length of `params`.
        opt_state_size: S, length of `opt_state`: P for sgd, 2P + 1 for adam; starts as zeros.
        buffers_size: Q, length of `buffers`; 0 for a model without running statistics.
        param_slots: layout of `params`.
        buffer_slots: layout of `buffers`.
        inputs: names of the inputs that the graph asks for.
    """

    model: bytes
    optimizer: str
    input_shape: tuple[int, ...]
    params_size: int
    opt_state_size: int
    buffers_size: int
    param_slots: tuple[TensorSlot, ...]
    buffer_slots: tuple[TensorSlot, ...]
    inputs: tuple[str, ...]
