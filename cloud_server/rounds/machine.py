"""The round as a pure state machine: `step(state, event, now, policy) -> (state, actions)`.

Laws of the file: no clock, randomness, socket, disk or thread; it never waits without a deadline, and never
for a device that declined, was refused or is gone. What an action did comes back as an event. Source:
docs/architecture.md (The aggregator).

    IDLE ─ quorum present ─▶ OPENING ─▶ TRAINING ─ all answered, goal, or deadline with quorum ─▶ FOLDING
      ▲                                     └─ no quorum ─▶ (failed: back-off) ─▶ IDLE                │
      └─ CommitRound ── DECIDING ◀─ all answered or deadline ── EVALUATING ◀─ CommitFold (head moves) ┘

    A masked round:  OPENING ─▶ KEYS ─▶ SHARES ─▶ TRAINING ─▶ UNMASKING ─▶ FOLDING; each of these phases ends as
    TRAINING does, and without a quorum fails the round.
    One that a helper unmasks:  OPENING ─▶ TRAINING ─▶ ASKING ─▶ FOLDING; whatever becomes of the devices meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import replace
from typing import Any

from cloud_server.rounds.events import (
    Action,
    AskForMasks,
    AskHelper,
    CloseCollection,
    CloseKeys,
    CloseShares,
    CommitFold,
    CommitRound,
    Decide,
    DecisionMade,
    EvaluationOpened,
    Event,
    FailRound,
    FinishRun,
    Fold,
    FoldDone,
    HelperAnswered,
    JoinArrived,
    MaskAnswered,
    MaskPhaseOpened,
    MasksKnown,
    NodeLost,
    NodeReturned,
    NodesChanged,
    OpenRound,
    ReplyRefused,
    ReplyStored,
    ResendOrder,
    Resumed,
    RoundNotOpened,
    RoundOpened,
    RunEnded,
    RunPaused,
    SendEvaluateOrders,
    SendOrders,
    SetTimer,
    Tick,
)
from cloud_server.rounds.state import (
    COLLECTING,
    MASK_STEPS,
    NEVER,
    NOBODY,
    OUTSTANDING,
    Collection,
    Phase,
    RoundPolicy,
    RoundState,
    SecurePolicy,
    Standing,
)

Step = tuple[RoundState, tuple[Action, ...]]


def step(state: RoundState, event: Event, now: float, policy: RoundPolicy) -> Step:
    """One move. An event that means nothing in a phase (a late reply, a stale decision) changes nothing.

    Args:
        now: unix seconds; deadlines are compared with it, so a jump costs at most one round.
    """
    # A process that has just started has no timer yet.
    before = NEVER if isinstance(event, Resumed) else _wakeup(state, policy, now)
    state = _bounded(state, now, policy)
    handler = TRANSITIONS.get((state.phase, type(event)))
    actions: tuple[Action, ...] = ()
    if handler is not None:
        state, actions = handler(state, event, now, policy)
    state = _noted(state, event)
    after = _wakeup(state, policy, now)
    if after != before and after != NEVER:
        actions = (*actions, SetTimer(after))
    return state, actions


def _noted(state: RoundState, event: Event) -> RoundState:
    """What is remembered in every phase. After the handler, so that it can see who was there before."""
    if isinstance(event, NodesChanged):
        return replace(state, present=event.present, return_seconds=event.return_seconds)
    if isinstance(event, NodeLost):
        return replace(state, present=state.present - {event.device})
    if isinstance(event, RunPaused):
        return replace(state, is_paused=event.is_paused)
    return state


def _try_open(state: RoundState, event: Any, now: float, policy: RoundPolicy) -> Step:
    state = _noted(state, event)
    if state.is_paused or now < state.not_before or len(state.present) < policy.quorum:
        return state, ()
    return replace(state, phase=Phase.OPENING), (OpenRound(state.round_number + 1),)


def _opened(state: RoundState, event: RoundOpened, now: float, policy: RoundPolicy) -> Step:
    is_pairwise = policy.secure == "pairwise"
    state = replace(
        state,
        phase=Phase.KEYS if is_pairwise else Phase.TRAINING,
        round_number=state.round_number + 1,
        cohort=_cohort_of(event, state.present),
        deadline=min(event.deadline, now + policy.mask_seconds) if is_pairwise else event.deadline,
        resend_at=now + policy.resend_after(len(event.devices)),
    )
    if not event.answered:
        return state, (SendOrders(event.devices),)
    state, actions = _close_if_over(state, now, policy)
    return state, (SendOrders(event.devices), *actions)


def _cohort_of(event: RoundOpened, present: frozenset[str]) -> Collection:
    members = dict.fromkeys(event.devices, Standing.WAITING)
    for device in event.carried:
        members[device] = Standing.ACCEPTED if device in present else Standing.LOST
    return Collection.of({**members, **dict.fromkeys(event.answered, Standing.ANSWERED)})


def _not_opened(state: RoundState, event: RoundNotOpened, now: float, policy: RoundPolicy) -> Step:
    return _rest_after_failure(replace(state, phase=Phase.IDLE), now, policy), ()


def _joined(state: RoundState, event: JoinArrived, now: float, policy: RoundPolicy) -> Step:
    return _set_standing(
        state, event.device, Standing.ACCEPTED if event.accepted else Standing.DECLINED, now, policy
    )


def _mask_phase_opened(state: RoundState, event: MaskPhaseOpened, now: float, policy: RoundPolicy) -> Step:
    cohort = Collection.of(dict.fromkeys(event.devices, Standing.WAITING))
    state = replace(
        state, cohort=cohort, deadline=event.deadline, resend_at=now + policy.resend_after(len(event.devices))
    )
    if len(event.devices) < policy.quorum:
        return _fail(state, f"{len(event.devices)} of {policy.quorum} devices can mask", now, policy)
    return state, (SendOrders(event.devices),)


def _masks_known(state: RoundState, _event: MasksKnown, _now: float, _policy: RoundPolicy) -> Step:
    return replace(_alone(state), phase=Phase.FOLDING), (Fold(),)


def _asking_tick(state: RoundState, _event: Tick, now: float, policy: RoundPolicy) -> Step:
    if now >= state.deadline:
        return _fail(state, "the helper did not answer in time", now, policy)
    if now < state.resend_at:
        return state, ()
    return replace(state, resend_at=now + policy.resend_seconds), (AskHelper(),)


def _resume_asking(state: RoundState, _event: Resumed, now: float, policy: RoundPolicy) -> Step:
    return _waiting_for_helper(state, now, policy), (AskHelper(),)


def _helper_answered(state: RoundState, event: HelperAnswered, now: float, policy: RoundPolicy) -> Step:
    if event.reason:
        return _fail(state, event.reason, now, policy)
    return replace(_alone(state), phase=Phase.FOLDING), (Fold(),)


def _stored(state: RoundState, event: ReplyStored | MaskAnswered, now: float, policy: RoundPolicy) -> Step:
    return _set_standing(state, event.device, Standing.ANSWERED, now, policy)


def _refused(state: RoundState, event: ReplyRefused, now: float, policy: RoundPolicy) -> Step:
    return _set_standing(state, event.device, Standing.REFUSED, now, policy)


def _lost(state: RoundState, event: NodeLost, now: float, policy: RoundPolicy) -> Step:
    return _set_standing(state, event.device, Standing.LOST, now, policy)


def _nodes_changed(state: RoundState, event: NodesChanged, now: float, policy: RoundPolicy) -> Step:
    """Members that vanished are not waited for; those that came back are asked again.

    Only a change counts: after a restart the fleet's presence arrives piece by piece, and who has not been
    heard of yet is not lost.
    """
    cohort, resent = state.cohort, []
    for device in sorted(state.present - event.present):
        if cohort.members.get(device) in OUTSTANDING:
            cohort = cohort.move(device, Standing.LOST, now)
    for device in sorted(event.present - state.present):
        if cohort.members.get(device) is Standing.LOST:
            cohort = cohort.move(device, Standing.WAITING, now)
            resent.append(ResendOrder(device))
    state, actions = _close_if_over(replace(state, cohort=cohort), now, policy)
    return state, (*resent, *actions)


def _returned(state: RoundState, event: NodeReturned, _now: float, _policy: RoundPolicy) -> Step:
    """Who waited for its order when its session ended need not wait until it is sent to all again."""
    is_awaited = state.cohort.members.get(event.device) in _awaited(state)
    return state, (ResendOrder(event.device),) if is_awaited else ()


def _awaited(state: RoundState) -> Set[Standing]:
    """How those stand who may not have their order."""
    # In a masked round who accepted owes more than that: its keys.
    return OUTSTANDING if state.phase in MASK_STEPS else frozenset({Standing.WAITING})


def _collection_tick(state: RoundState, _event: Tick, now: float, policy: RoundPolicy) -> Step:
    state, actions = _close_if_over(state, now, policy)
    if actions or now < state.resend_at:
        return state, actions
    awaited = _awaited(state)
    silent = [device for device, standing in state.cohort.members.items() if standing in awaited]
    state = replace(state, resend_at=now + policy.resend_after(len(state.cohort.members)))
    return state, tuple(ResendOrder(device) for device in silent)


def _fold_done(state: RoundState, event: FoldDone, now: float, policy: RoundPolicy) -> Step:
    if event.reason:
        return _fail(state, event.reason, now, policy)
    moved = state.moved + 1
    is_last = 0 < policy.rounds <= moved
    is_evaluated = policy.evaluate_every > 0 and (moved % policy.evaluate_every == 0 or is_last)
    state = replace(state, moved=moved, failures=0, phase=Phase.EVALUATING)
    if is_evaluated:
        return state, (CommitFold(True), SendEvaluateOrders())
    state, actions = _rest(state, now, policy)
    return state, (CommitFold(False), CommitRound(), *actions)


def _evaluation_opened(state: RoundState, event: EvaluationOpened, now: float, policy: RoundPolicy) -> Step:
    state = replace(
        state,
        cohort=Collection.of(dict.fromkeys(event.devices, Standing.WAITING)),
        deadline=event.deadline,
        resend_at=now + policy.resend_after(len(event.devices)),
    )
    state, actions = _close_if_over(state, now, policy)
    return state, (SendOrders(event.devices), *actions) if event.devices else actions


def _exchange_opened(state: RoundState, event: EvaluationOpened, now: float, policy: RoundPolicy) -> Step:
    """A ServerApp's messages: collected like an evaluation, whatever they ask for, and never short of a quorum."""
    state = replace(state, phase=Phase.EVALUATING, round_number=state.round_number + 1)
    return _evaluation_opened(state, event, now, policy)


def _ended(state: RoundState, event: RunEnded, _now: float, _policy: RoundPolicy) -> Step:
    return replace(state, phase=Phase.FINISHED), (FinishRun(event.reason),)


def _decided(state: RoundState, _event: DecisionMade, now: float, policy: RoundPolicy) -> Step:
    state, actions = _rest(state, now, policy)
    return state, (CommitRound(), *actions)


def _resume_training(state: RoundState, _event: Resumed, now: float, policy: RoundPolicy) -> Step:
    open_devices = tuple(d for d, standing in state.cohort.members.items() if standing in OUTSTANDING)
    state, actions = _close_if_over(
        replace(state, resend_at=now + policy.resend_after(len(state.cohort.members))), now, policy
    )
    return state, actions or (SendOrders(open_devices),)


def _resume_folding(state: RoundState, _event: Resumed, _now: float, _policy: RoundPolicy) -> Step:
    return state, (Fold(),)


def _resume_mask_phase(state: RoundState, event: Resumed, now: float, policy: RoundPolicy) -> Step:
    """What was gathered in this phase was in memory: everybody is asked again, and answers the same."""
    waits = now + policy.mask_seconds
    return _resume_training(replace(state, deadline=min(state.deadline, waits)), event, now, policy)


def _resume_evaluating(state: RoundState, event: Resumed, now: float, policy: RoundPolicy) -> Step:
    if not state.cohort.members:
        return state, (SendEvaluateOrders(),)
    return _resume_training(state, event, now, policy)


def _resume_deciding(state: RoundState, _event: Resumed, _now: float, _policy: RoundPolicy) -> Step:
    return state, (Decide(),)


def _resume_idle(state: RoundState, event: Resumed, now: float, policy: RoundPolicy) -> Step:
    if policy.rounds and state.moved >= policy.rounds:
        return replace(state, phase=Phase.FINISHED), (FinishRun(),)
    return _try_open(state, event, now, policy)


# Every move that there is. The order of the actions in one step matters: what commits comes before what is
# sent.
_Handler = Callable[[RoundState, Any, float, RoundPolicy], Step]
TRANSITIONS: dict[tuple[Phase, type], _Handler] = {
    (Phase.IDLE,       Tick):             _try_open,
    (Phase.IDLE,       NodesChanged):     _try_open,
    (Phase.IDLE,       RunPaused):        _try_open,
    (Phase.IDLE,       Resumed):          _resume_idle,
    (Phase.IDLE,       EvaluationOpened): _exchange_opened,
    (Phase.IDLE,       RunEnded):         _ended,
    (Phase.OPENING,    RoundOpened):      _opened,
    (Phase.OPENING,    RoundNotOpened):   _not_opened,
    (Phase.OPENING,    RunEnded):         _ended,
    (Phase.TRAINING,   Tick):             _collection_tick,
    (Phase.TRAINING,   NodesChanged):     _nodes_changed,
    (Phase.TRAINING,   NodeReturned):     _returned,
    (Phase.TRAINING,   NodeLost):         _lost,
    (Phase.TRAINING,   JoinArrived):      _joined,
    (Phase.TRAINING,   ReplyStored):      _stored,
    (Phase.TRAINING,   ReplyRefused):     _refused,
    (Phase.TRAINING,   Resumed):          _resume_training,
    (Phase.TRAINING,   MaskPhaseOpened):  _mask_phase_opened,
    (Phase.SHARES,     MaskPhaseOpened):  _mask_phase_opened,
    (Phase.UNMASKING,  MaskPhaseOpened):  _mask_phase_opened,
    (Phase.UNMASKING,  MasksKnown):       _masks_known,
    (Phase.ASKING,     Tick):             _asking_tick,
    (Phase.ASKING,     HelperAnswered):   _helper_answered,
    (Phase.ASKING,     Resumed):          _resume_asking,
    (Phase.FOLDING,    FoldDone):         _fold_done,
    (Phase.FOLDING,    Resumed):          _resume_folding,
    (Phase.EVALUATING, EvaluationOpened): _evaluation_opened,
    (Phase.EVALUATING, Tick):             _collection_tick,
    (Phase.EVALUATING, NodesChanged):     _nodes_changed,
    (Phase.EVALUATING, NodeReturned):     _returned,
    (Phase.EVALUATING, NodeLost):         _lost,
    (Phase.EVALUATING, JoinArrived):      _joined,
    (Phase.EVALUATING, ReplyStored):      _stored,
    (Phase.EVALUATING, ReplyRefused):     _refused,
    (Phase.EVALUATING, Resumed):          _resume_evaluating,
    (Phase.DECIDING,   DecisionMade):     _decided,
    (Phase.DECIDING,   Resumed):          _resume_deciding,
}  # fmt: skip
# The same in each phase that only masked rounds have.
_IN_MASK_STEPS: dict[type, _Handler] = {
    Tick:         _collection_tick,
    NodesChanged: _nodes_changed,
    NodeReturned: _returned,
    NodeLost:     _lost,
    JoinArrived:  _joined,
    MaskAnswered: _stored,
    Resumed:      _resume_mask_phase,
}  # fmt: skip
TRANSITIONS |= {(phase, event): move for phase in MASK_STEPS for event, move in _IN_MASK_STEPS.items()}


def _set_standing(
    state: RoundState, device: str, standing: Standing, now: float, policy: RoundPolicy
) -> Step:
    return _close_if_over(replace(state, cohort=state.cohort.move(device, standing, now)), now, policy)


def _close_if_over(state: RoundState, now: float, policy: RoundPolicy) -> Step:
    if not _is_over(state, now, policy):
        return state, ()
    answered, state = state.cohort.answered, _alone(state)
    if state.phase is Phase.EVALUATING:
        return replace(state, phase=Phase.DECIDING), (CloseCollection(), Decide())
    if state.phase is Phase.UNMASKING:
        # How many shares are enough the fold knows: a secret's are counted by neighbours, not by devices.
        return replace(state, phase=Phase.FOLDING), (Fold(),)
    if answered < policy.quorum and not policy.folds_always:
        return _fail(state, f"{answered} of {policy.quorum} {_AWAITED[state.phase]}", now, policy)
    following, *actions = _FOLLOWING[state.phase, policy.secure]
    state = replace(state, phase=following)
    return _waiting_for_helper(state, now, policy) if following is Phase.ASKING else state, tuple(actions)


_AWAITED = {Phase.KEYS: "devices' keys", Phase.SHARES: "devices' shares", Phase.TRAINING: "updates"}
# What follows a collection that has its quorum: the phase, and what is done.
_FOLLOWING: dict[tuple[Phase, SecurePolicy], tuple[Any, ...]] = {
    (Phase.TRAINING, "plain"):      (Phase.FOLDING,   CloseCollection(), Fold()),
    (Phase.KEYS,     "pairwise"):   (Phase.SHARES,    CloseKeys()),
    (Phase.SHARES,   "pairwise"):   (Phase.TRAINING,  CloseShares()),
    (Phase.TRAINING, "pairwise"):   (Phase.UNMASKING, CloseCollection(), AskForMasks()),
    (Phase.TRAINING, "two_server"): (Phase.ASKING,    CloseCollection(), AskHelper()),
}  # fmt: skip


def _is_over(state: RoundState, now: float, policy: RoundPolicy) -> bool:
    cohort = state.cohort
    if now >= state.deadline:
        return True
    if state.phase is Phase.TRAINING and 0 < policy.goal <= cohort.answered:
        return True
    return not cohort.outstanding and now >= _grace_end(state, policy)


def _grace_end(state: RoundState, policy: RoundPolicy) -> float:
    """Until when a collection with nobody left to wait for stays open for lost members to come back: as long as they
    were asked to take, and a little more."""
    cohort = state.cohort
    if state.phase is Phase.TRAINING and cohort.lost and cohort.answered < policy.quorum:
        return cohort.lost_at + policy.grace_seconds + state.return_seconds
    return -NEVER


def _fail(state: RoundState, reason: str, now: float, policy: RoundPolicy) -> Step:
    state = replace(_alone(state), phase=Phase.IDLE)
    return _rest_after_failure(state, now, policy), (FailRound(reason),)


def _rest_after_failure(state: RoundState, now: float, policy: RoundPolicy) -> RoundState:
    return replace(state, failures=state.failures + 1, not_before=now + policy.backoff(state.failures))


def _rest(state: RoundState, now: float, policy: RoundPolicy) -> Step:
    """After a round that ended well: the run ends, or the next round opens after the pause."""
    state = _alone(state)
    if policy.rounds and state.moved >= policy.rounds:
        return replace(state, phase=Phase.FINISHED), (FinishRun(),)
    return replace(state, phase=Phase.IDLE, not_before=now + policy.pause_seconds), ()


def _waiting_for_helper(state: RoundState, now: float, policy: RoundPolicy) -> RoundState:
    return replace(state, deadline=now + policy.mask_seconds, resend_at=now + policy.resend_seconds)


def _alone(state: RoundState) -> RoundState:
    return replace(state, cohort=NOBODY, deadline=NEVER, resend_at=NEVER)


def _bounded(state: RoundState, now: float, policy: RoundPolicy) -> RoundState:
    """A wall clock that was set back must not make a deadline or a rest longer than it was meant to be."""
    longest = policy.evaluate_seconds if state.phase is Phase.EVALUATING else policy.round_seconds
    rest = now + max(policy.backoff_max_seconds, policy.pause_seconds)
    deadline = state.deadline if state.deadline == NEVER else min(state.deadline, now + longest)
    resend_at = (
        state.resend_at
        if state.resend_at == NEVER
        else min(state.resend_at, now + policy.resend_after(len(state.cohort.members)))
    )
    not_before = min(state.not_before, rest)
    if (deadline, resend_at, not_before) == (state.deadline, state.resend_at, state.not_before):
        return state
    return replace(state, deadline=deadline, resend_at=resend_at, not_before=not_before)


def _wakeup(state: RoundState, policy: RoundPolicy, now: float) -> float:
    """When the machine wants its next `Tick`; `NEVER` if only an event can move it."""
    if state.phase in COLLECTING:
        grace_end = _grace_end(state, policy)
        waits = (state.deadline, state.resend_at, NEVER if state.cohort.outstanding else max(grace_end, 0.0))
        return min(waits)
    if state.phase is Phase.ASKING:
        return min(state.deadline, state.resend_at)
    return state.not_before if state.phase is Phase.IDLE and state.not_before >= now else NEVER
