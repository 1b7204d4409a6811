"""Looks into an ONNX file without an ONNX library: what may not be in it is refused before a runtime sees it.

Laws of the file: nothing is allocated from what the file says, everything is a view of bytes that are there; a field,
domain, opset or element type that is not known here is refused, so that no reader understands more than was checked;
work is bounded by the file's length and `MAX_NODES`. Source: onnx.proto (ONNX IR 3 to 13), the protocol buffers
encoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from wire.errors import BundleError

MAX_NODES: Final = 100_000
MAX_DEPTH: Final = 8
MAX_ELEMENTS: Final = 2**28
MAX_DIMENSIONS: Final = 8
MIN_IR, MAX_IR = 3, 13
DOMAINS: Final = {"": (7, 24), "ai.onnx": (7, 24)}
"""The operator sets that a graph may ask for, with the first and last version."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_NAME_BYTES: Final = 256
_EXTERNAL: Final = 1
_HIGH: Final = bytes(range(0x80, 0x100))
# Bits of an element by ONNX's data type; strings and complex numbers have no place in a model here.
_BITS: Final = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4,
}  # fmt: skip

# What each message may hold; a field that is not here is refused.
_MODEL: Final = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 14})
_OPSET: Final = frozenset({1, 2})
_GRAPH: Final = frozenset({1, 2, 5, 10, 11, 12, 13, 14, 16})
_NODE: Final = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 9})
_ATTRIBUTE: Final = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 20})
_TENSOR: Final = frozenset({1, 2, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 16})

Value = int | memoryview
Field = tuple[int, int, Value]


@dataclass
class OnnxFacts:
    """What was found in a file.

    Attributes:
        opsets: domain to version.
        nodes: with those of inner graphs.
        tensor_bytes: of all initializers and constants.
    """

    opsets: dict[str, int] = field(default_factory=dict)
    nodes: int = 0
    tensor_bytes: int = 0


def check_onnx(data: bytes, name: str) -> OnnxFacts:
    """Refuses a model file that is not whole in itself, or asks for what this version does not know.

    Args:
        name: of the file, for the error.

    Raises:
        BundleError: (peer) not ONNX, external data, an operator set, domain, field or element type that is not
            allowed, or a tensor that claims another size than its bytes have.
    """
    reader = _Reader(name)
    model = memoryview(data)
    graphs = []
    for number, kind, value in reader.fields(model, _MODEL, "model"):
        if number == 1:
            reader.need(MIN_IR <= reader.whole(kind, value) <= MAX_IR, "an IR version that is not known")
        elif number == 7:
            graphs.append(reader.view(kind, value))
        elif number == 8:
            reader.note_opset(reader.view(kind, value))
    reader.need(len(graphs) == 1, "not one graph")
    reader.need(bool(reader.facts.opsets), "no operator set")
    reader.graph(graphs[0], 1)
    return reader.facts


class _Reader:
    """Walks one file."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.facts = OnnxFacts()

    def need(self, condition: bool, otherwise: str) -> None:
        if not condition:
            raise BundleError(f"{self._name}: {otherwise}", name=self._name)

    # ---- the encoding ----

    def fields(self, data: memoryview, allowed: frozenset[int], what: str) -> Iterator[Field]:
        """The fields of a message: number, kind, and a number or a view."""
        at, end = 0, len(data)
        while at < end:
            tag, at = self.varint(data, at)
            number, kind = tag >> 3, tag & 7
            self.need(number in allowed, f"a {what} with field {number}")
            value: Value
            if kind == _VARINT:
                value, at = self.varint(data, at)
            else:
                if kind == _BYTES:
                    length, at = self.varint(data, at)
                else:
                    self.need(kind in (_FIXED32, _FIXED64), f"a {what} in an encoding that is not known")
                    length = 4 if kind == _FIXED32 else 8
                self.need(length <= end - at, f"a {what} that ends early")
                value = data[at : at + length]
                at += length
            yield number, kind, value

    def varint(self, data: memoryview, at: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 64, 7):
            self.need(at < len(data), "a number that ends early")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise BundleError(f"{self._name}: a number that does not end", name=self._name)

    def whole(self, kind: int, value: Value) -> int:
        self.need(kind == _VARINT and isinstance(value, int), "text where a number belongs")
        return value if isinstance(value, int) else 0

    def view(self, kind: int, value: Value) -> memoryview:
        self.need(kind == _BYTES and isinstance(value, memoryview), "a number where text belongs")
        return value if isinstance(value, memoryview) else memoryview(b"")

    def text(self, kind: int, value: Value) -> str:
        view = self.view(kind, value)
        self.need(len(view) <= _MAX_NAME_BYTES, "a name that is too long")
        return bytes(view).decode("utf-8", "replace")

    # ---- the messages ----

    def note_opset(self, data: memoryview) -> None:
        domain, version = "", 0
        for number, kind, value in self.fields(data, _OPSET, "operator set"):
            if number == 1:
                domain = self.text(kind, value)
            else:
                version = self.whole(kind, value)
        self.need(domain in DOMAINS, f"operators of the domain {domain!r}")
        first, last = DOMAINS[domain]
        self.need(first <= version <= last, f"operator set {version} of {domain or 'ai.onnx'}")
        self.need(domain not in self.facts.opsets, "two operator sets of one domain")
        self.facts.opsets[domain] = version

    def graph(self, data: memoryview, depth: int) -> None:
        self.need(depth <= MAX_DEPTH, "graphs that are nested too deep")
        for number, kind, value in self.fields(data, _GRAPH, "graph"):
            if number == 1:
                self.node(self.view(kind, value), depth)
            elif number == 5:
                self.tensor(self.view(kind, value))

    def node(self, data: memoryview, depth: int) -> None:
        self.facts.nodes += 1
        self.need(self.facts.nodes <= MAX_NODES, "too many nodes")
        domain = ""
        for number, kind, value in self.fields(data, _NODE, "node"):
            if number == 7:
                domain = self.text(kind, value)
            elif number == 5:
                self.attribute(self.view(kind, value), depth)
        self.need(domain in self.facts.opsets, f"an operator of the domain {domain!r}")

    def attribute(self, data: memoryview, depth: int) -> None:
        seen: set[int] = set()
        for number, kind, value in self.fields(data, _ATTRIBUTE, "attribute"):
            inner: Callable[[memoryview], None] | None = None
            if number in (5, 10):
                inner = self.tensor
            elif number in (6, 11):
                inner = lambda graph: self.graph(graph, depth + 1)  # noqa: E731
            if inner is not None:
                # Two of a field that stands once are merged by other readers, into what was not looked at here.
                self.need(number in (10, 11) or number not in seen, "an attribute with two values")
                seen.add(number)
                inner(self.view(kind, value))

    def tensor(self, data: memoryview) -> None:
        elements, dimensions, bits, found = 1, 0, 0, 0
        for number, kind, value in self.fields(data, _TENSOR, "tensor"):
            if number == 1:
                for size in self.numbers(kind, value):
                    dimensions += 1
                    self.need(
                        dimensions <= MAX_DIMENSIONS and size <= MAX_ELEMENTS, "a tensor that is too large"
                    )
                    elements *= size
            elif number == 2:
                kind_of_element = self.whole(kind, value)
                self.need(kind_of_element in _BITS and not bits, "a tensor of a type that is not known")
                bits = _BITS[kind_of_element]
            elif number == 13 or (number == 14 and self.whole(kind, value) == _EXTERNAL):
                raise BundleError(f"{self._name}: a tensor whose data is in another file", name=self._name)
            elif number == 9:
                self.need(not found, "a tensor with its data twice")
                found = -len(self.view(kind, value)) - 1
            elif number in (4, 5, 7, 10, 11):
                self.need(found >= 0, "a tensor with its data twice")
                found += self.count(number, kind, value)
        self.need(elements <= MAX_ELEMENTS, "a tensor that is too large")
        size_bytes = math.ceil(elements * bits / 8)
        is_whole = -found - 1 == size_bytes if found < 0 else found == elements and bits >= 8
        self.need(
            bool(bits) and (is_whole or elements == found == 0), "a tensor of another size than its data"
        )
        self.facts.tensor_bytes += size_bytes

    def numbers(self, kind: int, value: Value) -> Iterator[int]:
        """Repeated numbers, packed or one by one."""
        if isinstance(value, int):
            yield value
            return
        at, view = 0, self.view(kind, value)
        while at < len(view):
            number, at = self.varint(view, at)
            yield number

    def count(self, number: int, kind: int, value: Value) -> int:
        """How many elements a typed field holds."""
        if kind != _BYTES or isinstance(value, int):
            return 1
        if number in (4, 10):
            return len(value) // (4 if number == 4 else 8)
        return len(bytes(value).translate(None, _HIGH))
