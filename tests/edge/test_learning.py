"""Learning: the plan, the bounds, the update; with the train step that the bundle really ships."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.rounds.learning import (
    TrainPolicy,
    bounded,
    clip,
    cross_entropy,
    derive_seed,
    evaluate,
    plan_batches,
    train,
    usable,
    with_overrides,
)
from edge_agent.runtime import Runtime
from models.bundle import Bundle
from tests.edge.lab import windows
from wire.checkpoint import Checkpoint
from wire.errors import DataError, MessageError, ModelError
from wire.manifest import TRAIN_ADAM, TRAIN_SGD, TaskSpec
from wire.materialize import materialize_float32
from wire.messages import TrainConfig
from wire.norm import l2_norm

ANOMALY = TaskSpec(kind="anomaly", loss="mse", metric="mse", higher_is_better=False)


@given(
    samples=st.integers(1, 60),
    batch=st.integers(1, 32),
    epochs=st.integers(1, 4),
    max_steps=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=80, deadline=None)
def test_plan_uses_every_sample_once_an_epoch(
    samples: int, batch: int, epochs: int, max_steps: int, seed: int
) -> None:
    config = TrainConfig(batch_size=batch, epochs=epochs, max_steps=max_steps)
    plan = plan_batches(samples, config, seed)
    assert plan.index.shape == plan.weights.shape
    assert plan.index.dtype == np.int64
    assert len(plan.index) <= max_steps
    assert ((plan.index >= 0) & (plan.index < samples)).all()
    real = plan.index[plan.weights > 0]
    assert plan.num_examples == len(np.unique(real))
    per_epoch = -(-samples // min(batch, samples))
    for start in range(0, len(plan.index) - per_epoch + 1, per_epoch):
        rows = slice(start, start + per_epoch)
        assert sorted(plan.index[rows][plan.weights[rows] > 0]) == list(range(samples))


def test_plan_follows_the_seed() -> None:
    config = TrainConfig(batch_size=4, epochs=2)
    same, other = plan_batches(20, config, 5), plan_batches(20, config, 6)
    np.testing.assert_array_equal(plan_batches(20, config, 5).index, same.index)
    assert (same.index != other.index).any()


def test_plan_without_samples_is_an_error() -> None:
    with pytest.raises(DataError):
        plan_batches(0, TrainConfig(), 0)


def test_seeds_differ_by_every_part() -> None:
    parts = [("a", "b", 1), ("ab", "", 1), ("a", "b", 2), ("a", "c", 1)]
    assert len({derive_seed(*part) for part in parts}) == 4
    assert all(0 <= derive_seed(*part) < 2**63 for part in parts)


def test_device_lowers_what_the_cloud_asks_for() -> None:
    asked = TrainConfig(
        epochs=90, max_steps=90_000, batch_size=4000, learning_rate=9.0, clipping_norm=1e8, proximal_mu=0.5
    )
    policy = TrainPolicy()
    lowered = bounded(asked, policy)
    assert (lowered.epochs, lowered.max_steps, lowered.batch_size) == (20, 2000, 256)
    assert (lowered.learning_rate, lowered.clipping_norm, lowered.proximal_mu) == (1.0, 1000.0, 0.5)
    assert bounded(TrainConfig(), policy) == TrainConfig()


def test_overrides_replace_only_what_they_name() -> None:
    config = with_overrides(TrainConfig(epochs=3), {"learning_rate": 1, "codec": "fp32"})
    assert (config.epochs, config.learning_rate, config.codec) == (3, 1.0, "fp32")


@pytest.mark.parametrize("overrides", [{"rate": 1.0}, {"epochs": 0}, {"codec": "zip"}, {"epochs": "three"}])
def test_overrides_that_cannot_be_are_a_message_error(overrides: dict[str, float | int | str]) -> None:
    with pytest.raises(MessageError, match="overrides"):
        with_overrides(TrainConfig(), overrides)


@pytest.mark.parametrize(("norm", "expected"), [(100.0, 5.0), (2.5, 2.5)])
def test_clip_bounds_the_norm_and_keeps_the_direction(norm: float, expected: float) -> None:
    update = np.array([3.0, 4.0], np.float32)
    clipped = clip(update, l2_norm(update), norm)
    assert np.linalg.norm(clipped) == pytest.approx(expected)
    assert clipped.dtype == np.float32
    np.testing.assert_allclose(clipped / np.linalg.norm(clipped), update / 5.0, rtol=1e-6)


@pytest.mark.parametrize(("name", "optimizer", "rate"), [(TRAIN_SGD, "sgd", 0.1), (TRAIN_ADAM, "adam", 0.01)])
def test_training_learns_and_gives_local_minus_global(
    bundle: Bundle, name: str, optimizer: str, rate: float
) -> None:
    runtime, manifest, head = Runtime(), bundle.manifest, bundle.checkpoint()
    x, y = windows(bundle, 90)
    config = TrainConfig(optimizer=optimizer, epochs=10, batch_size=16, learning_rate=rate, clipping_norm=1e6)  # type: ignore[arg-type]
    size = getattr(manifest.opt_state_sizes, optimizer)
    trained = train(runtime.load_train(bundle.read(name)), head, size, x, y, config, seed=3)
    assert trained.num_examples == 90
    assert trained.metrics["loss_last"] < trained.metrics["loss_first"]
    local = Checkpoint(head.params + trained.update, head.buffers, head.ranges)

    def accuracy(checkpoint: Checkpoint) -> float:
        model = materialize_float32(bundle.read("float32.onnx"), manifest, checkpoint)
        return evaluate(runtime.load_inference(model), *windows(bundle, 200, seed=9), manifest.task)[
            "accuracy"
        ]

    assert accuracy(local) > accuracy(head) + 0.2


def test_training_in_many_runs_is_training_in_one(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session, head = Runtime().load_train(bundle.read(TRAIN_SGD)), bundle.checkpoint()
    x, y = windows(bundle, 40)
    config = TrainConfig(epochs=4, batch_size=8)
    size = bundle.manifest.opt_state_sizes.sgd
    whole = train(session, head, size, x, y, config, seed=1)
    monkeypatch.setattr("edge_agent.rounds.learning.STEPS_PER_RUN", 3)
    cut = train(session, head, size, x, y, config, seed=1)
    np.testing.assert_array_equal(whole.update, cut.update)


def test_training_is_clipped(bundle: Bundle) -> None:
    session, head = Runtime().load_train(bundle.read(TRAIN_SGD)), bundle.checkpoint()
    config = TrainConfig(learning_rate=1.0, epochs=5, clipping_norm=0.25)
    trained = train(session, head, bundle.manifest.opt_state_sizes.sgd, *windows(bundle, 30), config, seed=1)
    assert trained.metrics["update_norm"] > 0.25
    assert np.linalg.norm(trained.update) == pytest.approx(0.25, rel=1e-5)


def test_training_that_diverges_gives_no_update(bundle: Bundle) -> None:
    session, head = Runtime().load_train(bundle.read(TRAIN_SGD)), bundle.checkpoint()
    x, y = windows(bundle, 30)
    config = TrainConfig(learning_rate=10.0, epochs=50)
    with pytest.raises(ModelError, match="diverged"):
        train(session, head, bundle.manifest.opt_state_sizes.sgd, x * np.float32(1e18), y, config, seed=1)


def test_training_can_be_stopped_between_runs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session, head = Runtime().load_train(bundle.read(TRAIN_SGD)), bundle.checkpoint()
    monkeypatch.setattr("edge_agent.rounds.learning.STEPS_PER_RUN", 2)
    asked = iter([False, False, True])
    with pytest.raises(ModelError, match="stopped"):
        train(
            session, head, bundle.manifest.opt_state_sizes.sgd, *windows(bundle, 30),
            TrainConfig(epochs=9), seed=1, should_stop=lambda: next(asked),
        )  # fmt: skip


class Echo:
    """A session that answers with what it was made for."""

    def __init__(self, answers: np.ndarray) -> None:  # type: ignore[type-arg]
        self._answers = answers

    def run(self, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return self._answers[: len(x)] if self._answers.ndim else x * self._answers


def test_evaluate_gives_accuracy_and_cross_entropy() -> None:
    task = TaskSpec(kind="classification", loss="ce", metric="accuracy", higher_is_better=True, classes=2)
    logits = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 9.0]], np.float32)
    labels = np.array([0, 0, 0])
    found = evaluate(Echo(logits), np.zeros((3, 1), np.float32), labels, task)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(
        (np.log(2) + np.log1p(np.exp(-2)) + np.log1p(np.exp(9))) / 3, rel=1e-6
    )


def test_evaluate_of_an_anomaly_task_is_the_mean_squared_error() -> None:
    x = np.ones((5, 2, 3), np.float32)
    found = evaluate(Echo(np.array(0.5, np.float32)), x, np.full(5, -1), ANOMALY)
    assert found == {"loss": pytest.approx(0.25), "mse": pytest.approx(0.25)}


def test_evaluate_without_samples_or_with_wrong_answers_is_an_error() -> None:
    task = TaskSpec(kind="classification", loss="ce", metric="accuracy", higher_is_better=True, classes=2)
    y = np.zeros(3, np.int64)
    with pytest.raises(DataError):
        evaluate(Echo(np.zeros((0, 2), np.float32)), np.zeros((0, 1), np.float32), y[:0], task)
    with pytest.raises(ModelError, match="not finite"):
        evaluate(Echo(np.full((3, 2), np.nan, np.float32)), np.zeros((3, 1), np.float32), y, task)
    with pytest.raises(ModelError, match="scores"):
        evaluate(Echo(np.zeros((3, 5), np.float32)), np.zeros((3, 1), np.float32), y, task)


def test_cross_entropy_does_not_overflow() -> None:
    assert cross_entropy(np.array([[1e4, -1e4]], np.float32), np.array([1])) == pytest.approx(2e4)


def test_usable_leaves_out_labels_that_the_task_does_not_know_and_keeps_the_newest() -> None:
    task = TaskSpec(kind="classification", loss="ce", metric="accuracy", higher_is_better=True, classes=3)
    x, y = np.arange(6, dtype=np.float32)[:, None], np.array([0, 7, 2, -1, 1, 2])
    kept_x, kept_y = usable(x, y, task, limit=3)
    assert (kept_x.ravel().tolist(), kept_y.tolist()) == ([2.0, 4.0, 5.0], [2, 1, 2])
    assert len(usable(x, y, ANOMALY, limit=100)[0]) == 6
