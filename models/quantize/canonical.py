"""One byte string per ONNX graph, and where each initializer's values lie in it.

Laws of the file: what is written names no file, host or person (exporters put stack traces into
metadata); every initializer is inside the file and in `raw_data`, little-endian, so a place in it can be
patched; external data is refused. Source: onnx.proto3 (field numbers), the protocol buffers encoding
guide.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import numpy_helper

from wire.errors import BundleError

PRODUCER = "shoal"

_GRAPH, _INITIALIZER, _NAME, _RAW_DATA = 7, 5, 8, 9
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def to_canonical(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without metadata, with all initializers as raw data.

    Raises:
        BundleError: an initializer lies outside of the file.
    """
    clean = onnx.ModelProto()
    clean.CopyFrom(model)
    clean.producer_name, clean.producer_version, clean.domain, clean.doc_string = PRODUCER, "", "", ""
    graph = clean.graph
    graph.name = "model"
    graph.ClearField("value_info")
    for part in (clean, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for index, tensor in enumerate(graph.initializer):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise BundleError(f"initializer {tensor.name} lies outside of the file", name=tensor.name)
        if not tensor.HasField("raw_data"):
            graph.initializer[index].CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name)
            )
    return clean


def to_bytes(model: onnx.ModelProto) -> bytes:
    """The canonical bytes of a model."""
    data: bytes = to_canonical(model).SerializeToString(deterministic=True)
    return data


def raw_data_places(model: bytes) -> dict[str, tuple[int, int]]:
    """Place of each initializer's values in the bytes of a model.

    Returns:
        `(at, size)` in bytes, by initializer name; an initializer without raw data is absent.
    """
    places = {}
    for field, start, end in _fields(model, 0, len(model)):
        if field != _GRAPH:
            continue
        for inner, tensor_start, tensor_end in _fields(model, start, end):
            if inner == _INITIALIZER:
                spans = {number: (at, to) for number, at, to in _fields(model, tensor_start, tensor_end)}
                if _RAW_DATA in spans:
                    name_at, name_to = spans[_NAME]
                    at, to = spans[_RAW_DATA]
                    places[model[name_at:name_to].decode()] = (at, to - at)
    return places


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, first byte, past the last byte) of each length-delimited field of one message."""
    at = start
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _LENGTH:
            size, at = _varint(data, at)
            yield key >> 3, at, at + size
            at += size
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise BundleError("not a serialized ONNX model")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
