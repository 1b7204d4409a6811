"""What is refused in an ONNX file before a runtime sees it: files of the `onnx` package, spoiled one by one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from wire.errors import BundleError
from wire.onnx_file import DOMAINS, MAX_DEPTH, check_onnx

Spoil = Callable[[Any], None]


def model(*nodes: Any, opset: int = 18) -> Any:
    weight = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "w")
    graph = helper.make_graph(
        list(nodes) or [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def nested(depth: int) -> Any:
    """A graph within a graph, `depth` times, with an initializer in the innermost."""
    inner = helper.make_graph([], "leaf", [], [], [numpy_helper.from_array(np.zeros(2, np.float32), "c")])
    for _ in range(depth - 2):
        inner = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=inner)], "g", [], [])
    return helper.make_node("If", ["x"], ["y"], then_branch=inner)


def test_model_of_the_onnx_package_is_let_through() -> None:
    facts = check_onnx(model().SerializeToString(), "m.onnx")
    assert facts.opsets == {"": 18}
    assert facts.nodes == 1
    assert facts.tensor_bytes == 24


@pytest.mark.parametrize(
    "values",
    [
        np.float32(3.5),
        np.zeros((0, 4), np.float32),
        np.arange(5, dtype=np.int64),
        np.ones(3, np.float16),
        np.array([True, False]),
        np.arange(4, dtype=np.int8),
        np.arange(4, dtype=np.float64),
    ],
)
@pytest.mark.parametrize("is_raw", [True, False])
def test_tensors_of_every_spelling_are_let_through(values: Any, is_raw: bool) -> None:
    made = model()
    array = np.asarray(values)
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    content = array.tobytes() if is_raw else array.ravel().tolist()
    made.graph.initializer.append(helper.make_tensor("c", kind, array.shape, content, raw=is_raw))
    check_onnx(made.SerializeToString(), "m.onnx")


def external(made: Any) -> None:
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def external_list_alone(made: Any) -> None:
    made.graph.initializer[0].external_data.add(key="location", value="x")


def external_mark_alone(made: Any) -> None:
    made.graph.initializer[0].data_location = TensorProto.EXTERNAL


def external_in_a_constant(made: Any) -> None:
    tensor = numpy_helper.from_array(np.zeros(2, np.float32), "c")
    tensor.data_location = TensorProto.EXTERNAL
    made.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def external_in_an_inner_graph(made: Any) -> None:
    made.graph.node.append(nested(3))
    made.graph.node[-1].attribute[0].g.node[0].attribute[0].g.initializer[
        0
    ].data_location = TensorProto.EXTERNAL


def foreign_domain(made: Any) -> None:
    made.opset_import.append(helper.make_opsetid("com.evil", 1))


def foreign_node(made: Any) -> None:
    made.graph.node[0].domain = "com.evil"


def future_opset(made: Any) -> None:
    made.opset_import[0].version = DOMAINS[""][1] + 1


def ancient_opset(made: Any) -> None:
    made.opset_import[0].version = 1


def no_opset(made: Any) -> None:
    made.ClearField("opset_import")


def two_opsets(made: Any) -> None:
    made.opset_import.append(helper.make_opsetid("", 17))


def future_ir(made: Any) -> None:
    made.ir_version = 99


def local_function(made: Any) -> None:
    made.functions.add(name="f", domain="")


def training_info(made: Any) -> None:
    made.training_info.add()


def sparse(made: Any) -> None:
    made.graph.sparse_initializer.add()


def huge_claim(made: Any) -> None:
    made.graph.initializer[0].dims[0] = 2**40


def huge_product(made: Any) -> None:
    made.graph.initializer[0].dims[:] = [2**14, 2**14, 2]


def negative_dimension(made: Any) -> None:
    made.graph.initializer[0].dims[0] = -1


def too_many_dimensions(made: Any) -> None:
    made.graph.initializer[0].dims[:] = [1] * 9


def larger_than_its_data(made: Any) -> None:
    made.graph.initializer[0].dims[0] = 3


def smaller_than_its_data(made: Any) -> None:
    made.graph.initializer[0].dims[0] = 1


def data_twice(made: Any) -> None:
    made.graph.initializer[0].float_data.extend([0.0] * 6)


def strings(made: Any) -> None:
    made.graph.initializer[0].data_type = TensorProto.STRING


def no_type(made: Any) -> None:
    made.graph.initializer[0].ClearField("data_type")


def nested_too_deep(made: Any) -> None:
    made.graph.node.append(nested(MAX_DEPTH + 1))


SPOILED: list[tuple[Spoil, str]] = [
    (external, "another file"),
    (external_list_alone, "another file"),
    (external_mark_alone, "another file"),
    (external_in_a_constant, "another file"),
    (external_in_an_inner_graph, "another file"),
    (foreign_domain, "domain 'com.evil'"),
    (foreign_node, "domain 'com.evil'"),
    (future_opset, "operator set"),
    (ancient_opset, "operator set 1"),
    (no_opset, "no operator set"),
    (two_opsets, "two operator sets"),
    (future_ir, "IR version"),
    (local_function, "field 25"),
    (training_info, "field 20"),
    (sparse, "field 15"),
    (huge_claim, "too large"),
    (huge_product, "too large"),
    (negative_dimension, "too large"),
    (too_many_dimensions, "too large"),
    (larger_than_its_data, "another size"),
    (smaller_than_its_data, "another size"),
    (data_twice, "data twice"),
    (strings, "type that is not known"),
    (no_type, "another size"),
    (nested_too_deep, "nested too deep"),
]


@pytest.mark.parametrize(("spoil", "reason"), SPOILED, ids=lambda value: getattr(value, "__name__", ""))
def test_model_that_may_not_reach_a_runtime_is_refused(spoil: Spoil, reason: str) -> None:
    made = model()
    check_onnx(made.SerializeToString(), "m.onnx")
    spoil(made)
    with pytest.raises(BundleError, match=reason):
        check_onnx(made.SerializeToString(), "m.onnx")


def test_graph_that_is_given_twice_is_refused() -> None:
    """Other readers merge them: what was checked is not what they would run."""
    made = model().SerializeToString()
    more = onnx.ModelProto()
    more.graph.name = "again"
    with pytest.raises(BundleError, match="not one graph"):
        check_onnx(made + more.SerializeToString(), "m.onnx")


def test_attribute_with_two_tensors_is_refused() -> None:
    tensor = numpy_helper.from_array(np.zeros(2, np.float32), "c")
    made = model(helper.make_node("Constant", [], ["c"], value=tensor))
    plain = onnx.ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 18)]).SerializeToString()
    once = made.graph.node[0].attribute[0].SerializeToString()
    twice = once + onnx.AttributeProto(t=tensor).SerializeToString()
    check_onnx(plain + _field(7, _field(1, _field(5, once))), "m.onnx")
    with pytest.raises(BundleError, match="two values"):
        check_onnx(plain + _field(7, _field(1, _field(5, twice))), "m.onnx")


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\x08", b"\xff" * 40, b"\x3a\xff\xff\xff\xff\x0f", b"not onnx" * 9]
)
def test_bytes_that_are_no_model_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError):
        check_onnx(data, "m.onnx")


def test_damaged_models_give_our_error_or_a_model() -> None:
    good = model(nested(3), helper.make_node("MatMul", ["x", "w"], ["y"])).SerializeToString()
    draw = random.Random(4)
    refused = 0
    for _ in range(4000):
        damaged = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        if draw.random() < 0.2:
            del damaged[draw.randrange(len(damaged)) :]
        try:
            check_onnx(bytes(damaged), "m.onnx")
        except BundleError:
            refused += 1
    assert refused > 1000


def test_number_that_never_ends_is_refused_at_once() -> None:
    with pytest.raises(BundleError, match="does not end"):
        check_onnx(b"\x80" * 1_000_000, "m.onnx")


def _field(number: int, data: bytes) -> bytes:
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data
