"""No train step ships that was not compared with torch: the graph under onnxruntime against eager torch.

Teacher-forced: each step starts from torch's state, because nets with kinks diverge over free steps as
float32 torch itself does from float64. Two batch sizes, padded and fractional weights, every term of the
gradient, several steps in one run, and a batch of nothing but padding. A sample within rounding of a kink
(ReLU's zero, a tie of two logits) may differ honestly, so a comparison that fails is drawn again with other
samples; an error in the graph fails every draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from models import ort
from models.flat import FloatVector, flatten_buffers, flatten_params
from models.task import Task
from models.train_step.optimizers import ADAM_BETA1
from models.train_step.reference import Batch, EagerStep, Hyper, State, adam_params
from models.train_step.sample_privacy import SamplePrivacy
from models.train_step.train_step_export import TrainStepExport
from wire.errors import ModelError
from wire.manifest import TensorSlot

BATCH_SIZES = (5, 8)
STEPS = 3
NOISY_FROM = 2
DRAWS = 4
# Rounding gives 1e-6, a wrong gradient 1e-2 and more; weight decay, the smallest term under test, moves 1e-2.
TOLERANCE = 1e-3
# A gradient that is zero in theory (a bias before a norm) is rounding: it is judged by the size of the whole
# vector.
SLOT_FLOOR = 1e-3
HYPER = Hyper(lr=0.02, momentum=0.9, weight_decay=1e-2, mu=0.1)
# Without the terms that could hide a small gradient.
PLAIN = Hyper(lr=0.02, momentum=0.9, weight_decay=0.0, mu=0.0)

Differences = dict[str, float]
Outputs = Mapping[str, npt.NDArray[Any]]


def verify_train_step(
    export: TrainStepExport,
    module: nn.Module,
    task: Task,
    *,
    privacy: SamplePrivacy | None = None,
    seed: int = 0,
) -> float:
    """Compare an exported train step with eager torch.

    Args:
        export: the graph and its layout.
        module: the module that it was exported from; it is left as it is.
        task: its task.
        privacy: what the graph was exported with.
        seed: of the samples, labels and perturbations that are drawn.

    Returns:
        The largest relative difference met, 0 to `TOLERANCE`.

    Raises:
        ModelError: the graph differs from torch (`difference`, `output`, `batch_size`), or does not run.
    """
    comparison = _Comparison(export, module, task, privacy, seed)
    worst = 0.0
    for batch_size in BATCH_SIZES:
        worst = max(worst, comparison.of_forced_steps(batch_size), comparison.of_a_run(batch_size))
        comparison.of_padding_only(batch_size)
    return worst


class _Comparison:
    """Draws samples and holds both sides."""

    def __init__(
        self,
        export: TrainStepExport,
        module: nn.Module,
        task: Task,
        privacy: SamplePrivacy | None,
        seed: int,
    ) -> None:
        self._export = export
        self._task = task
        self._eager = EagerStep(module, task, export.optimizer, privacy)
        self._session = ort.make_session(export.model)
        self._rng = np.random.default_rng(seed)
        # Moved off the initial values: zero-initialised layers would hide the gradients behind them.
        self._params = flatten_params(module) + self._noise(export.params_size, 0.02)
        self._buffers = flatten_buffers(module)

    def of_forced_steps(self, batch_size: int) -> float:
        """Single steps, each from torch's state."""
        state = self._start()
        worst = 0.0
        for step in range(STEPS):

            def draw(state: State = state, padding: int = step) -> tuple[Differences, State]:
                return self._one_step(state, batch_size, padding)

            difference, state = self._settle(draw, batch_size)
            worst = max(worst, difference)
        return worst

    def of_a_run(self, batch_size: int) -> float:
        """Several steps in one run: gathering, carried state, and the step's number in the dropout masks."""
        return self._settle(lambda: self._several_steps(self._start(), batch_size), batch_size)[0]

    def of_padding_only(self, batch_size: int) -> None:
        """A step whose weights are all 0 must change nothing."""
        state = self._start()
        batch = self._batch(batch_size, padding=batch_size)
        outputs = self._run_graph(state, [batch], HYPER, self._anchor(), seed=1)
        before = {"params_out": state.params, "opt_state_out": state.opt_state, "buffers_out": state.buffers}
        for name, value in before.items():
            if not np.array_equal(outputs[name], value) or outputs["loss"][0] != 0:
                raise ModelError(
                    f"a batch of nothing but padding changes {name}", output=name, batch_size=batch_size
                )

    def _settle(self, draw: Callable[[], tuple[Differences, State]], batch_size: int) -> tuple[float, State]:
        for _ in range(DRAWS):
            differences, after = draw()
            output = max(differences, key=differences.__getitem__)
            if differences[output] <= TOLERANCE:
                return differences[output], after
        raise ModelError(
            f"the train step differs from torch by {differences[output]:.2e} in {output}, batch {batch_size}",
            hint="report the model: no graph ships that does not compute what torch computes",
            difference=differences[output],
            output=output,
            batch_size=batch_size,
        )

    def _one_step(self, state: State, batch_size: int, padding: int) -> tuple[Differences, State]:
        batch, anchor, seed = self._batch(batch_size, padding), self._anchor(), self._seed()
        hyper = HYPER if padding else PLAIN
        outputs = self._run_graph(state, [batch], hyper, anchor, seed)
        after, loss, metric = self._eager.run(state, batch, hyper, anchor, seed, 0)
        differences = {
            "opt_state_out": self._of_opt_state(outputs["opt_state_out"], after.opt_state, state.opt_state),
            "params_out": self._of_params(outputs, state, after),
            "buffers_out": _relative(outputs["buffers_out"], after.buffers, self._export.buffer_slots),
            "loss": abs(float(outputs["loss"][0]) - loss) / (abs(loss) + SLOT_FLOOR),
            "metric": abs(float(outputs["metric"][0]) - metric) / (abs(metric) + SLOT_FLOOR),
        }
        return differences, after

    def _several_steps(self, state: State, batch_size: int) -> tuple[Differences, State]:
        batches = [self._batch(batch_size, padding) for padding in range(STEPS)]
        anchor, seed = self._anchor(), self._seed()
        outputs = self._run_graph(state, batches, HYPER, anchor, seed)
        losses, metrics = [], []
        for step, batch in enumerate(batches):
            state, loss, metric = self._eager.run(state, batch, HYPER, anchor, seed, step)
            losses.append(loss)
            metrics.append(metric)
        differences = {
            "loss": _relative(outputs["loss"], np.array(losses)),
            "metric": _relative(outputs["metric"], np.array(metrics)),
            "buffers_out": _relative(outputs["buffers_out"], state.buffers, self._export.buffer_slots),
        }
        if self._export.optimizer == "sgd":
            nothing = np.zeros_like(state.opt_state)
            differences["opt_state_out"] = self._of_opt_state(
                outputs["opt_state_out"], state.opt_state, nothing
            )
        return differences, state

    def _of_opt_state(self, actual: FloatVector, expected: FloatVector, before: FloatVector) -> float:
        slots, size = self._export.param_slots, self._export.params_size
        if actual.shape != expected.shape:
            return float("inf")
        # What was there before is taken off, so that the gradient is compared and not what it was added to.
        decay = HYPER.momentum if self._export.optimizer == "sgd" else ADAM_BETA1
        known = decay * before[:size].astype(np.float64)
        parts = [_relative(actual[:size] - known, expected[:size] - known, slots)]
        if self._export.optimizer == "adam":
            second = slice(size, 2 * size)
            parts += [
                _relative(actual[second], expected[second], slots),
                _relative(actual[-1:], expected[-1:]),
            ]
        return max(parts)

    def _of_params(self, outputs: Outputs, before: State, after: State) -> float:
        if self._export.optimizer == "sgd":
            expected: npt.NDArray[Any] = after.params
        else:
            # Adam divides by a gradient's own size: where that is rounding, its sign decides the step. What
            # the gradient was is compared in opt_state; here, that the step follows from it.
            expected = adam_params(before.params, outputs["opt_state_out"], HYPER.lr)
        actual = outputs["params_out"]
        return _relative(actual - before.params, expected - before.params, self._export.param_slots)

    def _run_graph(
        self, state: State, batches: Sequence[Batch], hyper: Hyper, anchor: FloatVector, seed: int
    ) -> Outputs:
        size = batches[0].y.size
        # Samples lie in another order than they are used in, so that `index` matters.
        order = self._rng.permutation(size * len(batches))
        place = np.argsort(order)
        feeds = {
            "params": state.params,
            "opt_state": state.opt_state,
            "buffers": state.buffers,
            "x": np.concatenate([batch.x for batch in batches])[order],
            "y": np.concatenate([batch.y for batch in batches])[order],
            "weights": np.stack([batch.weights for batch in batches]),
            "index": place.reshape(len(batches), size).astype(np.int64),
            "lr": np.float32(hyper.lr),
            "momentum": np.float32(hyper.momentum),
            "weight_decay": np.float32(hyper.weight_decay),
            "mu": np.float32(hyper.mu),
            "anchor": anchor,
            "seed": np.int64(seed),
            "noise": np.stack([batch.noise for batch in batches]),
        }
        return ort.run(self._session, {name: np.asarray(value) for name, value in feeds.items()})

    def _start(self) -> State:
        size = self._export.params_size
        if self._export.optimizer == "sgd":
            opt_state = self._noise(size, 0.01)
        else:
            first, second = self._noise(size, 0.01), self._noise(size, 0.01) ** 2
            opt_state = np.concatenate([first, second, np.array([STEPS], np.float32)])
        return State(self._params, opt_state, self._buffers)

    def _batch(self, size: int, padding: int) -> Batch:
        x = self._rng.normal(size=(size, *self._export.input_shape)).astype(np.float32)
        y = self._rng.integers(0, max(self._task.classes, 1), size)
        weights = self._rng.uniform(0.2, 2.0, size) if padding else np.ones(size)
        weights[size - padding :] = 0
        # DP-SGD's noise is longer than the gradients: what is wrong with these shows where there is none.
        noise = self._noise(self._export.params_size, 1.0 if padding >= NOISY_FROM else 0.0)
        return Batch(x, y, weights.astype(np.float32), noise)

    def _anchor(self) -> FloatVector:
        return self._params + self._noise(self._params.size, 0.02)

    def _seed(self) -> int:
        return int(self._rng.integers(-(2**63), 2**63))

    def _noise(self, size: int, scale: float) -> FloatVector:
        return (scale * self._rng.normal(size=size)).astype(np.float32)


def _relative(
    actual: npt.NDArray[Any], expected: npt.NDArray[Any], slots: Sequence[TensorSlot] = ()
) -> float:
    """The largest relative difference (Euclidean) of a tensor in a flat vector; infinite if not finite."""
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    if actual.size == 0:
        return 0.0
    difference = actual.astype(np.float64) - expected
    floor = SLOT_FLOOR * float(np.linalg.norm(expected)) + 1e-12
    spans = [(slot.offset, slot.offset + slot.size) for slot in slots] or [(0, actual.size)]
    return max(
        float(np.linalg.norm(difference[a:b]) / (np.linalg.norm(expected[a:b]) + floor)) for a, b in spans
    )
