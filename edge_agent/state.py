"""What a device does next: a pure state machine over what it heard, what it finished and what time it is.

Laws of the file: `step` has no clock, randomness, socket, disk or thread (all are arguments or actions);
inference is not in it, so nothing here can hold up an answer; an order is never trained twice and a repeated
one is answered again; an update leaves only by a receipt or its deadline. Source: docs/architecture.md, "The
agent".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any, Literal

from edge_agent import actions as do
from edge_agent import events as on
from edge_agent.device_state import (
    Head,
    Phase,
    State,
    Task,
    Upload,
    after,
    head_of,
    is_behind,
    is_missed,
    is_ready,
    is_wanted,
    may_check,
    on_elapsed,
    with_head,
    with_upload,
    without_upload,
)
from edge_agent.ports import Moment
from wire.messages import Evaluation, Order, Update

Outcome = tuple[State, list[do.Action]]
Cause = Literal["train", "evaluate", "update", "job ended"]

# One worker, one job: a job starts from idle and ends in idle. Being offline makes no difference to it.
_MOVES: dict[tuple[Phase, Cause], Phase] = {
    ("idle",       "train"):     "training",
    ("idle",       "evaluate"):  "evaluating",
    ("idle",       "update"):    "updating",
    ("training",   "job ended"): "idle",
    ("evaluating", "job ended"): "idle",
    ("updating",   "job ended"): "idle",
}  # fmt: skip

MAX_TASKS = 4
MAX_HEADS = 2
_LAST_WORD_SECONDS = 0.5


def step(state: State, event: on.Event, now: Moment) -> Outcome:
    """One event: the state after it, and what the shell must do, in order."""
    state, actions = _TABLE[type(event)](state, event, now)
    state, more = _start_next_job(state, now)
    return state, actions + more


# --- what happens -----------------------------------------------------------------------------------------


def _started(state: State, event: on.Started, now: Moment) -> Outcome:
    timing = state.timing
    uploads = tuple(
        Upload(key, on_elapsed(deadline, now), now.elapsed, offered=True) for key, deadline in event.pending
    )
    state = replace(
        state,
        release_version=event.release_version,
        graphs_sha256=event.graphs_sha256,
        uploads=uploads,
        check_at=now.elapsed,
        probation_until=now.elapsed + timing.probation if event.on_probation else inf,
        telemetry_at=after(state, now, timing.telemetry_every, timing.telemetry_every),
        report_at=after(state, now, timing.report_every, timing.report_every),
        sweep_at=now.elapsed + timing.sweep_every,
        is_link_open=event.is_link_open,
        link_at=now.elapsed + timing.link_every,
    )
    state = replace(state, health_at=now.elapsed + _look_every(state))
    # What an order needs (its head, its configuration) did not survive; the cloud need not wait for its
    # deadline.
    declines = [
        do.PublishJoin(order_id, run, number, accepted=False, reason="the agent was restarted")
        for order_id, run, number in event.interrupted
    ]
    return state, list[do.Action](declines)


def _connected(state: State, event: on.Connected, now: Moment) -> Outcome:
    due = tuple(replace(upload, send_at=now.elapsed, sends=0) for upload in state.uploads)
    connected = replace(state, connected=True, is_distrusted=False, uploads=due)
    state, sends = _send_due(connected, now)
    return state, [do.PublishBirth(), *sends]


def _disconnected(state: State, event: on.Disconnected, now: Moment) -> Outcome:
    state = replace(state, connected=False)
    if not event.is_distrust or state.is_distrusted:
        return state, []
    # Once, until there is a connection again: a check that fails is repeated by itself, ever less often.
    return _check_soon(replace(state, is_distrusted=True), now, is_urgent=True), []


def _invited(state: State, event: on.InvitationArrived, now: Moment) -> Outcome:
    invitation = event.invitation
    if not invitation.open:
        # What it names may be the base of the next head.
        return _forget_heads(state, keep=0, base=invitation.head.sha256)
    known = next((head for head in state.heads if head.sha256 == invitation.head.sha256), None)
    others = tuple(head for head in state.heads if head is not known)
    if known is not None:
        return replace(state, heads=(replace(known, invitation=invitation), *others)), []
    timing = state.timing
    wait, spread = (0.0, timing.ask_spread) if event.must_ask else (timing.ask_after, timing.ask_after)
    head = Head(invitation, ask_at=after(state, now, wait, spread))
    state = replace(state, heads=(head, *others))
    if invitation.graphs_sha256 != state.graphs_sha256:
        state = _check_soon(state, now)
    state, dropped = _forget_heads(state, keep=MAX_HEADS)
    return state, [do.GatherHead(invitation.head, invitation.patch), *dropped]


def _ordered(state: State, event: on.OrderArrived, now: Moment) -> Outcome:
    order = event.order
    if any(task.order.order_id == order.order_id for task in state.tasks):
        return state, [_accept(order), *_masks(order)]
    if event.update_id:
        return _answer_again(state, order, event.update_id, now)
    reason = _why_not(state, event, now)
    state = _check_soon(state, now) if event.is_news else state
    if reason:
        return state, [_decline(order, reason)]
    task = Task(order, on_elapsed(order.deadline, now))
    return replace(state, tasks=(*state.tasks, task)), [
        do.RememberOrder(order),
        _accept(order),
        *_masks(order),
    ]


def _why_not(state: State, event: on.OrderArrived, now: Moment) -> str:
    """The reason to decline, or empty."""
    if event.order.deadline <= now.wall:
        return "deadline passed"
    if event.refusal:
        return event.refusal
    if len(state.tasks) >= MAX_TASKS:
        return "busy"
    return ""


def _answer_again(state: State, order: Order, update_id: bytes, now: Moment) -> Outcome:
    """The order was done before: its update goes again, if no receipt has ended it."""
    state, sends = _send_due(with_upload(state, update_id, send_at=now.elapsed), now)
    return state, [_accept(order), *sends]


def _chunk(state: State, event: on.ChunkArrived, now: Moment) -> Outcome:
    """Progress: no need to ask for a while."""
    ask_at = after(state, now, state.timing.ask_after, state.timing.ask_after)
    return with_head(state, event.sha256, ask_at=ask_at, asked=0), []


def _head_ready(state: State, event: on.HeadReady, now: Moment) -> Outcome:
    return with_head(state, event.sha256, complete=True), []


def _job_done(state: State, event: on.JobDone, now: Moment) -> Outcome:
    state, task = _end_job(state, event.key)
    return (state, []) if task is None else _owe(state, task, event.body, now)


def _owe(state: State, task: Task, body: Update | Evaluation, now: Moment) -> Outcome:
    """From now on the cloud is owed this update."""
    deadline = task.order.deadline + state.timing.keep_after_deadline
    upload = Upload(body.update_id, on_elapsed(deadline, now), now.elapsed)
    state, sends = _send_due(replace(state, uploads=(*state.uploads, upload)), now)
    return state, [do.StoreUpdate(body, deadline), *sends]


def _draft_done(state: State, event: on.DraftDone, now: Moment) -> Outcome:
    """The worker is free; the order is not done before its update is masked."""
    state, task = _end_job(state, event.key)
    if task is None:
        return state, []
    waiting = replace(task, running=False, trained=True)
    return replace(state, tasks=(*state.tasks, waiting)), [do.MaskUpdate(event.key)]


def _masking_heard(state: State, event: on.MaskingHeard, now: Moment) -> Outcome:
    """Also after the update: its masks are asked for when it has come."""
    key = event.body.order_id
    is_waited_for = any(task.trained and task.order.order_id == key for task in state.tasks)
    answer = do.AnswerMasking(event.body)
    return state, [answer, do.MaskUpdate(key)] if is_waited_for else [answer]


def _update_masked(state: State, event: on.UpdateMasked, now: Moment) -> Outcome:
    state, task = _take_trained(state, event.key)
    return (state, []) if task is None else _owe(state, task, event.body, now)


def _masking_failed(state: State, event: on.MaskingFailed, now: Moment) -> Outcome:
    """A job that runs is left to end: it finds no masks, and fails here again."""
    if any(task.running and task.order.order_id == event.key for task in state.tasks):
        return state, [do.LeaveMasking(event.key)]
    order_id = event.key
    found = next((task for task in state.tasks if task.order.order_id == order_id), None)
    state = replace(state, tasks=tuple(task for task in state.tasks if task is not found))
    declined = [_decline(found.order, event.reason)] if found is not None else []
    return state, [do.LeaveMasking(order_id), *declined]


def _job_failed(state: State, event: on.JobFailed, now: Moment) -> Outcome:
    state, task = _end_job(state, event.key)
    if event.kind == "update":
        failures, asked = state.check_failures, event.asked_seconds
        spread = max(state.timing.check_backoff.ceiling_seconds(failures), asked)
        return replace(state, check_failures=failures + 1, check_at=after(state, now, asked, spread)), []
    return state, [] if task is None else [_decline(task.order, event.reason)]


def _installed(state: State, event: on.ReleaseInstalled, now: Moment) -> Outcome:
    state, _ = _end_job(state, b"")
    timing = state.timing
    is_new = event.release_version != state.release_version
    state = replace(
        state,
        release_version=event.release_version,
        graphs_sha256=event.graphs_sha256,
        keys_version=event.keys_version or state.keys_version,
    )
    # What was announced while the check ran needs no second one, if this check found it. Distrust while it ran does:
    # the check may have come before what the broker shows now.
    asked_again = state.check_at if is_behind(state) or state.is_distrusted else inf
    state = replace(
        state,
        check_at=min(asked_again, after(state, now, timing.check_every, timing.check_every / 4)),
        check_failures=0,
        is_check_urgent=state.is_check_urgent and asked_again != inf,
        probation_until=now.elapsed + timing.probation if is_new else state.probation_until,
    )
    state = replace(state, health_at=min(state.health_at, now.elapsed + _look_every(state)))
    for update_id in event.stale:
        state = with_upload(state, update_id, send_at=now.elapsed, sends=0, offered=False)
    state, gathers = _look_again(state, now)
    # What waits for a helper's key may have it now.
    masks = [do.MaskUpdate(task.order.order_id) for task in state.tasks if task.trained and task.order.helped]
    follow = [*gathers, *masks]
    return state, [do.PublishBirth(), *follow] if is_new and state.connected else follow


def _look_again(state: State, now: Moment) -> Outcome:
    """A head that is missing may be the release that was just installed."""
    missing = [head for head in state.heads if not head.complete]
    for head in missing:
        state = with_head(state, head.sha256, ask_at=after(state, now, 0.0, state.timing.ask_spread))
    return state, [do.GatherHead(head.invitation.head, head.invitation.patch) for head in missing]


def _receipt(state: State, event: on.ReceiptArrived, now: Moment) -> Outcome:
    if event.verdict != "missing":
        state = without_upload(state, event.update_id)
        end = do.EndUpdate(
            event.update_id, event.verdict, event.transfer, event.reason, event.cloud_row, event.durable
        )
        return state, [end]
    if all(upload.update_id != event.update_id for upload in state.uploads):
        return state, []
    send_at = after(state, now, state.timing.receipt_timeout, state.timing.receipt_timeout / 2)
    return with_upload(state, event.update_id, send_at=send_at), [
        do.SendUpdate(event.update_id, event.missing)
    ]


def _cloud_restored(state: State, event: on.CloudRestored, now: Moment) -> Outcome:
    """What it has lost is owed again."""
    again = tuple(Upload(key, on_elapsed(deadline, now), now.elapsed) for key, deadline in event.offered)
    known = {upload.update_id for upload in again}
    others = tuple(upload for upload in state.uploads if upload.update_id not in known)
    return _send_due(replace(state, uploads=(*others, *again)), now)


def _update_lost(state: State, event: on.UpdateLost, now: Moment) -> Outcome:
    return without_upload(state, event.update_id), []


def _announced(state: State, event: on.AnnouncementArrived, now: Moment) -> Outcome:
    state = replace(
        state,
        announced_version=event.release_version,
        announced_keys=event.keys_version,
        spread=event.spread_seconds,
    )
    follow: list[do.Action] = [do.SpreadReturns(event.reconnect_seconds)]
    if not is_behind(state):
        return state, follow
    # Keys that came or went, or the way back from a release: neither waits for a link that is shut.
    is_other = state.keys_version != 0 and event.keys_version not in (0, state.keys_version)
    is_back = 0 < event.release_version < state.release_version
    return _check_soon(state, now, is_urgent=is_other or is_back), follow


def _link_looked(state: State, event: on.LinkLooked, now: Moment) -> Outcome:
    if event.is_open == state.is_link_open:
        return state, []
    state = replace(state, is_link_open=event.is_open)
    if not event.is_open:
        return state, []
    # Windows open for a whole fleet at once.
    for upload in state.uploads:
        send_at = after(state, now, 0.0, max(state.spread, state.timing.announcement_spread))
        state = with_upload(state, upload.update_id, send_at=send_at, sends=0)
    is_waiting = is_behind(state) or state.check_at <= now.elapsed
    return _check_soon(replace(state, check_at=inf), now) if is_waiting else state, []


def _keys_unknown(state: State, event: on.KeysUnknown, now: Moment) -> Outcome:
    return _check_soon(state, now, is_urgent=True), []


def _check_wanted(state: State, event: on.CheckWanted, now: Moment) -> Outcome:
    return _check_soon(state, now, is_urgent=True), []


def _served_badly(state: State, event: on.ServedBadly, now: Moment) -> Outcome:
    if event.release_version != state.release_version or state.probation_until == inf:
        return state, []
    return replace(state, probation_until=inf), [do.RollBack(event.reason)]


def _rolled_back(state: State, event: on.RolledBack, now: Moment) -> Outcome:
    state = replace(state, release_version=event.release_version, graphs_sha256=event.graphs_sha256)
    return state, [do.PublishBirth()] if state.connected else []


def _tick(state: State, event: on.Tick, now: Moment) -> Outcome:
    actions: list[do.Action] = []
    for part in (_give_up, _sweep, _ask_due, _send_due, _report_due, _link_due, _health_due, _confirm_due):
        state, more = part(state, now)
        actions += more
    return state, actions


_TABLE: dict[type, Callable[[State, Any, Moment], Outcome]] = {
    on.Started:             _started,
    on.Connected:           _connected,
    on.Disconnected:        _disconnected,
    on.InvitationArrived:   _invited,
    on.OrderArrived:        _ordered,
    on.ChunkArrived:        _chunk,
    on.HeadReady:           _head_ready,
    on.JobDone:             _job_done,
    on.DraftDone:           _draft_done,
    on.MaskingHeard:        _masking_heard,
    on.UpdateMasked:        _update_masked,
    on.MaskingFailed:       _masking_failed,
    on.JobFailed:           _job_failed,
    on.ReceiptArrived:      _receipt,
    on.CloudRestored:       _cloud_restored,
    on.UpdateLost:          _update_lost,
    on.AnnouncementArrived: _announced,
    on.LinkLooked:          _link_looked,
    on.KeysUnknown:         _keys_unknown,
    on.CheckWanted:         _check_wanted,
    on.ReleaseInstalled:    _installed,
    on.ServedBadly:         _served_badly,
    on.RolledBack:          _rolled_back,
    on.Tick:                _tick,
}  # fmt: skip


# --- what time brings -------------------------------------------------------------------------------------


def _give_up(state: State, now: Moment) -> Outcome:
    """Orders that waited past their deadline. One that runs is left to end: a late update may still count."""
    late = [task for task in state.tasks if not task.running and task.give_up_at <= now.elapsed]
    state = replace(state, tasks=tuple(task for task in state.tasks if task not in late))
    return state, [_decline(task.order, _what_lacked(state, task)) for task in late]


def _what_lacked(state: State, task: Task) -> str:
    if task.trained:
        return "no masks in time"
    head = head_of(state, task)
    if head is None or not head.complete:
        return "no head in time"
    if head.invitation.graphs_sha256 != state.graphs_sha256:
        return "graphs unknown"
    return "no time left"


def _sweep(state: State, now: Moment) -> Outcome:
    """What is over leaves the disk; the outbox ends its own rows by the deadline that is stored with them."""
    over = [upload for upload in state.uploads if upload.give_up_at <= now.elapsed]
    if not over and state.sweep_at > now.elapsed:
        return state, []
    uploads = tuple(upload for upload in state.uploads if upload not in over)
    return replace(state, uploads=uploads, sweep_at=now.elapsed + state.timing.sweep_every), [do.Sweep()]


def _ask_due(state: State, now: Moment) -> Outcome:
    actions: list[do.Action] = []
    for head in state.heads:
        if _may_send(state) and is_missed(state, head) and head.ask_at <= now.elapsed:
            timing = state.timing
            ask_at = after(state, now, timing.ask_after, timing.ask_backoff.ceiling_seconds(head.asked))
            state = with_head(state, head.sha256, ask_at=ask_at, asked=head.asked + 1)
            actions.append(do.AskMissing(head.sha256))
    return state, actions


def _send_due(state: State, now: Moment) -> Outcome:
    actions: list[do.Action] = []
    for upload in state.uploads:
        if _may_send(state) and upload.send_at <= now.elapsed:
            timing = state.timing
            spread = timing.receipt_backoff.ceiling_seconds(upload.sends)
            send_at = after(state, now, timing.receipt_timeout, spread)
            state = with_upload(
                state, upload.update_id, send_at=send_at, sends=upload.sends + 1, offered=True
            )
            actions.append(do.SendUpdate(upload.update_id, is_again=upload.offered))
    return state, actions


def _report_due(state: State, now: Moment) -> Outcome:
    actions: list[do.Action] = []
    timing = state.timing
    if state.connected and state.telemetry_at <= now.elapsed:
        again_at = after(state, now, timing.telemetry_every, timing.telemetry_every / 5)
        state = replace(state, telemetry_at=again_at)
        actions.append(do.PublishTelemetry())
    if _may_send(state) and state.report_at <= now.elapsed:
        state = replace(state, report_at=after(state, now, timing.report_every, timing.report_every / 5))
        actions.append(do.PublishReport())
    return state, actions


def _may_send(state: State) -> bool:
    """Whether more may go than what always passes."""
    return state.connected and state.is_link_open


def _link_due(state: State, now: Moment) -> Outcome:
    if state.link_at > now.elapsed:
        return state, []
    return replace(state, link_at=now.elapsed + state.timing.link_every), [do.LookAtLink()]


def _health_due(state: State, now: Moment) -> Outcome:
    if state.health_at > now.elapsed:
        return state, []
    return replace(state, health_at=now.elapsed + _look_every(state)), [do.CheckHealth()]


def _look_every(state: State) -> float:
    """A new release is looked at more often: it must be gone within seconds if it is bad."""
    timing = state.timing
    if state.probation_until == inf:
        return timing.health_every
    return min(timing.health_every, timing.watch_every)


def _confirm_due(state: State, now: Moment) -> Outcome:
    if state.probation_until > now.elapsed:
        return state, []
    if state.health_at == now.elapsed + _look_every(state):
        # The last look was just asked for, and may still condemn what would be trusted here.
        return replace(state, probation_until=now.elapsed + _LAST_WORD_SECONDS), []
    return replace(state, probation_until=inf), [do.ConfirmRelease()]


# --- parts of moves ---------------------------------------------------------------------------------------


def _start_next_job(state: State, now: Moment) -> Outcome:
    """The order with the nearest deadline that lacks nothing, else a release check that is due."""
    if state.phase != "idle":
        return state, []
    ready = [task for task in state.tasks if is_ready(state, task)]
    if ready:
        task = min(ready, key=lambda item: item.give_up_at)
        running = replace(task, running=True)
        state = replace(state, tasks=tuple(running if item is task else item for item in state.tasks))
        head = head_of(state, task)
        invitation = head.invitation if head else None
        return _move(state, task.order.kind), [do.StartJob(task.order.kind, task.order, invitation)]
    if state.check_at <= now.elapsed and may_check(state):
        return replace(_move(state, "update"), check_at=inf), [do.StartJob("update")]
    return state, []


def _move(state: State, cause: Cause) -> State:
    return replace(state, phase=_MOVES[state.phase, cause])


def _end_job(state: State, key: bytes) -> tuple[State, Task | None]:
    """Back to idle; returns the task that the job was for (None for a release check)."""
    task = next((task for task in state.tasks if task.running and task.order.order_id == key), None)
    state = replace(state, tasks=tuple(item for item in state.tasks if item is not task))
    return _move(state, "job ended"), task


def _take_trained(state: State, key: bytes) -> tuple[State, Task | None]:
    task = next((task for task in state.tasks if task.trained and task.order.order_id == key), None)
    return replace(state, tasks=tuple(item for item in state.tasks if item is not task)), task


def _forget_heads(state: State, *, keep: int, base: bytes = b"") -> Outcome:
    """Drops the oldest heads above `keep` that no order waits for, but not a complete one called `base`."""
    kept: list[Head] = []
    dropped: list[do.Action] = []
    for head in state.heads:
        if len(kept) < keep or is_wanted(state, head) or (head.complete and head.sha256 == base):
            kept.append(head)
        else:
            dropped.append(do.DropHead(head.sha256))
    return replace(state, heads=tuple(kept)), dropped


def _check_soon(state: State, now: Moment, *, is_urgent: bool = False) -> State:
    """With all of the fleet, which was told the same: spread as the settings or the aggregator want it."""
    spread = max(state.spread, state.timing.announcement_spread)
    return replace(
        state,
        check_at=min(state.check_at, after(state, now, 0.0, spread)),
        is_check_urgent=state.is_check_urgent or is_urgent,
    )


def _accept(order: Order) -> do.PublishJoin:
    return do.PublishJoin(order.order_id, order.run, order.round_number, accepted=True)


def _masks(order: Order) -> list[do.Action]:
    return [] if order.ring_terms is None else [do.BeginMasking(order)]


def _decline(order: Order, reason: str) -> do.PublishJoin:
    return do.PublishJoin(order.order_id, order.run, order.round_number, accepted=False, reason=reason[:512])
