"""Carries out what the state machine decides: publishes, stores, starts jobs, swaps models.

Laws of the file: it decides nothing; an action that fails becomes an event or a log line and never stops the
loop; an update is on disk before its first byte is handed to the transport. Source: docs/architecture.md,
"The agent".
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from edge_agent import actions as do
from edge_agent import events as on
from edge_agent.inference.serving import ServedModel
from edge_agent.parts import PROBATION_STARTS_FACT, Parts
from edge_agent.ports import JobResult
from edge_agent.release.files import SlotContents
from edge_agent.rounds.jobs import Assignment, Samples, do_evaluate, do_train
from edge_agent.store.outbox import OutboxRow
from edge_agent.uplink.speaker import last_chunk
from edge_agent.vitals.health import Health
from process.logs import get_logger
from process.version import VERSION
from process.vitals import resident_bytes
from wire.codec import ErrorFeedback
from wire.errors import BundleError, ModelError, ShoalError, StorageError
from wire.messages import (
    CODEC_NAMES,
    Birth,
    InferenceReport,
    Invitation,
    Join,
    MaskKeys,
    MaskOpened,
    MaskShares,
    Order,
    Telemetry,
    Update,
    decode_body,
    encode_body,
)
from wire.primitives import sha256

_log = get_logger("edge_agent")

WIRE_VERSIONS = (1, 1)
FEEDBACK_FACT = "error_feedback"
_SLOTS = 3


class Shell:
    """Performs actions for one agent, on its loop's thread.

    Args:
        post: queues an event for the state machine; from any thread.
        health: looks after the device.
    """

    def __init__(self, parts: Parts, post: Callable[[on.Event | JobResult], None], health: Health) -> None:
        self._parts = parts
        self._health = health
        self._post = post
        self._perform: dict[type, Callable[[Any], None]] = {
            do.PublishBirth:     lambda _: self._say_birth(),
            do.PublishJoin:      self._say_join,
            do.BeginMasking:     self._begin_masking,
            do.AnswerMasking:    self._answer_masking,
            do.MaskUpdate:       self._mask_update,
            do.LeaveMasking:     lambda action: parts.masked.drop(action.order_id),
            do.PublishTelemetry: lambda _: self._say_telemetry(),
            do.PublishReport:    lambda _: self._say_report(),
            do.RememberOrder:    self._remember,
            do.GatherHead:       self._gather,
            do.DropHead:         lambda action: parts.heads.drop(action.sha256),
            do.AskMissing:       self._ask,
            do.StartJob:         self._start_job,
            do.StoreUpdate:      self._store,
            do.SendUpdate:       self._send,
            do.EndUpdate:        self._end,
            do.Sweep:            lambda _: self._sweep(),
            do.LookAtLink:       lambda _: post(on.LinkLooked(parts.link.look().is_open)),
            do.SpreadReturns:    lambda action: parts.link.spread(action.seconds),
            do.CheckHealth:      lambda _: health.look(),
            do.ConfirmRelease:   lambda _: self._confirm(),
            do.RollBack:         self._roll_back,
        }  # fmt: skip

    def perform(self, action: do.Action) -> None:
        """Carries out one action; what fails is logged, and told to the state machine where it matters.

        Raises:
            StorageError: an update could not be ended; the message that ended it counts for nothing.
        """
        try:
            self._perform[type(action)](action)
        except ShoalError as error:
            _log.warning("action_failed", action=type(action).__name__, reason=str(error))
            if isinstance(action, do.EndUpdate):
                raise
            if isinstance(action, do.StartJob):
                key = action.order.order_id if action.order else b""
                self._post(on.JobFailed(action.kind, key, str(error)))

    # --- what is said -----------------------------------------------------------------------------------

    def birth(self, status: str) -> Birth:
        """The presence message; `status` is `online`, `offline` or `lost`."""
        parts, model = self._parts, self._parts.serving.current
        return Birth(
            status=status,  # type: ignore[arg-type]
            boot_id=parts.boot_id,
            agent_version=VERSION,
            wire_versions=WIRE_VERSIONS,
            machine=os.uname().machine[:64],
            cores=os.cpu_count() or 0,
            memory_bytes=_memory_bytes(),
            codecs=CODEC_NAMES,  # type: ignore[arg-type]
            release_version=model.release_version if model else 0,
            release_sha256=model.release_sha256 if model else b"",
        )

    def _say_birth(self) -> None:
        self._parts.outgoing.say(self._parts.speaker.birth(self.birth("online")))

    def _say_join(self, action: do.PublishJoin) -> None:
        parts = self._parts
        body = Join(order_id=action.order_id, accepted=action.accepted, reason=action.reason)
        if not action.accepted:
            _log.info("order_declined", run=action.run, round=action.round_number, reason=action.reason)
            parts.orders.forget(action.order_id)
        packet = parts.speaker.join(body, run=action.run, round_number=action.round_number)
        parts.outgoing.say(packet, survives=True)

    # --- masked rounds ----------------------------------------------------------------------------------

    def _begin_masking(self, action: do.BeginMasking) -> None:
        order = action.order
        try:
            keys = self._parts.masked.begin(order)
        except ShoalError as error:
            self._fail_masking(order.order_id, error)
            return
        if keys is not None:
            self._say_masking(order, keys)

    def _answer_masking(self, action: do.AnswerMasking) -> None:
        masked, body = self._parts.masked, action.body
        order = masked.order_of(body.order_id)
        if order is None:
            # Of before a restart: this device has dropped out of that round.
            return
        try:
            answer = masked.hear(body)
        except ShoalError as error:
            self._fail_masking(body.order_id, error)
            return
        if answer is not None:
            self._say_masking(order, answer)

    def _mask_update(self, action: do.MaskUpdate) -> None:
        try:
            update = self._parts.masked.finish(action.order_id)
        except ShoalError as error:
            self._fail_masking(action.order_id, error)
            return
        if update is not None:
            self._post(on.UpdateMasked(action.order_id, update))

    def _say_masking(self, order: Order, body: MaskKeys | MaskShares | MaskOpened) -> None:
        packet = self._parts.speaker.masking(body, run=order.run, round_number=order.round_number)
        self._parts.outgoing.say(packet, survives=True)

    def _fail_masking(self, order_id: bytes, error: ShoalError) -> None:
        _log.warning("masking_failed", reason=str(error))
        self._post(on.MaskingFailed(order_id, str(error)))

    def _say_telemetry(self) -> None:
        parts, counts = self._parts, self._parts.samples.counts()
        model = parts.serving.current
        body = Telemetry(
            uptime_seconds=max(0.0, parts.clock.monotonic() - parts.started_at),
            release_version=model.release_version if model else 0,
            requests_total=parts.serving.total.requests,
            errors_total=parts.serving.total.errors,
            samples=counts["samples"],
            labelled_samples=counts["labelled"],
            outbox=parts.outbox.depth(),
            rss_bytes=resident_bytes(),
            sent_bytes_total=parts.outgoing.sent_bytes_total,
            received_bytes_total=parts.received_bytes_total,
            unwell=self._health.unwell(),
            remedies=dict(self._health.remedies_total),
        )
        parts.outgoing.say(parts.speaker.quick(body))

    def _say_report(self) -> None:
        parts = self._parts
        model = parts.serving.current
        if model is None:
            return
        statistics = parts.serving.statistics()
        body = InferenceReport(
            release_version=model.release_version,
            requests=statistics.requests,
            errors=statistics.errors,
            latency_p50_seconds=statistics.latency_p50_seconds,
            latency_p99_seconds=statistics.latency_p99_seconds,
            confidence_mean=statistics.confidence_mean,
            label_counts=statistics.label_counts,
            feedback_correct=parts.feedback_correct,
            feedback_total=parts.feedback_total,
        )
        parts.feedback_correct = parts.feedback_total = 0
        parts.outgoing.say(parts.speaker.quick(body))

    def _gather(self, action: do.GatherHead) -> None:
        if self._parts.heads.gather(action.head, action.patch):
            self._post(on.HeadReady(action.head.sha256))

    def _ask(self, action: do.AskMissing) -> None:
        need = self._parts.heads.need(action.sha256)
        if need is not None:
            self._parts.outgoing.say(self._parts.speaker.need(need))

    # --- jobs -------------------------------------------------------------------------------------------

    def _remember(self, action: do.RememberOrder) -> None:
        order = action.order
        now = self._parts.clock.now()
        self._parts.orders.accept(order.order_id, order.kind, order.run, order.round_number, now)

    def _start_job(self, action: do.StartJob) -> None:
        parts = self._parts
        if action.order is None or action.invitation is None:
            heads = parts.heads.complete()
            parts.worker.submit("update", b"", lambda: parts.installer.check(heads), self._post)
            return
        work = self._assignment(action.order, action.invitation)
        key = action.order.order_id

        def must_stop() -> bool:
            return parts.stopping or bool(parts.training_paused)

        if action.kind == "train":
            parts.worker.submit("train", key, lambda: do_train(parts.engine, work, must_stop), self._post)
        else:
            parts.worker.submit("evaluate", key, lambda: do_evaluate(parts.engine, work), self._post)

    def _assignment(self, order: Order, invitation: Invitation) -> Assignment:
        parts = self._parts
        contents = parts.slots.current()
        if contents is None:
            raise ModelError("there is no model on this device yet")
        policy = parts.settings.training.policy(parts.identity.max_examples)
        return Assignment(
            device=parts.identity.device,
            order=order,
            invitation=invitation,
            contents=contents,
            head=parts.heads.read(order.head_sha256),
            train=self._samples(contents.manifest.task.kind, "train", contents.manifest.input_shape),
            validation=self._samples(contents.manifest.task.kind, "val", contents.manifest.input_shape),
            policy=policy,
            feedback=self._stored_feedback(order.run, contents.manifest.params_size),
            random=parts.random,
        )

    def _samples(self, task: str, split: Any, shape: tuple[int, ...]) -> Samples:
        store = self._parts.samples
        if task == "anomaly":
            return Samples(*store.windows(split, shape=shape))
        return Samples(*store.labelled(split, shape=shape))

    def _stored_feedback(self, run: str, params_size: int) -> ErrorFeedback | None:
        stored = self._parts.database.secret_fact(FEEDBACK_FACT)
        if stored is None:
            return None
        name, _, residual = stored.partition(b"\0")
        if name.decode() != run or len(residual) != 4 * params_size:
            return None
        return ErrorFeedback.from_bytes(residual, params_size)

    # --- the outbox -------------------------------------------------------------------------------------

    def _store(self, action: do.StoreUpdate) -> None:
        parts, body = self._parts, action.body
        left_over = parts.left_over.pop(body.update_id, None)
        try:
            with parts.database.transaction():
                parts.outbox.put(
                    body.update_id,
                    body.order_id,
                    body.run,
                    body.round_number,
                    "up" if isinstance(body, Update) else "ev",
                    encode_body(body),
                    parts.clock.now(),
                    action.deadline,
                )
                if left_over is not None:
                    named = body.run.encode() + b"\0" + left_over.to_bytes()
                    parts.database.set_secret_fact(FEEDBACK_FACT, named)
        except StorageError as error:
            _log.error("update_not_stored", run=body.run, round=body.round_number, reason=str(error))
            self._post(on.UpdateLost(body.update_id))
            reason = str(error)[:512]
            self._say_join(do.PublishJoin(body.order_id, body.run, body.round_number, False, reason))

    def _send(self, action: do.SendUpdate) -> None:
        parts = self._parts
        row = parts.outbox.find(action.update_id)
        if row is None:
            self._decline_destroyed()
            self._post(on.UpdateLost(action.update_id))
            return
        sealed, wanted = row.sealed, action.parts
        # To a key that the cloud no longer lists, somebody else may hold it: nothing more is said to that key.
        if sealed is None or row.kem_key_id not in parts.speaker.kem_key_ids:
            sealed, wanted = self._seal(row), ()
        elif action.is_again:
            wanted = last_chunk(sealed, parts.max_packet_bytes)
        packets = parts.speaker.uploads(
            sealed, row.round_number, max_packet_bytes=parts.max_packet_bytes, parts=wanted
        )
        parts.outgoing.upload(row.update_id, packets)

    def _seal(self, row: OutboxRow) -> bytes:
        """The same plaintext under a number of its own, to the cloud's key of today; on disk before it is sent."""
        parts = self._parts
        base = decode_body(row.body, Update).base_sha256 if row.kind == "up" else b""
        sealed = parts.speaker.seal_update(
            row.kind, row.body, run=row.run, round_number=row.round_number, base=base
        )
        parts.outbox.sealed(row.update_id, sealed, sha256(sealed), parts.speaker.kem_key_id)
        return sealed

    def _decline_destroyed(self) -> None:
        """Tells the cloud, which waits for them, what the disk destroyed."""
        for lost in self._parts.outbox.take_destroyed():
            reason = f"the update was destroyed: {lost.reason}"[:512]
            self._say_join(do.PublishJoin(lost.order_id, lost.run, lost.round_number, False, reason))

    def _end(self, action: do.EndUpdate) -> None:
        parts = self._parts
        parts.outbox.end(
            action.update_id,
            action.verdict,
            transfer=action.transfer,
            reason=action.reason,
            now=parts.clock.now(),
            cloud_row=action.cloud_row,
            durable=action.durable,
        )
        if action.verdict == "refused":
            _log.warning("update_refused", update=action.update_id.hex(), reason=action.reason)

    def _sweep(self) -> None:
        now = self._parts.clock.now()
        for update_id in self._parts.outbox.expire(now):
            self._post(on.UpdateLost(update_id))
        self._parts.samples.expire(now)
        self._decline_destroyed()
        self._parts.outbox.retire_keys()
        self._parts.samples.retire_keys()

    # --- releases ---------------------------------------------------------------------------------------

    def load_current(self) -> SlotContents | None:
        """Serves the current slot; a release on probation that did not survive two starts goes back first.

        Returns:
            What serves, or None without a release that loads.
        """
        parts = self._parts
        if parts.slots.on_probation:
            starts = int(parts.database.fact(PROBATION_STARTS_FACT) or 0) + 1
            try:
                parts.database.set_fact(PROBATION_STARTS_FACT, starts)
            except StorageError as error:
                _log.warning("start_not_noted", reason=str(error))
            if starts > 1:
                _log.warning("release_rolled_back", reason="it did not survive its watch window")
                try:
                    parts.slots.roll_back()
                except StorageError as error:
                    # The disk is full: what there is serves, and the next start tries again.
                    _log.error("not_rolled_back", reason=str(error))
        for _ in range(_SLOTS):
            contents = parts.slots.current()
            if contents is None:
                return None
            try:
                parts.serving.swap(parts.installer.load(contents), self._load_predecessor())
                return contents
            except ModelError as error:
                _log.error("release_does_not_load", version=contents.version, reason=str(error))
                parts.slots.roll_back()
        return None

    def _load_predecessor(self) -> ServedModel | None:
        """What stands by while the current release is on probation."""
        parts = self._parts
        contents = parts.slots.predecessor()
        if contents is None:
            return None
        try:
            return parts.installer.load(contents)
        except (ModelError, BundleError) as error:
            _log.warning("predecessor_does_not_load", version=contents.version, reason=str(error))
            return None

    def note_clean_stop(self) -> None:
        """A stop that was asked for is no failure of the release that is being watched."""
        if self._parts.slots.on_probation:
            try:
                self._parts.database.set_fact(PROBATION_STARTS_FACT, 0)
            except StorageError as error:
                _log.warning("stop_not_noted", reason=str(error))

    def _confirm(self) -> None:
        parts = self._parts
        parts.slots.confirm()
        parts.serving.trust()
        model = parts.serving.current
        _log.info("release_confirmed", version=model.release_version if model else 0)

    def _roll_back(self, action: do.RollBack) -> None:
        parts = self._parts
        contents = parts.slots.roll_back()
        if contents is None:
            return
        model = parts.installer.load(contents)
        parts.serving.swap(model, None)
        _log.warning("release_rolled_back", to=model.release_version, reason=action.reason)
        self._post(on.RolledBack(model.release_version, model.graphs_sha256))


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
