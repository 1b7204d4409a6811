"""A module's parameters and buffers as two flat float32 vectors, and back, laid out by slots.

The order is torch's own (`named_parameters`, `named_buffers`), so both sides of the wire agree on offsets by
the slots alone. Trainable parameters make up `params`; floating persistent buffers (BatchNorm's running
statistics) make up `buffers`. Frozen parameters and integer buffers are constants of the graph and not in
either vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wire.errors import ModelError
from wire.manifest import TensorSlot

FloatVector = npt.NDArray[np.float32]


def params_of(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name, shared ones once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Floating-point persistent buffers by name, shared ones once."""
    persistent = module.state_dict(keep_vars=True)
    return {n: b for n, b in module.named_buffers() if b.is_floating_point() and n in persistent}


def param_slots(module: nn.Module) -> tuple[TensorSlot, ...]:
    """Layout of the `params` vector."""
    return _slots(params_of(module).items())


def buffer_slots(module: nn.Module) -> tuple[TensorSlot, ...]:
    """Layout of the `buffers` vector; empty for a module without running statistics."""
    return _slots(buffers_of(module).items())


def total_size(slots: Sequence[TensorSlot]) -> int:
    """Length of the vector that the slots lay out."""
    return sum(slot.size for slot in slots)


def flatten_params(module: nn.Module) -> FloatVector:
    """A copy of the trainable parameters, `float32 [P]`."""
    return _flatten(params_of(module).values())


def flatten_buffers(module: nn.Module) -> FloatVector:
    """A copy of the floating-point buffers, `float32 [Q]`."""
    return _flatten(buffers_of(module).values())


def load_flat(module: nn.Module, params: FloatVector, buffers: FloatVector | None = None) -> None:
    """Write flat vectors into the module, in place.

    Args:
        module: the module whose slots lay out the vectors.
        params: `float32 [P]`.
        buffers: `float32 [Q]`, or None to leave the buffers as they are.

    Raises:
        ModelError: a vector's length does not fit the module.
    """
    _load(params_of(module), params, "params")
    if buffers is not None:
        _load(buffers_of(module), buffers, "buffers")


def split_flat(vector: Tensor, slots: Sequence[TensorSlot]) -> dict[str, Tensor]:
    """Views of a flat torch vector by slot name; differentiable and traceable."""
    if not slots:
        return {}
    parts = torch.split(vector, [slot.size for slot in slots])
    return {slot.name: part.reshape(slot.shape) for slot, part in zip(slots, parts, strict=True)}


def join_flat(tensors: dict[str, Tensor], slots: Sequence[TensorSlot]) -> Tensor:
    """The flat torch vector of tensors by slot name: the inverse of `split_flat` for at least one slot."""
    return torch.cat([tensors[slot.name].reshape(-1) for slot in slots])


def _slots(tensors: Iterable[tuple[str, Tensor]]) -> tuple[TensorSlot, ...]:
    slots: list[TensorSlot] = []
    offset = 0
    for name, tensor in tensors:
        if tensor.dtype != torch.float32:
            raise ModelError(f"{name} is {tensor.dtype}, only float32 is trained", hint="call module.float()")
        shape = tuple(tensor.shape)
        slots.append(TensorSlot(name=name, shape=shape, offset=offset, size=prod(shape)))
        offset += prod(shape)
    return tuple(slots)


def _flatten(tensors: Iterable[Tensor]) -> FloatVector:
    parts = [tensor.detach().cpu().reshape(-1).numpy() for tensor in tensors]
    return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)


def _load(tensors: dict[str, Tensor], vector: FloatVector, what: str) -> None:
    slots = _slots(tensors.items())
    if vector.shape != (total_size(slots),):
        raise ModelError(
            f"{what} have shape {vector.shape}, the module needs ({total_size(slots)},)",
            shape=vector.shape,
            wanted=total_size(slots),
        )
    with torch.no_grad():
        for slot in slots:
            part = vector[slot.offset : slot.offset + slot.size].reshape(slot.shape)
            tensors[slot.name].copy_(torch.from_numpy(np.array(part, np.float32)))
