"""Damage to a model by seed: attributes, shapes, values, operators, order, inner graphs, huge claims, and raw bytes.

Law of the file: the same seed and number give the same bytes; a mutant that is cut out of raw bytes still parses, since
what does not parse reaches no runtime.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from tests.fuzz.models.seeds import Seed

_WHOLE = (
    0,
    1,
    -1,
    2,
    3,
    7,
    8,
    64,
    -2,
    255,
    65_535,
    2**20,
    2**31 - 1,
    2**31,
    -(2**31),
    2**40,
    2**63 - 1,
    -(2**63),
)
_REAL = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-3, 3.4e38, -3.4e38, 1e10, float("nan"), float("inf"), float("-inf"))
_DIMS = (0, 1, 2, 3, 17, 255, 4096, 2**20, 2**28, 2**31 - 1, 2**31, 2**33, 2**62, -1, -(2**31))
_UNARY = (
    "Abs", "Acos", "Atanh", "Ceil", "Cos", "Erf", "Exp", "Floor", "HardSigmoid", "Identity", "IsNaN", "Log", "Neg",
    "NonZero", "Not", "Reciprocal", "Relu", "Round", "Shape", "Sign", "Size", "Softmax", "Softplus", "Sqrt", "Squeeze",
    "Tanh", "Transpose", "Flatten", "GlobalAveragePool", "GlobalMaxPool", "ReduceMax", "ReduceProd", "ReduceSum",
    "ArgMax", "LpNormalization", "Det", "Hardmax", "MeanVarianceNormalization", "Unique", "DynamicQuantizeLinear",
    "BitwiseNot", "SequenceConstruct", "StringNormalizer", "OptionalHasElement", "Bernoulli", "RandomNormalLike",
)  # fmt: skip
_BINARY = (
    "Add", "Sub", "Mul", "Div", "Mod", "Pow", "MatMul", "Gemm", "And", "Less", "Equal", "Max", "PRelu", "BitShift",
    "Expand", "Tile", "Reshape", "Gather", "GatherND", "GatherElements", "TopK", "OneHot", "Pad", "Slice", "Where",
    "Resize", "Range", "CumSum", "Split", "Unsqueeze", "Squeeze", "ScatterND", "ConcatFromSequence", "Compress",
    "Conv", "ConvTranspose", "ConvInteger", "MatMulInteger", "GridSample", "RoiAlign", "MaxRoiPool", "MaxUnpool",
    "AffineGrid", "Col2Im", "Concat", "Einsum", "STFT", "Trilu", "ReverseSequence", "NonMaxSuppression", "GRU", "LSTM",
    "RNN", "InstanceNormalization", "GroupNormalization", "LayerNormalization", "BatchNormalization", "SplitToSequence",
    "SequenceAt", "DepthToSpace", "SpaceToDepth", "LRN", "EyeLike", "ConstantOfShape", "HannWindow", "CastLike",
    "DFT", "MelWeightMatrix", "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss", "TfIdfVectorizer", "Upsample",
)  # fmt: skip
_TYPES = (1, 2, 3, 6, 7, 9, 10, 11, 12, 13, 16)
_ATTRIBUTES = (
    "axis", "axes", "perm", "kernel_shape", "strides", "pads", "dilations", "group", "hidden_size", "direction", "mode",
    "to", "k", "batch_dims", "equation", "alpha", "beta", "epsilon", "keepdims", "output_shape", "storage_order",
    "ceil_mode", "num_outputs", "blocksize", "size", "layout", "transA", "activations", "clip", "exclusive",
)  # fmt: skip
_TEXTS = (
    b"",
    b"linear",
    b"cubic",
    b"reverse",
    b"bidirectional",
    b"ij,jk->ik",
    b"...i,...i",
    b"ii->",
    b"\xff\xfe",
    b"x" * 5000,
)

Model = Any


def mutant(random: Random, seeds: Sequence[Seed]) -> tuple[Seed, str, bytes]:
    """A seed, what was done to it, and the file that came of it."""
    seed = random.choice(seeds)
    data = random.choice((seed.int8, seed.float32))
    if random.random() < 0.25:
        raw = _raw(random, data)
        if raw is not None:
            return seed, "bytes", raw
    model = onnx.ModelProto()
    model.ParseFromString(data)
    names = []
    for _ in range(random.choice((1, 1, 1, 2, 3, 5))):
        change = random.choices(_CHANGES, [weight for _, weight in _WEIGHTS])[0]
        try:
            change(random, model)
        except (ValueError, TypeError, IndexError, OverflowError, DecodeError):
            continue  # this change has no meaning there
        names.append(change.__name__.strip("_"))
    return seed, "+".join(names) or "nothing", model.SerializeToString()


def _raw(random: Random, data: bytes) -> bytes | None:
    """Flipped, cut or doubled bytes that are still a model; None after a few that are not."""
    for _ in range(20):
        out = bytearray(data)
        for _ in range(random.choice((1, 1, 2, 4, 8, 16))):
            at = random.randrange(len(out))
            kind = random.random()
            if kind < 0.5:
                out[at] ^= 1 << random.randrange(8)
            elif kind < 0.8:
                out[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
            elif kind < 0.9:
                end = at + random.randrange(1, 64)
                out[at:at] = out[at:end]
            else:
                del out[at : at + random.randrange(1, 8)]
        try:
            onnx.ModelProto().ParseFromString(bytes(out))
        except DecodeError:
            continue
        return bytes(out)
    return None


# ---- where ---------------------------------------------------------------------------------------------------


def _graphs(graph: Any) -> list[Any]:
    found = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                found += _graphs(attribute.g)
    return found


def _graph(random: Random, model: Model) -> Any:
    return random.choice(_graphs(model.graph))


def _node(random: Random, model: Model) -> Any:
    return random.choice(_graph(random, model).node)


def _initializer(random: Random, model: Model) -> Any:
    return random.choice(model.graph.initializer)


def _value(random: Random, graph: Any) -> str:
    """Some tensor's name."""
    names = [name for node in graph.node for name in (*node.input, *node.output) if name]
    return str(random.choice([*names, *(each.name for each in graph.initializer), "x"]))


# ---- what ----------------------------------------------------------------------------------------------------


def _change_attribute(random: Random, model: Model) -> None:
    attribute = random.choice(_node(random, model).attribute)
    if attribute.type == AttributeProto.INT:
        attribute.i = random.choice(_WHOLE)
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = random.choice(_REAL)
    elif attribute.type == AttributeProto.STRING:
        attribute.s = random.choice(_TEXTS)
    elif attribute.type == AttributeProto.INTS:
        values = list(attribute.ints)
        values[random.randrange(len(values))] = random.choice(_WHOLE)
        if random.random() < 0.3:
            values = values * random.choice((0, 2, 50))
        attribute.ints[:] = values
    elif attribute.type == AttributeProto.TENSOR:
        _damage(random, attribute.t)


def _drop_attribute(random: Random, model: Model) -> None:
    attributes = _node(random, model).attribute
    del attributes[random.randrange(len(attributes))]


def _add_attribute(random: Random, model: Model) -> None:
    node, name = _node(random, model), random.choice(_ATTRIBUTES)
    given: Any = random.choice(
        (
            random.choice(_WHOLE),
            random.choice(_REAL),
            random.choice(_TEXTS),
            random.choices(_WHOLE, k=random.randrange(1, 6)),
        )
    )
    kept = [each for each in node.attribute if each.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, given)])


def _change_dimension(random: Random, model: Model) -> None:
    graph = _graph(random, model)
    infos = [*graph.input, *graph.output, *graph.value_info]
    dims = random.choice(infos).type.tensor_type.shape.dim
    kind = random.random()
    if kind < 0.6:
        dims[random.randrange(len(dims))].dim_value = random.choice(_DIMS)
    elif kind < 0.8:
        dims.add().dim_value = random.choice(_DIMS)
    else:
        del dims[random.randrange(len(dims))]


def _change_type(random: Random, model: Model) -> None:
    graph = _graph(random, model)
    infos = [*graph.input, *graph.output, *graph.value_info]
    random.choice(infos).type.tensor_type.elem_type = random.choice(_TYPES)


def _damage_initializer(random: Random, model: Model) -> None:
    _damage(random, _initializer(random, model))


def _damage(random: Random, tensor: Any) -> None:
    """Other values, another shape or another type, with as many bytes as that needs."""
    array = numpy_helper.to_array(tensor).copy()
    kind = random.random()
    if kind < 0.5 and array.size:
        flat = array.reshape(-1)
        pool = _REAL if array.dtype.kind == "f" else _WHOLE
        for _ in range(random.choice((1, 1, 3, array.size))):
            value = random.choice(pool)
            flat[random.randrange(flat.size)] = (
                value if array.dtype.kind == "f" else np.array(value).astype(array.dtype)
            )
    elif kind < 0.65:
        array = array.reshape(random.choice(((-1,), (1, *array.shape), (*array.shape, 1), array.shape[::-1])))
    elif kind < 0.75:
        array = np.resize(array, random.choice(((), (0,), (1,), (2, 2), (0, 3), (7, 1, 5))))
    elif kind < 0.9:
        array = array.astype(
            random.choice((np.float32, np.float64, np.int64, np.int32, np.uint8, np.int8, np.float16, bool))
        )
    else:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(_DIMS)
        return
    name = tensor.name
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def _external_data(random: Random, model: Model) -> None:
    tensor = _initializer(random, model)
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = (
        "location",
        random.choice(("/etc/passwd", "../../secret", "weights.bin", "/dev/zero")),
    )


def _swap_operator(random: Random, model: Model) -> None:
    node = _node(random, model)
    node.op_type = random.choice(_UNARY if len(node.input) < 2 else _BINARY)


def _insert_unary(random: Random, model: Model) -> None:
    _insert(random, model, lambda name: [name], random.choice(_UNARY))


def _insert_binary(random: Random, model: Model) -> None:
    graph = model.graph
    if random.random() < 0.6:
        other = f"made{random.randrange(10**9)}"
        count = random.randrange(1, 5)
        array: Any = np.array(random.choices(_WHOLE, k=count), np.int64)
        if random.random() < 0.4:
            array = np.array(random.choices(_REAL, k=count), np.float32)
        graph.initializer.append(numpy_helper.from_array(array, other))
    else:
        other = _value(random, graph)
    extra = [_value(random, graph) for _ in range(random.choice((0, 0, 1, 3)))]
    _insert(random, model, lambda name: [name, other, *extra], random.choice(_BINARY))


def _insert(random: Random, model: Model, inputs: Callable[[str], list[str]], kind: str) -> None:
    """Puts a node before one that exists."""
    nodes = model.graph.node
    at = random.randrange(len(nodes))
    node = nodes[at]
    place = random.randrange(len(node.input))
    made = f"put{random.randrange(10**9)}"
    new = helper.make_node(kind, inputs(node.input[place]), [made])
    if kind in ("Cast", "Einsum", "Concat"):
        new.attribute.append(helper.make_attribute({"Cast": "to", "Einsum": "equation"}.get(kind, "axis"), 1))
    node.input[place] = made
    rest = [copy.deepcopy(each) for each in nodes]
    del nodes[:]
    nodes.extend([*rest[:at], new, *rest[at:]])


def _insert_cast(random: Random, model: Model) -> None:
    """To another type and back, with something that depends on values in between."""
    nodes = model.graph.node
    at = random.randrange(len(nodes))
    node = nodes[at]
    place = random.randrange(len(node.input))
    tag, before = random.randrange(10**9), node.input[place]
    to = random.choice(_TYPES)
    kind = random.choice(
        ("Div", "Mod", "Pow", "Range", "ConstantOfShape", "Tile", "Gather", "NonZero", "BitShift", "Add")
    )
    between = [f"cast{tag}"] if kind in ("ConstantOfShape", "NonZero") else [f"cast{tag}", f"cast{tag}"]
    new = [
        helper.make_node("Cast", [before], [f"cast{tag}"], to=to),
        helper.make_node(kind, between, [f"mid{tag}"]),
        helper.make_node("Cast", [f"mid{tag}"], [f"back{tag}"], to=TensorProto.FLOAT),
    ]
    node.input[place] = f"back{tag}"
    rest = [copy.deepcopy(each) for each in nodes]
    del nodes[:]
    nodes.extend([*rest[:at], *new, *rest[at:]])


def _rewire(random: Random, model: Model) -> None:
    graph = _graph(random, model)
    node = random.choice(graph.node)
    node.input[random.randrange(len(node.input))] = random.choice(
        ("", _value(random, graph), _value(random, model.graph))
    )


def _more_inputs(random: Random, model: Model) -> None:
    graph = _graph(random, model)
    random.choice(graph.node).input.extend(_value(random, graph) for _ in range(random.choice((1, 2, 30))))


def _fewer_inputs(random: Random, model: Model) -> None:
    node = _node(random, model)
    del node.input[random.randrange(len(node.input))]


def _rename_output(random: Random, model: Model) -> None:
    graph = _graph(random, model)
    node = random.choice(graph.node)
    node.output[random.randrange(len(node.output))] = random.choice(("", _value(random, graph)))


def _shuffle(random: Random, model: Model) -> None:
    graph = _graph(random, model)
    nodes = [copy.deepcopy(each) for each in graph.node]
    random.shuffle(nodes)
    del graph.node[:]
    graph.node.extend(nodes)


def _double(random: Random, model: Model) -> None:
    nodes = _graph(random, model).node
    nodes.append(copy.deepcopy(random.choice(nodes)))


def _drop(random: Random, model: Model) -> None:
    nodes = _graph(random, model).node
    del nodes[random.randrange(len(nodes))]


def _nest(random: Random, model: Model) -> None:
    """A graph in branches of branches around one value."""
    depth = random.choice((1, 3, 6, 7, 20, 200))
    name = _value(random, model.graph)
    inner: Any = None
    for level in range(depth):
        node = (
            helper.make_node("Tanh", [name], [f"l{level}"])
            if inner is None
            else helper.make_node("If", ["truth"], [f"l{level}"], then_branch=inner, else_branch=inner)
        )
        inner = helper.make_graph(
            [node], f"g{level}", [], [helper.make_tensor_value_info(f"l{level}", 1, None)]
        )
        if inner.ByteSize() > 2**20:
            break
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "truth"))
    node = helper.make_node("If", ["truth"], ["nested"], then_branch=inner, else_branch=inner)
    nodes = [copy.deepcopy(each) for each in model.graph.node]
    nodes[random.randrange(len(nodes))].input[0] = "nested"
    del model.graph.node[:]
    model.graph.node.extend([node, *nodes])


def _loop_long(random: Random, model: Model) -> None:
    """A loop of many turns, or one that grows what it carries."""
    turns = random.choice((0, 1, 1000, 10**5, 10**7, 2**62, -1))
    kind = random.choice(("Add", "Concat"))
    node = helper.make_node(kind, ["v", "v"], ["v_out"], **({"axis": 0} if kind == "Concat" else {}))
    keep = helper.make_node("Identity", ["go"], ["go_out"])
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [keep, node],
        "turn",
        [info("i", 7, []), info("go", 9, []), info("v", 1, None)],
        [info("go_out", 9, []), info("v_out", 1, None)],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(turns, np.int64), "turns"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "on"))
    loop = helper.make_node("Loop", ["turns", "on", "x"], ["looped"], body=body)
    nodes = [copy.deepcopy(each) for each in model.graph.node]
    nodes[0].input[0] = "looped"
    del model.graph.node[:]
    model.graph.node.extend([loop, *nodes])


def _change_model(random: Random, model: Model) -> None:
    kind = random.randrange(5)
    if kind == 0:
        model.opset_import[0].version = random.choice((1, 6, 7, 13, 17, 21, 23, 24, 25, 99, -1))
    elif kind == 1:
        model.ir_version = random.choice((0, 2, 3, 8, 13, 14, 2**62))
    elif kind == 2:
        model.opset_import.append(
            helper.make_opsetid(random.choice(("com.microsoft", "ai.onnx.ml", "x", "")), 1)
        )
    elif kind == 3:
        _node(random, model).domain = random.choice(("com.microsoft", "ai.onnx", "ai.onnx.ml"))
    else:
        function = model.functions.add()
        function.name, function.domain = "f", ""


_WEIGHTS: tuple[tuple[Callable[[Random, Model], None], int], ...] = (
    (_change_attribute, 10), (_drop_attribute, 3), (_add_attribute, 5), (_change_dimension, 5), (_change_type, 2),
    (_damage_initializer, 14), (_external_data, 1), (_swap_operator, 8), (_insert_unary, 10), (_insert_binary, 12),
    (_insert_cast, 8), (_rewire, 6), (_more_inputs, 2), (_fewer_inputs, 2), (_rename_output, 2), (_shuffle, 2),
    (_double, 1), (_drop, 2), (_nest, 2), (_loop_long, 3), (_change_model, 2),
)  # fmt: skip
_CHANGES = tuple(change for change, _ in _WEIGHTS)
