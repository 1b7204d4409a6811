"""Quantization against onnxruntime's own: bit for bit, for each kind of layer, and again with new parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models import flat
from models.evaluate import answers_of
from models.quantize import Calibrator, Quantized, quantize
from models.quantize.canonical import raw_data_places, to_bytes
from models.quantize.float_graph import build_float_graph
from models.quantize.inference_graph import export_inference
from models.quantize.int8 import quantizable_nodes, quantize_static
from wire.checkpoint import Checkpoint
from wire.errors import ModelError
from wire.materialize import fill_float32, fill_int8

Floats = npt.NDArray[np.float32]


class Normed(nn.Module):
    """BatchNorm behind a convolution with and without bias, depthwise, ReLU6, pools, and one behind a linear."""

    SHAPE = (3, 24)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 8, 5, padding=2, bias=False)
        self.first_norm = nn.BatchNorm1d(8)
        self.second = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.second_norm = nn.BatchNorm1d(8)
        self.hidden = nn.Linear(48, 12)
        self.hidden_norm = nn.BatchNorm1d(12)
        self.last = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool1d(functional.relu(self.first_norm(self.first(x))), 2)
        x = functional.avg_pool1d(functional.relu6(self.second_norm(self.second(x))), 2)
        answer: Tensor = self.last(functional.relu(self.hidden_norm(self.hidden(x.flatten(1)))))
        return answer


class Grouped(nn.Module):
    """GroupNorm, a residual addition and a BatchNorm that nothing can take in: all float32 between int8 layers."""

    SHAPE = (4, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.BatchNorm2d(4)
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 1)
        self.fourth = nn.Conv2d(8, 8, 1)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(self.enter(x))))
        x = functional.relu(self.second(x) + self.third(x))
        x = functional.relu(self.fourth(x) + x)
        answer: Tensor = self.last(x.mean((2, 3)))
        return answer


class Attention(nn.Module):
    """Linear layers over three axes (transposed weights), a product of two activations, LayerNorm, a position table."""

    SHAPE = (6, 10)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.position = nn.Parameter(torch.zeros(1, 10, 8))
        self.norm = nn.LayerNorm(8)
        self.queries = nn.Linear(8, 24, bias=False)
        self.out = nn.Linear(8, 8)
        self.mix = nn.Parameter(torch.zeros(8, 8))
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.transpose(1, 2)) + self.position
        q, k, v = self.queries(self.norm(x)).chunk(3, dim=-1)
        attended = functional.softmax(q @ k.transpose(1, 2) * 8**-0.5, dim=-1) @ v
        x = x + functional.gelu(self.out(attended)) @ self.mix
        answer: Tensor = self.last(x.mean(1))
        return answer


class Autoencoder(nn.Module):
    """A transposed convolution stays float32."""

    SHAPE = (2, 16)

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv1d(2, 6, 4, stride=2, padding=1)
        self.decode = nn.ConvTranspose1d(6, 2, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.decode(functional.relu(self.encode(x)))
        return answer


class Shared(nn.Module):
    """One layer used twice, and a frozen one: each use has its own int8 weight, the frozen one none."""

    SHAPE = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6)
        self.last = nn.Linear(6, 2)
        for parameter in self.frozen.parameters():
            parameter.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.inner(functional.relu(self.inner(x))))
        answer: Tensor = self.last(torch.tanh(self.frozen(x)))
        return answer


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    # with the number of int8 layers
    "normed": (Normed, Normed.SHAPE, 4),
    "grouped": (Grouped, Grouped.SHAPE, 5),
    "attention": (Attention, Attention.SHAPE, 5),
    "autoencoder": (Autoencoder, Autoencoder.SHAPE, 1),
    "shared": (Shared, Shared.SHAPE, 3),
}


def make(make_module: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module whose every parameter and statistic differs from its initial value."""
    torch.manual_seed(seed)
    module = make_module()
    disturb(module, 0.3)
    return module.eval()


def disturb(module: nn.Module, size: float) -> None:
    with torch.no_grad():
        for parameter in flat.params_of(module).values():
            parameter.add_(torch.randn_like(parameter) * size)
        for buffer in flat.buffers_of(module).values():
            buffer.mul_(torch.rand_like(buffer) + 0.5).add_(torch.rand_like(buffer) * size)


def draw(shape: tuple[int, ...], count: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


@dataclass
class Case:
    """A module quantized, and again with other parameters and other windows."""

    module: nn.Module
    shape: tuple[int, ...]
    layers: int
    first: Quantized
    second_windows: Floats
    second: Quantized


@pytest.fixture(scope="module", params=MODULES)
def case(request: pytest.FixtureRequest) -> Case:
    make_module, shape, layers = MODULES[request.param]
    module = make(make_module, seed=1)
    first = quantize(module, shape, "logits", draw(shape, 90))
    other = copy.deepcopy(module)
    disturb(other, 0.2)
    windows = draw(shape, 300, seed=5)
    return Case(module, shape, layers, first, windows, quantize(other, shape, "logits", windows))


def test_materialized_file_is_that_of_quantize_static(case: Case) -> None:
    first = case.first
    assert len(first.int8_layout.layers) == case.layers
    assert fill_int8(first.template, first.int8_layout, first.checkpoint) == first.reference
    assert first.template != first.reference


def test_new_parameters_give_the_file_of_a_new_quantization(case: Case) -> None:
    first, second = case.first, case.second
    assert second.template == first.template
    assert second.float32 == first.float32
    assert second.ranges_graph == first.ranges_graph
    assert second.int8_layout == first.int8_layout
    assert second.float32_layout == first.float32_layout
    assert second.reference != first.reference
    assert fill_int8(first.template, first.int8_layout, second.checkpoint) == second.reference


def test_float32_file_answers_as_torch(case: Case) -> None:
    x = draw(case.shape, 40, seed=2)
    with torch.no_grad():
        wanted = case.module(torch.from_numpy(x)).numpy()
    made = fill_float32(case.first.float32, case.first.float32_layout, case.first.checkpoint)
    np.testing.assert_allclose(answers_of(made, x), wanted, atol=1e-4 * np.abs(wanted).max())


def test_int8_file_answers_nearly_as_torch(case: Case) -> None:
    x = draw(case.shape, 90)
    with torch.no_grad():
        wanted = case.module(torch.from_numpy(x)).numpy()
    error = answers_of(case.first.reference, x) - wanted
    assert 10 * np.log10((wanted**2).sum() / (error**2).sum()) > 20.0


def test_calibrator_gives_the_ranges_of_quantize_static(case: Case) -> None:
    wanted = case.second.checkpoint
    found = Calibrator(case.first.ranges_graph).ranges(wanted.params, wanted.buffers, case.second_windows)
    assert len(found) > 0
    np.testing.assert_allclose(found, wanted.ranges, rtol=1e-4, atol=1e-5)


def test_graphs_name_nothing_of_the_machine(case: Case) -> None:
    quantized = case.first
    for data in (quantized.template, quantized.float32, quantized.ranges_graph):
        model = onnx.load_from_string(data)
        assert b"stack_trace" not in data
        assert b".py" not in data
        assert to_bytes(model) == data
        assert model.graph.input[0].name == "x"
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_places_of_initializers_are_those_of_the_parsed_file(case: Case) -> None:
    data = case.first.reference
    model = onnx.load_from_string(data)
    places = raw_data_places(data)
    assert len(places) == len(model.graph.initializer)
    for tensor in model.graph.initializer:
        at, size = places[tensor.name]
        assert data[at : at + size] == tensor.raw_data
        changed = onnx.load_from_string(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        differing = [
            new.name
            for new, old in zip(changed.graph.initializer, model.graph.initializer, strict=True)
            if new.raw_data != old.raw_data
        ]
        assert differing == [tensor.name]


def test_stale_ranges_cost_accuracy_that_fresh_ones_bring_back() -> None:
    module = make(Normed, seed=3)
    shape = Normed.SHAPE
    windows = draw(shape, 200)
    quantized = quantize(module, shape, "logits", windows)
    with torch.no_grad():
        module.first_norm.weight.mul_(6.0)  # type: ignore[union-attr, operator]
        wanted = module(torch.from_numpy(windows)).numpy()
    params, buffers = flat.flatten_params(module), flat.flatten_buffers(module)

    def ratio(ranges: Floats) -> float:
        made = fill_int8(quantized.template, quantized.int8_layout, Checkpoint(params, buffers, ranges))
        return float(10 * np.log10((wanted**2).sum() / ((answers_of(made, windows) - wanted) ** 2).sum()))

    fresh = Calibrator(quantized.ranges_graph).ranges(params, buffers, windows)
    assert ratio(fresh) > ratio(quantized.checkpoint.ranges) + 10.0


def test_weights_keep_to_seven_bits(case: Case) -> None:
    data = case.first.reference
    for tensor in onnx.load_from_string(data).graph.initializer:
        if tensor.name.endswith(".weight_quantized"):
            values = np.frombuffer(tensor.raw_data, np.int8)
            assert np.abs(values.astype(int)).max() == 64


def chosen_operators(make_module: Callable[[], nn.Module], shape: tuple[int, ...]) -> list[str]:
    graph = build_float_graph(export_inference(make(make_module, 0), shape, "logits"))
    chosen = quantizable_nodes(graph)
    return [node.op_type for node in graph.model.graph.node if node.name in chosen]


def test_only_what_runs_in_an_integer_kernel_is_quantized() -> None:
    assert chosen_operators(Attention, Attention.SHAPE) == ["MatMul"] * 4 + ["Gemm"]
    assert chosen_operators(Autoencoder, Autoencoder.SHAPE) == ["Conv", "Relu"]
    # The first addition feeds a layer; the second feeds a mean, which has no integer kernel.
    assert chosen_operators(Grouped, Grouped.SHAPE) == [
        *("Conv", "Conv", "Conv", "Add", "Relu", "Conv", "Gemm")
    ]
    assert chosen_operators(Normed, Normed.SHAPE) == [
        *("Conv", "Relu", "MaxPool", "Conv", "Clip", "AveragePool", "Reshape", "Gemm", "Relu", "Gemm")
    ]


def test_folded_and_melted_operators_are_gone(case: Case) -> None:
    left = {node.op_type for node in onnx.load_from_string(case.first.reference).graph.node}
    if isinstance(case.module, Normed):
        assert not left & {"Relu", "Clip", "BatchNormalization"}
    if isinstance(case.module, Grouped):
        assert "BatchNormalization" in left


class Random(nn.Module):
    """Answers otherwise at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layer(x) + torch.randn(2)
        return answer


class Branching(nn.Module):
    """Cannot be exported: it looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layer(x)
        return answer * 2 if float(x.sum()) > 0 else answer


class Plain(nn.Module):
    """Has parameters, but no layer that runs in int8."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Guarded(nn.Module):
    """Adds an epsilon that the exporter would drop: zeros then divide zero by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layer(x / (x.abs().sum(1, keepdim=True) + 1e-8))
        return answer


def test_epsilon_that_the_exporter_drops_is_refused() -> None:
    with pytest.raises(ModelError, match="adds 1e-08"):
        quantize(Guarded().eval(), (4,), "logits", draw((4,), 10))


@pytest.mark.parametrize("make_module", [Random, Branching, Plain])
def test_module_that_cannot_be_quantized_is_a_model_error(make_module: Callable[[], nn.Module]) -> None:
    with pytest.raises(ModelError):
        quantize(make_module().eval(), (4,), "logits", draw((4,), 10))


def test_wrong_input_shape_is_a_model_error() -> None:
    with pytest.raises(ModelError):
        quantize(make(Shared, 0), (5,), "logits", draw((5,), 10))


def test_no_calibration_window_is_an_error() -> None:
    with pytest.raises(ModelError):
        quantize_static(b"", frozenset({"node"}), draw((4,), 0))


def test_infinite_activation_is_refused_by_the_calibrator() -> None:
    module = make(Shared, 0)
    quantized = quantize(module, Shared.SHAPE, "logits", draw(Shared.SHAPE, 10))
    params = quantized.checkpoint.params * np.float32(1e30)
    with pytest.raises(ModelError, match="not finite"):
        Calibrator(quantized.ranges_graph).ranges(
            params, quantized.checkpoint.buffers, draw(Shared.SHAPE, 10)
        )
