"""The work behind an order: train on the head or evaluate it, and put the answer into a body.

Laws of the file: everything is an argument (a job runs on the worker's thread while the loop goes on); the
update's id follows from the device and the order, so that an order can never be counted twice, whatever
crashes in between. Source: docs/architecture.md, "Train step graph"; docs/protocol.md, clause 3.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_agent.ports import Engine, Floats, InferenceSession, Integers
from edge_agent.release.files import SlotContents
from edge_agent.rounds.draws import Draws
from edge_agent.rounds.learning import (
    TrainPolicy,
    bounded,
    derive_seed,
    evaluate,
    train,
    usable,
    with_overrides,
)
from edge_agent.rounds.masked_rounds import Draft
from wire import codec
from wire.checkpoint import Checkpoint
from wire.discrete_gaussian import SEED_BYTES
from wire.errors import BundleError, DataError, ModelError
from wire.lattice import add_noise
from wire.manifest import FLOAT32, TEMPLATE, TRAIN_ADAM, TRAIN_SGD
from wire.mask_terms import RingTerms
from wire.materialize import materialize_float32, materialize_int8
from wire.messages import Evaluation, Invitation, Order, TrainConfig, Update, encode_body
from wire.records import size_class
from wire.ring import RingVector, encode_ring, ring_of

# What sealing adds to a padded body: head, keys, signature, and 48 bytes for each record of 96 KiB.
_SEALING_BYTES = 2048
_UPDATE_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class Samples:
    """What a device has seen: float32 [N, …] and int64 [N] of one split."""

    x: Floats
    y: Integers


@dataclass(frozen=True, slots=True)
class Assignment:
    """An order with all that is needed to do it.

    Attributes:
        contents: the installed release, whose graphs the head belongs to.
        head: bytes of the round's checkpoint.
        train, validation: this device's samples.
        feedback: what a biased codec left over in the rounds before, or None.
        random: gives that many unpredictable bytes, for noise.
    """

    device: str
    order: Order
    invitation: Invitation
    contents: SlotContents
    head: bytes
    train: Samples
    validation: Samples
    policy: TrainPolicy
    feedback: codec.ErrorFeedback | None = None
    random: Callable[[int], bytes] = os.urandom

    @property
    def update_id(self) -> bytes:
        """Follows from the device and the order."""
        return update_id_of(self.device, self.order.order_id)


def update_id_of(device: str, order_id: bytes) -> bytes:
    """What the answer of a device to an order is called, always the same."""
    named = b"update\0" + device.encode() + b"\0" + order_id
    return hashlib.sha256(named).digest()[:_UPDATE_ID_BYTES]


def do_train(
    engine: Engine, work: Assignment, should_stop: Callable[[], bool]
) -> tuple[Update, codec.ErrorFeedback | None] | Draft:
    """Trains from the head; the answer to a train order, and what its codec left over (None for an unbiased
    one). In a round under masks it is a draft, which says nothing else than the update.

    Raises:
        BundleError: (peer) the head is not one of this model.
        MessageError: (peer) overrides or terms of masking that cannot be used.
        DataError: there is nothing to train on.
        ModelError: training failed, diverged or was stopped, or the update does not fit its slot.
    """
    manifest, order = work.contents.manifest, work.order
    config = bounded(with_overrides(work.invitation.train, order.overrides), work.policy)
    head = read_head(work)
    x, y = usable(work.train.x, work.train.y, manifest.task, work.policy.max_examples)
    graph = TRAIN_SGD if config.optimizer == "sgd" else TRAIN_ADAM
    session = engine.load_train(work.contents.read(graph))
    seed = derive_seed(config.seed, work.device, order.run, order.round_number)
    sizes = manifest.opt_state_sizes
    state_size = sizes.sgd if config.optimizer == "sgd" else sizes.adam
    trained = train(
        session, head, state_size, x, y, config, seed, should_stop=should_stop, random=work.random
    )
    if order.ring_terms is not None:
        steps = int(trained.metrics.get("steps", 0))
        return Draft(
            work.update_id, order, _in_ring(trained.update, order.ring_terms, seed, work.random), steps
        )
    before = _metrics_before(engine, work, head)
    payload, feedback = _encode(trained.update, config, seed, work.feedback)
    update = _fitting(
        Update(
            update_id=work.update_id,
            order_id=order.order_id,
            run=order.run,
            round_number=order.round_number,
            base_sha256=order.head_sha256,
            num_examples=trained.num_examples,
            codec=config.codec,
            params_size=manifest.params_size,
            payload=payload,
            buffers=trained.buffers.astype("<f2").tobytes(),
            metrics={**trained.metrics, **before},
        ),
        order,
    )
    return update, feedback


def do_evaluate(engine: Engine, work: Assignment) -> Evaluation:
    """Judges the head on held-out samples; the answer to an evaluate order.

    Raises:
        BundleError: (peer) the head is not one of this model.
        DataError: there is nothing to evaluate on.
        ModelError: the model failed.
    """
    order, task = work.order, work.contents.manifest.task
    x, y = usable(work.validation.x, work.validation.y, task, work.policy.max_examples)
    metrics = evaluate(judge_of(engine, work.contents, read_head(work)), x, y, task)
    # The served model on the same windows: the gate compares the two pairwise.
    served = evaluate(engine.load_inference(work.contents.int8()), x, y, task)
    metrics |= {f"served_{name}": value for name, value in served.items()}
    return Evaluation(
        update_id=work.update_id,
        order_id=order.order_id,
        run=order.run,
        round_number=order.round_number,
        base_sha256=order.head_sha256,
        num_examples=len(x),
        metrics=metrics,
    )


def read_head(work: Assignment) -> Checkpoint:
    """The round's checkpoint, with a row of ranges for each activation (zeros where it came without).

    Raises:
        BundleError: (peer) damaged, or of another model.
    """
    manifest = work.contents.manifest
    head = Checkpoint.from_bytes(work.head)
    if not len(head.ranges) and manifest.ranges_count:
        head = Checkpoint(head.params, head.buffers, np.zeros((manifest.ranges_count, 2), np.float32))
    head.check(manifest)
    return head


def judge_of(engine: Engine, contents: SlotContents, head: Checkpoint) -> InferenceSession:
    """The int8 model of a head that has activation ranges, else its float32 model."""
    manifest = contents.manifest
    if head.ranges.any():
        return engine.load_inference(materialize_int8(contents.read(TEMPLATE), manifest, head))
    return engine.load_inference(materialize_float32(contents.read(FLOAT32), manifest, head))


def _metrics_before(engine: Engine, work: Assignment, head: Checkpoint) -> dict[str, float]:
    """How the head does here before training, on held-out samples; empty where there are none."""
    task = work.contents.manifest.task
    x, y = usable(work.validation.x, work.validation.y, task, work.policy.max_examples)
    if not len(x):
        return {}
    try:
        measured = evaluate(judge_of(engine, work.contents, head), x, y, task)
    except (BundleError, DataError, ModelError):
        # A head that cannot be folded or quantized can still be trained from.
        return {}
    named = {f"{name}_before": value for name, value in measured.items()}
    return {**named, "validation_examples": float(len(x))}


def _encode(
    update: Floats, config: TrainConfig, seed: int, feedback: codec.ErrorFeedback | None
) -> tuple[bytes, codec.ErrorFeedback | None]:
    draws = Draws(derive_seed("codec", seed))
    if config.codec not in codec.FEEDBACK_CODECS:
        return codec.encode(update, config.codec, draws), None
    if feedback is None or len(feedback.residual) != len(update):
        feedback = codec.ErrorFeedback.zero(len(update))
    return feedback.encode(update, config.codec, draws)


def _in_ring(update: Floats, terms: RingTerms, seed: int, random: Callable[[int], bytes]) -> RingVector:
    """What is masked later, and is never sent as it is. The noise of an update is drawn once, from a secret of its own:
    the cloud can work out `seed`."""
    if terms.noise is not None:
        return add_noise(update, terms.noise, random(SEED_BYTES))
    return encode_ring(update, ring_of(terms), Draws(derive_seed("ring", seed)))


def _fitting(update: Update, order: Order) -> Update:
    if order.slot_bytes:
        needed = int(size_class(len(encode_body(update)) + 1) * 1.001) + _SEALING_BYTES
        if needed > order.slot_bytes:
            raise ModelError(
                f"the update needs {needed} bytes, the slot has {order.slot_bytes}",
                size_bytes=needed,
                limit_bytes=order.slot_bytes,
            )
    return update
