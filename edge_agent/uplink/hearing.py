"""From what a device hears to what its state machine understands: verified bodies and ended jobs become
events.

Laws of the file: it publishes nothing and starts nothing; what it reads to judge an order (samples, order
book, outbox) it does not change. A release that was installed in the worker begins to serve here, between two
requests.
"""

from __future__ import annotations

from typing import Any, Final

from edge_agent import events as on
from edge_agent.parts import PROBATION_STARTS_FACT, Parts
from edge_agent.ports import JobResult
from edge_agent.release.install import Checked
from edge_agent.rounds.masked_rounds import Draft
from edge_agent.uplink.online_keys import ONLINE_KEYS_FACT, OnlineKeys
from edge_agent.uplink.speaker import DownBody
from process.logs import get_logger
from process.version import VERSION
from wire.agent_versions import TOO_OLD_HINT, is_new_enough
from wire.errors import StorageError
from wire.messages import (
    Announcement,
    Evaluation,
    Invitation,
    MaskInbox,
    MaskQuestion,
    MaskRoster,
    Order,
    Receipt,
)

_log = get_logger("edge_agent")

CLOUD_EPOCH_FACT: Final = "cloud_epoch"
RESTORED_EPOCHS: Final = 1 << 20
"""A cloud that starts again goes on with the next epoch; one that comes back from a backup leaves this many out."""
_UNKNOWN_UPDATE: Final = bytes(16)


def event_of(body: DownBody, parts: Parts) -> on.Event | None:
    """What a message downward means to this device; None when it means nothing."""
    match body:
        case Invitation():
            return on.InvitationArrived(body, parts.heads.must_ask(body))
        case Order():
            seen = parts.orders.find(body.order_id)
            update_id = (seen.update_id or b"") if seen is not None else b""
            return on.OrderArrived(body, refusal_of(body, parts), update_id, _is_news(body, parts))
        case Receipt():
            return _receipt(body, parts)
        case Announcement():
            _note_least_agent(body, parts)
            most = parts.settings.network.hint_cap_seconds
            return on.AnnouncementArrived(
                body.release_version,
                body.keys_version,
                min(body.reconnect_seconds, most),
                min(body.spread_seconds, most),
            )
        case MaskRoster() | MaskInbox() | MaskQuestion():
            return on.MaskingHeard(body)


def restored_cloud(parts: Parts) -> on.CloudRestored | None:
    """Whether what was just heard comes from a cloud that came back from a backup (protocol.md, 9.5)."""
    epoch = parts.speaker.heard_epoch
    if epoch == parts.cloud_epoch:
        return None
    known = parts.database.fact(CLOUD_EPOCH_FACT)
    parts.cloud_epoch = epoch
    if isinstance(known, int) and epoch <= known:
        return None
    parts.database.set_fact(CLOUD_EPOCH_FACT, epoch)
    if not isinstance(known, int) or epoch - known < RESTORED_EPOCHS:
        return None
    offered = tuple(parts.outbox.offer_again())
    _log.warning("cloud_restored", epoch=epoch, offered=len(offered))
    return on.CloudRestored(offered)


def _note_least_agent(body: Announcement, parts: Parts) -> None:
    """Says once that this agent is too old: the aggregator asks it for no rounds."""
    if body.min_agent_version == parts.least_agent:
        return
    parts.least_agent = body.min_agent_version
    if not is_new_enough(VERSION, parts.least_agent):
        _log.warning("agent_too_old", version=VERSION, least=parts.least_agent, hint=TOO_OLD_HINT)


def refusal_of(order: Order, parts: Parts) -> str:
    """Why this device cannot do an order, or empty."""
    if not parts.link.view.is_open:
        return f"the link of this device waits: {parts.link.view.reason}"
    training, counts = parts.settings.training, parts.samples.counts()
    model = parts.serving.current
    # Before the first model nobody knows whether its task has labels: any sample will do until it is here.
    needs_labels = model is not None and model.task.kind == "classification"
    if order.kind == "evaluate":
        return "" if counts["val" if needs_labels else "samples"] else "no samples to evaluate on"
    if not training.enabled:
        return "training is switched off on this device"
    if parts.training_paused:
        return f"training is paused on this device: {parts.training_paused}"
    if training.masked_only and order.ring_terms is None:
        return "this device sends its updates under masks only"
    if training.masked_only and parts.helper.is_pinned and order.helped is None:
        return "this device sends its updates under masks that its helper takes away only"
    if order.ring_terms is not None and order.ring_terms.members < training.min_masked:
        return f"fewer than {training.min_masked} devices to hide among"
    if _is_news(order, parts) and parts.helper.is_pinned:
        return "another helper than the one that this device knows"
    there = counts["train" if needs_labels else "samples"]
    return "" if there >= training.min_samples else f"no {'labelled ' * needs_labels}samples"


def _is_news(order: Order, parts: Parts) -> bool:
    """Whether an order wants a helper that this device does not know, and the newest metadata might name."""
    known = parts.helper.key
    return order.helped is not None and (known is None or known.key_id != order.helped.helper_key_id)


def _receipt(body: Receipt, parts: Parts) -> on.ReceiptArrived | None:
    """A receipt counts only for the very bytes that were sent."""
    if body.durable:
        parts.outbox.note_durable(body.durable)
    update_id = parts.outbox.find_transfer(body.transfer)
    if update_id is None or body.update_id not in (update_id, _UNKNOWN_UPDATE):
        return None
    return on.ReceiptArrived(
        update_id, body.verdict, body.transfer, body.reason, body.missing, body.row, body.durable
    )


def job_ended(result: JobResult, parts: Parts) -> on.Event:
    """What the end of a job means.

    Raises:
        TrustError: (peer) a release check brought keys that cannot be used.
        StorageError: the time floor cannot be stored.
    """
    if result.error:
        _log.warning("job_failed", job=result.kind, reason=result.error)
        asked = min(result.asked_seconds, parts.settings.network.hint_cap_seconds)
        return on.JobFailed(result.kind, result.key, result.error, asked)
    value: Any = result.value
    if isinstance(value, Checked):
        return _checked(value, parts)
    if isinstance(value, Evaluation):
        return on.JobDone(result.key, value)
    if isinstance(value, Draft):
        parts.masked.hold(value)
        return on.DraftDone(result.key, value.steps)
    update, left_over = value
    if left_over is not None:
        parts.left_over[update.update_id] = left_over
    return on.JobDone(result.key, update)


def _take_keys(keys: OnlineKeys, parts: Parts) -> tuple[bytes, ...]:
    """Trusts the keys of today, and after a restart too; a full disk costs only that.

    Returns:
        The updates that are sealed to a key which is listed no longer; what of them waits to be sent is withdrawn.
    """
    if keys == parts.speaker.keys:
        return ()
    parts.speaker.trust(keys)
    _keep_keys(keys, parts)
    stale = tuple(parts.outbox.sealed_to_others(parts.speaker.kem_key_ids))
    for update_id in stale:
        parts.outgoing.withdraw(update_id)
    return stale


def _keep_keys(keys: OnlineKeys, parts: Parts) -> None:
    try:
        parts.database.set_fact(ONLINE_KEYS_FACT, keys.to_json())
    except StorageError as error:
        _log.warning("online_keys_not_kept", reason=str(error))


def _take_time(checked: Checked, parts: Parts) -> None:
    """Moves the time floor; a full disk costs only that."""
    try:
        parts.clock.note_metadata(checked.signed_at, checked.expires)
    except StorageError as error:
        _log.warning("time_floor_not_kept", reason=str(error))


def _checked(checked: Checked, parts: Parts) -> on.Event:
    stale = _take_keys(checked.keys, parts)
    parts.helper.take(checked.helper)
    _take_time(checked, parts)
    parts.received_bytes_total += checked.fetched_bytes
    serving = parts.serving
    if checked.installed is None:
        current = serving.current
        return on.ReleaseInstalled(
            current.release_version if current else 0,
            current.graphs_sha256 if current else b"",
            checked.keys.version,
            stale,
        )
    contents, model = checked.installed
    serving.swap(model, serving.current)
    _log.info("release_installed", version=model.release_version, variant=model.variant)
    parts.clock.raise_to(contents.release.created)
    parts.database.set_fact(PROBATION_STARTS_FACT, 0)
    return on.ReleaseInstalled(model.release_version, model.graphs_sha256, checked.keys.version, stale)
