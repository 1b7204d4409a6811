"""What mutations begin with: small graphs made by hand that use what crashes runtimes (loops, branches, shapes that
depend on values, integer division, recurrent and quantized operators), and graphs of the zoo as devices hold them.

Law of the file: the same files each time; every seed takes float32 [N, 16] (those of the zoo: their own windows) and
passes its self-test as it is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

FEATURES, CLASSES = 16, 3
_ZOO = ("digits_mlp", "watch_cnn1d", "tiny_transformer")


@dataclass(frozen=True, slots=True)
class Seed:
    """A sound model: its two files, and the shape of its windows and of an answer, without the batch."""

    name: str
    int8: bytes
    float32: bytes
    input_shape: tuple[int, ...]
    answer_shape: tuple[int, ...]

    @property
    def is_anomaly(self) -> bool:
        return self.answer_shape == self.input_shape


class _Graph:
    """Puts a graph together, node by node."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._rng = np.random.default_rng(5)

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self._rng.normal(0.0, 0.3, shape), np.float32)

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        names = [f"n{len(self.nodes)}_{each}" for each in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0]

    def done(self, last: str, width: int) -> bytes:
        """Ends in a layer of `CLASSES` scores."""
        self.add("Gemm", last, self.weight(width, CLASSES), self.weight(CLASSES))
        self.nodes[-1].output[0] = "logits"
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", FEATURES])
        y = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])
        graph = helper.make_graph(self.nodes, "seed", [x], [y], self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        data: bytes = model.SerializeToString()
        return data


def _dense() -> bytes:
    g = _Graph()
    h = g.add("Relu", g.add("Gemm", "x", g.weight(FEATURES, 12), g.weight(12)))
    h = g.add("LayerNormalization", h, g.weight(12), g.weight(12), axis=-1)
    return g.done(g.add("Softmax", h, axis=-1), 12)


def _loops() -> bytes:
    g = _Graph()
    at, keep, value = "i", "go", "v"
    body = helper.make_graph(
        [
            helper.make_node("Identity", [keep], ["go_out"]),
            helper.make_node("Tanh", [value], ["t"]),
            helper.make_node("Add", ["t", value], ["v_out"]),
            helper.make_node("ReduceMean", ["v_out"], ["m"], keepdims=0),
        ],
        "body",
        [
            helper.make_tensor_value_info(at, TensorProto.INT64, []),
            helper.make_tensor_value_info(keep, TensorProto.BOOL, []),
            helper.make_tensor_value_info(value, TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_out", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("m", TensorProto.FLOAT, []),
        ],
    )
    h = g.add("Loop", g.constant(3), g.constant(True, bool), "x", outputs=2, body=body)

    def branch(name: str, kind: str) -> Any:
        info = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(kind, [h], [f"{name}_out"])], name, [], [info])

    sign = g.add("Greater", g.add("ReduceMean", h, keepdims=0), g.constant(0.0, np.float32))
    return g.done(
        g.add("If", sign, then_branch=branch("up", "Relu"), else_branch=branch("down", "Neg")), FEATURES
    )


def _shapes() -> bytes:
    g = _Graph()
    shape = g.add("Shape", "x")
    n = g.add("Gather", shape, g.constant([0]), axis=0)
    zeros = g.add("ConstantOfShape", shape)
    h = g.add("Add", "x", zeros)
    h = g.add("Reshape", h, g.add("Concat", n, g.constant([4, 4]), axis=0))
    h = g.add("Transpose", h, perm=[0, 2, 1])
    h = g.add("Pad", h, g.constant([0, 1, 0, 0, 0, 0]), mode="constant")
    h = g.add("Slice", h, g.constant([1]), g.constant([5]), g.constant([1]))
    h = g.add("Expand", h, g.constant([1, 4, 4]))
    h = g.add("Tile", h, g.constant([1, 1, 2]))
    return g.done(g.add("Flatten", h, axis=1), 32)


def _integers() -> bytes:
    g = _Graph()
    whole = g.add("Cast", g.add("Mul", "x", g.constant(100.0, np.float32)), to=TensorProto.INT64)
    whole = g.add("Clip", whole, g.constant(-50), g.constant(50))
    h = g.add("Div", whole, g.constant(7))
    h = g.add("Mod", g.add("Abs", h), g.constant(13))
    h = g.add("GatherElements", whole, g.add("Mod", g.add("Abs", whole), g.constant(FEATURES)), axis=1)
    h = g.add("CumSum", h, g.constant(1))
    top = g.add("TopK", g.add("Cast", h, to=TensorProto.FLOAT), g.constant([5]), outputs=2, axis=1)
    eye = g.add(
        "OneHot", g.add("ArgMax", "x", axis=1, keepdims=0), g.constant(8), g.constant([0.0, 1.0], np.float32)
    )
    return g.done(g.add("Concat", top, eye, axis=1), 13)


def _recurrent() -> bytes:
    g = _Graph()
    steps = g.add("Transpose", g.add("Reshape", "x", g.constant([0, 4, 4])), perm=[1, 0, 2])
    h = g.add(
        "LSTM", steps, g.weight(1, 20, 4), g.weight(1, 20, 5), g.weight(1, 40), outputs=2, hidden_size=5
    )
    h = g.add("Squeeze", h, g.constant([1]))
    h = g.add("GRU", h, g.weight(1, 9, 5), g.weight(1, 9, 3), g.weight(1, 18), outputs=2, hidden_size=3)
    h = g.add("Transpose", g.add("Squeeze", h, g.constant([1])), perm=[1, 0, 2])
    return g.done(g.add("Flatten", h, axis=1), 12)


def _quantized() -> bytes:
    g = _Graph()
    scale, zero = g.constant(0.05, np.float32), g.constant(128, np.uint8)
    q = g.add("QuantizeLinear", "x", scale, zero)
    w = g.constant(np.arange(FEATURES * 8).reshape(FEATURES, 8) % 251, np.uint8)
    q = g.add("QLinearMatMul", q, scale, zero, w, scale, zero, g.constant(0.4, np.float32), zero)
    h = g.add("DequantizeLinear", q, g.constant(0.4, np.float32), zero)
    wq = g.constant(np.arange(-32, 32).reshape(8, 8), np.int8)
    dw = g.add(
        "DequantizeLinear",
        wq,
        g.constant(np.full(8, 0.02), np.float32),
        g.constant(np.zeros(8), np.int8),
        axis=1,
    )
    return g.done(g.add("MatMul", h, dw), 8)


def _images() -> bytes:
    g = _Graph()
    h = g.add("Reshape", "x", g.constant([-1, 1, 4, 4]))
    h = g.add("Conv", h, g.weight(4, 1, 3, 3), g.weight(4), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    var = g.constant([1.0, 1.0, 1.0, 1.0], np.float32)
    h = g.add("BatchNormalization", h, g.weight(4), g.weight(4), g.weight(4), var)
    h = g.add("Resize", h, "", g.constant([1.0, 1.0, 2.0, 2.0], np.float32), mode="linear")
    h = g.add("MaxPool", h, kernel_shape=[2, 2], strides=[2, 2])
    h = g.add("ConvTranspose", h, g.weight(4, 2, 2, 2), strides=[2, 2], kernel_shape=[2, 2])
    h = g.add("AveragePool", h, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    return g.done(g.add("Flatten", g.add("Clip", h), axis=1), 32)


_BY_HAND: dict[str, Callable[[], bytes]] = {
    "dense": _dense,
    "loops": _loops,
    "shapes": _shapes,
    "integers": _integers,
    "recurrent": _recurrent,
    "quantized": _quantized,
    "images": _images,
}


def seeds_by_hand() -> tuple[Seed, ...]:
    """The small graphs."""
    made = {name: make() for name, make in _BY_HAND.items()}
    return tuple(Seed(name, data, data, (FEATURES,), (CLASSES,)) for name, data in made.items())


def seeds_of_zoo(folder: Path) -> tuple[Seed, ...]:
    """Untrained models of the zoo, from the folder where an earlier call put them.

    They are made in a process of their own, since what makes them leaves threads behind, and trials fork.
    """
    if not all((folder / f"{name}.json").is_file() for name in _ZOO):
        subprocess.run([sys.executable, "-m", "tests.fuzz.models.seeds", str(folder)], check=True)
    found = []
    for name in _ZOO:
        shapes = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        files = [(folder / f"{name}.{variant}.onnx").read_bytes() for variant in ("int8", "float32")]
        found.append(Seed(name, files[0], files[1], tuple(shapes["input"]), tuple(shapes["answer"])))
    return tuple(found)


def make_seeds_of_zoo(folder: Path) -> None:
    """Exports and quantizes them as every model is; takes seconds each."""
    from models.build import build_bundle
    from models.zoo import load

    folder.mkdir(parents=True, exist_ok=True)
    for name in _ZOO:
        chosen = load(name)
        x: NDArray[np.float32] = (
            np.random.default_rng(1).normal(0, 1, (64, *chosen.input_shape)).astype(np.float32)
        )
        with tempfile.TemporaryDirectory(prefix="shoal-seed-") as made:
            bundle = build_bundle(
                chosen.make_model(), chosen.task, chosen.input_shape, x, name=name, out_dir=Path(made) / "b"
            )
            contents = _contents(bundle)
        answer = bundle.manifest.golden_outputs_shape[2:]
        for variant, data in zip(("int8", "float32"), contents, strict=True):
            (folder / f"{name}.{variant}.onnx").write_bytes(data)
        shapes = {"input": list(chosen.input_shape), "answer": list(answer)}
        (folder / f"{name}.json").write_text(json.dumps(shapes), encoding="utf-8")


def _contents(bundle: Any) -> tuple[bytes, bytes]:
    from wire.materialize import materialize_float32, materialize_int8

    checkpoint = bundle.checkpoint()
    template, float32 = (bundle.read(name) for name in ("template.onnx", "float32.onnx"))
    return (
        materialize_int8(template, bundle.manifest, checkpoint),
        materialize_float32(float32, bundle.manifest, checkpoint),
    )


if __name__ == "__main__":
    make_seeds_of_zoo(Path(sys.argv[1]))
