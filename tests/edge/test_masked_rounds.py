"""A device in masked rounds: its state machine's moves, its book of rounds, and what it refuses."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent import actions as do
from edge_agent import events as on
from edge_agent.device_state import State
from edge_agent.rounds.masked_rounds import MAX_ROUNDS, Draft, MaskedRounds
from tests.cloud.masked_lab import ORDER, MaskedLab
from tests.edge.test_state import at, invitation, order, run, started
from wire.errors import MessageError
from wire.mask_terms import MaskTerms
from wire.messages import MaskInbox, MaskQuestion, Order, Update

TERMS = MaskTerms(
    roster_sha256=bytes(32), members=4, degree=3, threshold=2, ring="ring32", value_bits=29, bound=1.0
)
KEY = (1).to_bytes(16, "big")


def masked_order(**changes: Any) -> Order:
    return msgspec.structs.replace(order(**changes), masking=TERMS)


def masked_update() -> Update:
    return Update(
        update_id=b"u" * 16, order_id=KEY, run="r", round_number=1, base_sha256=bytes(32), num_examples=1,
        codec="ring32", params_size=1, payload=bytes(4),
    )  # fmt: skip


def trained() -> State:
    """After the job of a masked order, before its shares."""
    state, _ = run(started(), on.InvitationArrived(invitation()), on.OrderArrived(masked_order()))
    state, actions = run(state, on.HeadReady(invitation().head.sha256))
    assert any(isinstance(action, do.StartJob) for action in actions)
    return run(state, on.DraftDone(KEY, steps=3))[0]


def test_masked_order_is_answered_with_keys_each_time() -> None:
    state, actions = run(started(), on.OrderArrived(masked_order()))
    assert [type(action) for action in actions] == [do.RememberOrder, do.PublishJoin, do.BeginMasking]
    _, actions = run(state, on.OrderArrived(masked_order()))
    assert [type(action) for action in actions] == [do.PublishJoin, do.BeginMasking]


def test_order_that_is_done_says_no_keys_anew() -> None:
    """After a restart the secrets are gone: new ones would belong to another update."""
    _, actions = run(started(), on.OrderArrived(masked_order(), update_id=b"u" * 16))
    assert not any(isinstance(action, do.BeginMasking) for action in actions)


def test_draft_frees_the_worker_and_waits_for_its_masks() -> None:
    state = trained()
    assert (state.phase, len(state.tasks), state.uploads) == ("idle", 1, ())
    state, actions = run(state, on.MaskingHeard(MaskInbox(order_id=KEY, pieces=())))
    assert [type(action) for action in actions] == [do.AnswerMasking, do.MaskUpdate]
    state, actions = run(state, on.UpdateMasked(KEY, masked_update()))
    assert [type(action) for action in actions] == [do.StoreUpdate, do.SendUpdate]
    assert (state.tasks, len(state.uploads)) == ((), 1)


def test_question_is_answered_after_the_update_has_left() -> None:
    state, _ = run(trained(), on.UpdateMasked(KEY, masked_update()))
    _, actions = run(state, on.MaskingHeard(MaskQuestion(order_id=KEY, delivered=b"\1")))
    assert [type(action) for action in actions] == [do.AnswerMasking]


def test_draft_without_masks_is_given_up_at_its_deadline() -> None:
    state, actions = run(trained(), on.Tick(), now=at(61))
    declines = [action for action in actions if isinstance(action, do.PublishJoin)]
    assert [action.reason for action in declines] == ["no masks in time"]
    assert state.tasks == ()


def test_failed_masking_declines_the_order_once_no_job_runs() -> None:
    state, _ = run(started(), on.InvitationArrived(invitation()), on.OrderArrived(masked_order()))
    state, _ = run(state, on.HeadReady(invitation().head.sha256))
    state, actions = run(state, on.MaskingFailed(KEY, "a stranger"))
    assert [type(action) for action in actions] == [do.LeaveMasking]
    state, _ = run(state, on.DraftDone(KEY, steps=1))
    state, actions = run(state, on.MaskingFailed(KEY, "a stranger"))
    assert [type(action) for action in actions] == [do.LeaveMasking, do.PublishJoin]
    assert state.tasks == ()


@pytest.mark.parametrize(
    "event", [on.DraftDone(KEY, 1), on.UpdateMasked(KEY, masked_update())], ids=["job", "update"]
)
def test_events_of_an_order_that_is_gone_change_nothing(event: on.Event) -> None:
    state = replace(started(), phase="training")
    after, actions = run(state, event)
    assert (after.tasks, after.uploads, actions) == ((), (), [])


class Me:
    """Who the book needs to know: an identity's names and key."""

    tenant, fleet = "t", "f"

    def __init__(self, lab: MaskedLab, name: str) -> None:
        self.device, self.update_key = name, lab.keys[name]


def book_of(lab: MaskedLab, name: str, *, min_members: int = 3) -> MaskedRounds:
    return MaskedRounds(
        Me(lab, name),  # type: ignore[arg-type]
        random=random.Random(3).randbytes,
        min_members=min_members,
        helper=lambda: None,
        seal=no_helper,
    )


def no_helper(*_: object, **__: object) -> bytes:
    raise AssertionError("nothing is sealed to a helper in a pairwise round")


def test_update_leaves_the_book_masked_or_not_at_all() -> None:
    lab = MaskedLab(4)
    name = lab.names[0]
    rounds = book_of(lab, name)
    keys = rounds.begin(lab.order)
    assert keys is not None
    lab.book.add_keys(name, keys)
    lab.announce(lab.names[1:])
    rounds.hold(Draft(b"u" * 16, lab.order, lab.vectors[name], steps=1))
    assert rounds.finish(ORDER) is None
    shares = rounds.hear(lab.book.roster_for(name, ORDER))
    assert shares is not None
    lab.book.add_shares(name, shares)  # type: ignore[arg-type]
    lab.share(lab.names[1:])
    assert rounds.hear(lab.book.inbox_for(name, ORDER)) is None
    update = rounds.finish(ORDER)
    assert update is not None
    assert (update.num_examples, update.metrics, update.buffers) == (1, {}, b"")
    sent = np.frombuffer(update.payload, lab.ring.dtype)
    assert np.count_nonzero(sent == lab.vectors[name]) < len(sent) / 4
    assert rounds.finish(ORDER) is None


def test_book_keeps_the_newest_rounds_only() -> None:
    lab = MaskedLab(4)
    rounds = book_of(lab, lab.names[0])
    orders = [msgspec.structs.replace(lab.order, order_id=bytes([n]) * 16) for n in range(MAX_ROUNDS + 1)]
    keys = [rounds.begin(each) for each in orders]
    assert rounds.order_of(orders[0].order_id) is None
    assert rounds.begin(orders[1]) == keys[1]
    assert len({each.mask_key for each in keys if each is not None}) == len(keys)
    rounds.drop(orders[1].order_id)
    with pytest.raises(MessageError):
        rounds.finish(orders[1].order_id)


def test_book_refuses_rounds_that_hide_too_little() -> None:
    lab = MaskedLab(4)
    with pytest.raises(MessageError, match="smaller"):
        book_of(lab, lab.names[0], min_members=5).begin(lab.order)
