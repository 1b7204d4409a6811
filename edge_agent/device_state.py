"""What decides what a device does next: one frozen value, and the small questions that are asked of it.

Laws of the file: pure; all times are on the elapsed clock, which never goes back; nothing here is large
(checkpoints and updates stay with the shell). Source: docs/architecture.md, "The agent".
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Final, Literal

from edge_agent.ports import Moment
from wire.backoff import Backoff
from wire.messages import Invitation, Order

Phase = Literal["idle", "training", "evaluating", "updating"]
_ASK_BACKOFF: Final = Backoff(2.0, 30.0)
_RECEIPT_BACKOFF: Final = Backoff(10.0, 300.0)
_CHECK_BACKOFF: Final = Backoff(15.0, 3600.0)


@dataclass(frozen=True, slots=True)
class Timing:
    """Every wait of the machine, in seconds. What repeats backs off with full jitter (`wire/backoff.py`); before it
    lies the time in which an answer may come.

    Attributes:
        ask_after: silence after which the missing chunks of a head are asked for.
        ask_spread: a fleet's devices ask for a head that is sent on need only within this time.
        receipt_timeout: silence after which an update is sent again.
        receipt_backoff, ask_backoff: between repetitions of an update and of a request for chunks.
        check_backoff: between release checks that fail.
        keep_after_deadline: how long after its round's deadline an update is still offered.
        check_every: a release check without an announcement.
        announcement_spread: a fleet's devices start their downloads within this time.
        probation: how long a new release is watched before it becomes the last good one.
        link_every: between two looks at a link with limits; infinity for one without.
        health_every: between two looks at the device's health; `watch_every` while a new release is watched.
    """

    ask_after: float = 2.0
    ask_backoff: Backoff = _ASK_BACKOFF
    ask_spread: float = 0.5
    receipt_timeout: float = 10.0
    receipt_backoff: Backoff = _RECEIPT_BACKOFF
    keep_after_deadline: float = 600.0
    check_every: float = 6 * 3600.0
    check_backoff: Backoff = _CHECK_BACKOFF
    announcement_spread: float = 1.0
    telemetry_every: float = 60.0
    report_every: float = 300.0
    probation: float = 60.0
    sweep_every: float = 60.0
    health_every: float = 60.0
    watch_every: float = 5.0
    link_every: float = inf


@dataclass(frozen=True, slots=True)
class Head:
    """A checkpoint that an invitation announced."""

    invitation: Invitation
    complete: bool = False
    ask_at: float = inf
    asked: int = 0

    @property
    def sha256(self) -> bytes:
        return self.invitation.head.sha256


@dataclass(frozen=True, slots=True)
class Task:
    """An accepted order that waits for its head or its graphs, or runs.

    Attributes:
        trained: done, and the update waits for the masks of its round.
    """

    order: Order
    give_up_at: float
    running: bool = False
    trained: bool = False


@dataclass(frozen=True, slots=True)
class Upload:
    """An update in the outbox that no receipt has ended. `offered`: some of it may have arrived, in an earlier life of
    this process or in this one."""

    update_id: bytes
    give_up_at: float
    send_at: float
    sends: int = 0
    offered: bool = False


@dataclass(frozen=True, slots=True)
class State:
    """Everything that decides what happens next.

    Attributes:
        salt: of this device, for its jitter.
        graphs_sha256: of the current release; empty without a model.
        keys_version: of the metadata that lists the aggregator's keys, as of the newest check; 0: unknown.
        is_distrusted: since the last connection one side did not take the other's certificate.
        check_at: next release check; infinity while one runs.
        is_check_urgent: it is for keys, a certificate or a rollback, and does not wait for the link.
        is_link_open: updates, downloads and reports may go.
        spread: over how long the aggregator asks its fleet to begin what all begin at once.
        probation_until: end of the watch over a new release; infinity when none is watched.
    """

    timing: Timing = field(default_factory=Timing)
    salt: int = 0
    connected: bool = False
    phase: Phase = "idle"
    heads: tuple[Head, ...] = ()
    tasks: tuple[Task, ...] = ()
    uploads: tuple[Upload, ...] = ()
    release_version: int = 0
    graphs_sha256: bytes = b""
    announced_version: int = 0
    keys_version: int = 0
    announced_keys: int = 0
    is_distrusted: bool = False
    check_at: float = inf
    check_failures: int = 0
    is_check_urgent: bool = False
    is_link_open: bool = True
    link_at: float = inf
    spread: float = 0.0
    probation_until: float = inf
    telemetry_at: float = inf
    report_at: float = inf
    sweep_at: float = inf
    health_at: float = inf


def wake_at(state: State) -> float:
    """When the next `Tick` is due; infinity when nothing waits for time."""
    due = [state.sweep_at, state.probation_until, state.health_at, state.link_at]
    due += [task.give_up_at for task in state.tasks if not task.running]
    due += [upload.give_up_at for upload in state.uploads]
    if state.phase == "idle" and may_check(state):
        due.append(state.check_at)
    if state.connected:
        due.append(state.telemetry_at)
    if state.connected and state.is_link_open:
        due.append(state.report_at)
        due += [upload.send_at for upload in state.uploads]
        due += [head.ask_at for head in state.heads if is_missed(state, head)]
    return min(due)


def head_of(state: State, task: Task) -> Head | None:
    """The head that a task needs, as far as an invitation announced it."""
    return next((head for head in state.heads if head.sha256 == task.order.head_sha256), None)


def is_wanted(state: State, head: Head) -> bool:
    """Whether an accepted order needs this head."""
    return any(task.order.head_sha256 == head.sha256 for task in state.tasks)


def is_missed(state: State, head: Head) -> bool:
    """Whether chunks of this head are missing that an order waits for.

    One that is sent on need only is not missed before the graphs are here: the release with the graphs may bring it.
    """
    waits = head.invitation.head_on_need and head.invitation.graphs_sha256 != state.graphs_sha256
    return not head.complete and not waits and is_wanted(state, head)


def is_ready(state: State, task: Task) -> bool:
    """Whether a task has its whole head, and the device has the graphs that the head belongs to."""
    if task.trained:
        return False
    head = head_of(state, task)
    return head is not None and head.complete and head.invitation.graphs_sha256 == state.graphs_sha256


def with_head(state: State, sha256: bytes, **changes: Any) -> State:
    heads = tuple(replace(head, **changes) if head.sha256 == sha256 else head for head in state.heads)
    return replace(state, heads=heads)


def with_upload(state: State, update_id: bytes, **changes: Any) -> State:
    uploads = tuple(replace(up, **changes) if up.update_id == update_id else up for up in state.uploads)
    return replace(state, uploads=uploads)


def without_upload(state: State, update_id: bytes) -> State:
    return replace(state, uploads=tuple(up for up in state.uploads if up.update_id != update_id))


def on_elapsed(wall: float, now: Moment) -> float:
    """A deadline of the wall clock on the elapsed clock: a later jump of the wall clock does not move it."""
    return now.elapsed + (wall - now.wall)


def after(state: State, now: Moment, wait: float, spread: float) -> float:
    """`wait` seconds from now plus a share of `spread` seconds.

    The share is a hash of the device's salt and of the time: a fleet spreads, a replay repeats.
    """
    mixed = (state.salt ^ (int(now.elapsed * 1e6) * 0x9E3779B1)) * 0x85EBCA6B & 0xFFFFFFFF
    return now.elapsed + wait + spread * ((mixed ^ (mixed >> 15)) / 0x100000000)


def may_check(state: State) -> bool:
    """Whether the link lets a release check pass."""
    return state.is_link_open or state.is_check_urgent


def is_behind(state: State) -> bool:
    """Whether something was announced that the newest check did not find."""
    is_other = state.keys_version != 0 and state.announced_keys not in (0, state.keys_version)
    return is_other or state.announced_version != state.release_version
