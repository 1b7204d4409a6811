"""How a device learns: plan batches, run the train step, make the update; and how it judges a model.

Laws of the file: pure (the session, the seed and the samples are arguments); what the cloud asks for is
bounded again by the device's own policy; an update = local − global, finite and clipped, or there is none.
Source: docs/architecture.md, "Train step graph"; McMahan et al. 2017 (FedAvg), Li et al. 2020 (FedProx).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from edge_agent.ports import Floats, InferenceSession, Integers, TrainInputs, TrainSession
from edge_agent.rounds.draws import Draws
from edge_agent.rounds.sample_noise import SampleNoise
from wire.checkpoint import Checkpoint
from wire.errors import DataError, MessageError, ModelError
from wire.manifest import TaskSpec
from wire.messages import TrainConfig
from wire.norm import l2_norm

# Steps of one session run: between runs a job can be stopped, and memory for the indices stays small.
STEPS_PER_RUN = 64
# Of DP-SGD's noise at once: 4 MiB.
MAX_NOISE_VALUES = 2**20
EVALUATION_BATCH = 256


@dataclass(frozen=True, slots=True)
class TrainPolicy:
    """What a device is willing to do, whatever the cloud asks for; larger values are lowered to these.

    Attributes:
        max_examples: newest samples that one round trains on.
        max_steps: optimizer steps of one round.
    """

    max_epochs: int = 20
    max_steps: int = 2000
    max_batch_size: int = 256
    max_learning_rate: float = 1.0
    max_clipping_norm: float = 1000.0
    max_examples: int = 4096


@dataclass(frozen=True, slots=True)
class Plan:
    """Which samples make which step.

    Attributes:
        index: int64 [K, B].
        weights: float32 [K, B]; 0 pads.
        num_examples: how many different samples are used.
    """

    index: Integers
    weights: Floats
    num_examples: int


@dataclass(frozen=True, slots=True)
class Trained:
    """What training gave.

    Attributes:
        update: float32 [P], local − global, clipped.
        buffers: float32 [Q], the local statistics.
        metrics: of the run, all finite.
    """

    update: Floats
    buffers: Floats
    num_examples: int
    metrics: dict[str, float]


def with_overrides(config: TrainConfig, overrides: Mapping[str, float | int | str]) -> TrainConfig:
    """The configuration of one device: what the round shares, with the values of its own order.

    Raises:
        MessageError: (peer) an override that is no field of `TrainConfig`, or out of bounds.
    """
    if not overrides:
        return config
    try:
        return msgspec.convert({**msgspec.to_builtins(config), **overrides}, type=TrainConfig, strict=True)
    except msgspec.ValidationError as error:
        raise MessageError(f"order overrides cannot be used: {error}") from error


def bounded(config: TrainConfig, policy: TrainPolicy) -> TrainConfig:
    """The configuration with every value lowered to what the device is willing to do."""
    return msgspec.structs.replace(
        config,
        epochs=min(config.epochs, policy.max_epochs),
        max_steps=min(config.max_steps, policy.max_steps),
        batch_size=min(config.batch_size, policy.max_batch_size),
        learning_rate=min(config.learning_rate, policy.max_learning_rate),
        clipping_norm=min(config.clipping_norm, policy.max_clipping_norm),
    )


def derive_seed(*parts: str | int | bytes) -> int:
    """A seed in [0, 2⁶³) from what makes a run unique, so that devices differ and a replay repeats."""
    state = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        state.update(len(data).to_bytes(4, "big") + data)
    return int.from_bytes(state.digest()[:8], "big") >> 1


def plan_batches(samples: int, config: TrainConfig, seed: int) -> Plan:
    """Epochs of seeded permutations, cut into batches.

    The last batch of an epoch is padded with real samples of weight 0 (BatchNorm sees every row of a batch).

    Raises:
        DataError: no samples.
    """
    if samples < 1:
        raise DataError("there are no samples to train on")
    draws = Draws(seed)
    size = min(config.batch_size, samples)
    per_epoch = -(-samples // size)
    epochs = min(config.epochs, -(-config.max_steps // per_epoch))
    index = np.stack([np.resize(draws.permutation(samples), per_epoch * size) for _ in range(epochs)])
    weights = np.zeros((epochs, per_epoch * size), np.float32)
    weights[:, :samples] = 1.0
    steps = min(epochs * per_epoch, config.max_steps)
    index = index.astype(np.int64).reshape(-1, size)[:steps]
    weights = weights.reshape(-1, size)[:steps]
    # Past the first epoch every sample was used; a run that is cut short inside it used fewer.
    used = samples if steps >= per_epoch else int(weights.sum())
    return Plan(index, weights, used)


def train(
    session: TrainSession,
    head: Checkpoint,
    opt_state_size: int,
    x: Floats,
    y: Integers,
    config: TrainConfig,
    seed: int,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    random: Callable[[int], bytes] = os.urandom,
) -> Trained:
    """Trains from the head and returns the clipped difference to it.

    Args:
        head: the round's global model.
        opt_state_size: S of the optimizer; its state starts from zeros in every round.
        x: float32 [N, …].
        y: int64 [N].
        should_stop: asked before every run of the session, at most `STEPS_PER_RUN` steps.
        random: gives that many unpredictable bytes: where the noise of DP-SGD comes from, not from `seed`, which the
            cloud can work out.

    Raises:
        DataError: no samples.
        ModelError: the graph failed, training diverged, or it was stopped.
    """
    plan = plan_batches(len(x), config, seed)
    params, buffers = head.params, head.buffers
    opt_state = np.zeros(opt_state_size, np.float32)
    losses: list[Floats] = []
    noise = SampleNoise(random) if session.takes_noise else None
    stride = STEPS_PER_RUN if noise is None else max(1, min(STEPS_PER_RUN, MAX_NOISE_VALUES // len(params)))
    for start in range(0, len(plan.index), stride):
        if should_stop():
            raise ModelError("training was stopped")
        index = plan.index[start : start + stride]
        inputs = TrainInputs(
            params=params,
            opt_state=opt_state,
            buffers=buffers,
            x=x,
            y=y,
            weights=plan.weights[start : start + stride],
            index=index,
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            mu=config.proximal_mu,
            anchor=head.params,
            seed=(seed + start) % 2**63,
            noise=None if noise is None else noise.take(len(index), len(params)),
        )
        outputs = session.run(inputs)
        params, opt_state, buffers = outputs.params, outputs.opt_state, outputs.buffers
        losses.append(outputs.loss)
    loss = np.concatenate(losses)
    update = (params - head.params).astype(np.float32, copy=False)
    if not (np.isfinite(update).all() and np.isfinite(buffers).all() and np.isfinite(loss).all()):
        raise ModelError("training diverged: the update is not finite", steps=len(loss))
    norm = l2_norm(update)
    metrics = {
        "loss_first": float(loss[0]),
        "loss_last": float(loss[-1]),
        "steps": float(len(loss)),
        "update_norm": norm,
    }
    return Trained(clip(update, norm, config.clipping_norm), buffers, plan.num_examples, metrics)


def clip(update: Floats, norm: float, limit: float) -> Floats:
    """The update, whose L2 norm is `norm`, scaled down to one of at most `limit`."""
    return update if norm <= limit else (update * np.float32(limit / norm)).astype(np.float32)


def evaluate(session: InferenceSession, x: Floats, y: Integers, task: TaskSpec) -> dict[str, float]:
    """Judges a model on windows of this device.

    Args:
        x: float32 [N, …].
        y: int64 [N]; ignored by an anomaly task.

    Returns:
        `loss` and the task's metric, both means over N.

    Raises:
        DataError: no samples, or windows that do not fit the model.
        ModelError: the model failed, or its answers are not finite or misshapen.
    """
    if not len(x):
        raise DataError("there are no samples to evaluate on")
    answers = np.concatenate(
        [session.run(x[start : start + EVALUATION_BATCH]) for start in range(0, len(x), EVALUATION_BATCH)]
    )
    if not np.isfinite(answers).all():
        raise ModelError("the model's answers are not finite")
    if task.kind == "anomaly":
        if answers.shape != x.shape:
            raise ModelError(f"a reconstruction of shape {answers.shape} is not that of {x.shape}")
        error = float(np.mean((answers - x) ** 2, dtype=np.float64))
        return {"loss": error, task.metric: error}
    if answers.shape != (len(x), task.classes):
        raise ModelError(
            f"answers of shape {answers.shape} are not {task.classes} scores for {len(x)} windows"
        )
    return {"loss": cross_entropy(answers, y), task.metric: float(np.mean(answers.argmax(1) == y))}


def cross_entropy(logits: Floats, labels: Integers) -> float:
    """Mean of −log softmax(logits)[label], in float64."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(1))
    picked: Any = shifted[np.arange(len(labels)), labels]
    return float(np.mean(log_sum - picked))


def usable(x: Floats, y: Integers, task: TaskSpec, limit: int) -> tuple[Floats, Integers]:
    """The newest `limit` samples whose labels the task knows (all labels, for a task without)."""
    if task.kind == "classification":
        known = (y >= 0) & (y < task.classes)
        if not known.all():
            x, y = x[known], y[known]
    return x[-limit:], y[-limit:]
