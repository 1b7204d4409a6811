"""The state machine by its table: every move, every reason to decline, every wait."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from edge_agent import actions as do
from edge_agent import events as on
from edge_agent import state as machine
from edge_agent.device_state import Head, State, Task, Timing, Upload, wake_at
from edge_agent.ports import Moment
from edge_agent.state import MAX_HEADS, MAX_TASKS, step
from wire.messages import BlobRef, Evaluation, Invitation, Order, TrainConfig

WALL = 1_800_000_000.0
GRAPHS = b"g" * 32
NOW = Moment(WALL, 100.0)


def at(seconds: float) -> Moment:
    return Moment(WALL + seconds, 100.0 + seconds)


def started(**changes: object) -> State:
    event = on.Started(release_version=1, graphs_sha256=GRAPHS, on_probation=False, pending=())
    state, actions = step(State(), replace(event, **changes), NOW)  # type: ignore[arg-type]
    assert actions == [do.StartJob("update")]
    state, _ = step(state, on.ReleaseInstalled(state.release_version, state.graphs_sha256), NOW)
    return step(state, on.Connected(), NOW)[0]


def invitation(number: int = 1, *, graphs: bytes = GRAPHS, is_open: bool = True) -> Invitation:
    sha = bytes([number]) * 32
    ref = BlobRef(sha256=sha, size_bytes=2048, chunk_bytes=1024, chunk_sha256=(sha, sha))
    return Invitation(
        run="r", round_number=number, open=is_open, deadline=WALL + 60, graphs_sha256=graphs, head=ref,
        train=TrainConfig(),
    )  # fmt: skip


def order(number: int = 1, kind: str = "train", *, key: int = 0, deadline: float = WALL + 60) -> Order:
    return Order(
        order_id=(key or number).to_bytes(16, "big"), kind=kind, run="r", round_number=number,  # type: ignore[arg-type]
        head_sha256=bytes([number]) * 32, deadline=deadline, slot_bytes=2**20,
    )  # fmt: skip


def answer(number: int = 1) -> Evaluation:
    return Evaluation(
        update_id=bytes([number]) * 16, order_id=number.to_bytes(16, "big"), run="r", round_number=number,
        base_sha256=bytes(32), num_examples=1, metrics={},
    )  # fmt: skip


def run(state: State, *events: on.Event, now: Moment = NOW) -> tuple[State, list[do.Action]]:
    actions: list[do.Action] = []
    for event in events:
        state, more = step(state, event, now)
        actions += more
    return state, actions


def reasons(actions: list[do.Action]) -> list[str]:
    return [action.reason for action in actions if isinstance(action, do.PublishJoin) and not action.accepted]


@pytest.mark.parametrize(
    ("phase", "cause", "after"),
    [
        ("idle", "train", "training"),
        ("idle", "evaluate", "evaluating"),
        ("idle", "update", "updating"),
        ("training", "job ended", "idle"),
        ("evaluating", "job ended", "idle"),
        ("updating", "job ended", "idle"),
    ],
)
def test_moves_are_those_of_the_documented_table(phase: str, cause: str, after: str) -> None:
    assert machine._MOVES[phase, cause] == after  # type: ignore[index]
    assert len(machine._MOVES) == 6


def test_start_checks_for_a_release_before_anything_else() -> None:
    state, actions = step(State(), on.Started(0, b"", False, ()), NOW)
    assert state.phase == "updating"
    assert actions == [do.StartJob("update")]


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_order_with_a_complete_head_starts_its_job(kind: str) -> None:
    state, actions = run(
        started(),
        on.InvitationArrived(invitation()),
        on.HeadReady(b"\1" * 32),
        on.OrderArrived(order(kind=kind)),
    )
    assert state.phase == {"train": "training", "evaluate": "evaluating"}[kind]
    assert [type(action) for action in actions] == [
        do.GatherHead, do.RememberOrder, do.PublishJoin, do.StartJob
    ]  # fmt: skip
    assert actions[-1] == do.StartJob(kind, order(kind=kind), invitation())  # type: ignore[arg-type]


def test_order_before_its_head_waits_and_starts_when_the_head_is_ready() -> None:
    state, actions = run(started(), on.OrderArrived(order()))
    assert actions == [do.RememberOrder(order()), do.PublishJoin(order().order_id, "r", 1, True)]
    state, _ = run(state, on.InvitationArrived(invitation()))
    assert state.phase == "idle"
    state, actions = run(state, on.HeadReady(b"\1" * 32))
    assert isinstance(actions[-1], do.StartJob)


def test_job_done_stores_before_it_sends_and_a_receipt_ends_it() -> None:
    state, _ = run(
        started(), on.InvitationArrived(invitation()), on.HeadReady(b"\1" * 32), on.OrderArrived(order())
    )
    state, actions = run(state, on.JobDone(order().order_id, answer()))
    assert state.phase == "idle"
    assert actions == [do.StoreUpdate(answer(), WALL + 60 + 600), do.SendUpdate(answer().update_id)]
    state, actions = run(state, on.ReceiptArrived(answer().update_id, "stored", b"t" * 32))
    assert actions == [do.EndUpdate(answer().update_id, "stored", b"t" * 32)]
    assert not state.uploads


@pytest.mark.parametrize(
    ("events", "now", "reason"),
    [
        ([on.OrderArrived(order(deadline=WALL - 1))], NOW, "deadline passed"),
        ([on.OrderArrived(order(), refusal="no labelled samples")], NOW, "no labelled samples"),
        ([on.OrderArrived(order(key=k)) for k in range(1, MAX_TASKS + 2)], NOW, "busy"),
    ],
)
def test_order_that_cannot_be_done_is_declined(events: list[on.Event], now: Moment, reason: str) -> None:
    state, actions = run(started(), *events, now=now)
    assert reasons(actions) == [reason]
    assert len(state.tasks) == len(events) - 1


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([], "no head in time"),
        ([on.InvitationArrived(invitation())], "no head in time"),
        ([on.InvitationArrived(invitation(graphs=b"x" * 32)), on.HeadReady(b"\1" * 32)], "graphs unknown"),
    ],
)
def test_order_that_waits_past_its_deadline_is_declined_with_what_it_lacked(
    events: list[on.Event], reason: str
) -> None:
    state, _ = run(started(), on.OrderArrived(order()), *events)
    state, actions = run(state, on.Tick(), now=at(61))
    assert reasons(actions) == [reason]
    assert not state.tasks


def test_order_for_unknown_graphs_waits_for_a_release_check() -> None:
    state, _ = run(
        started(), on.OrderArrived(order()), on.InvitationArrived(invitation(graphs=b"n" * 32)),
        on.HeadReady(b"\1" * 32),
    )  # fmt: skip
    state, actions = run(state, on.Tick(), now=at(1.1))
    assert do.StartJob("update") in actions
    state, actions = run(state, on.ReleaseInstalled(2, b"n" * 32), now=at(2))
    assert state.phase == "training"
    assert [type(action) for action in actions] == [do.PublishBirth, do.StartJob]


def test_repeated_order_is_answered_again_and_never_done_twice() -> None:
    events = [on.InvitationArrived(invitation()), on.HeadReady(b"\1" * 32), on.OrderArrived(order())]
    state, _ = run(started(), *events)
    state, actions = run(state, on.OrderArrived(order()))
    assert actions == [do.PublishJoin(order().order_id, "r", 1, True)]
    state, _ = run(state, on.JobDone(order().order_id, answer()))
    state, actions = run(state, on.OrderArrived(order(), update_id=answer().update_id))
    again = do.SendUpdate(answer().update_id, is_again=True)
    assert actions == [do.PublishJoin(order().order_id, "r", 1, True), again]
    state, _ = run(state, on.ReceiptArrived(answer().update_id, "stored", b"t" * 32))
    state, actions = run(state, on.OrderArrived(order(), update_id=answer().update_id))
    assert actions == [do.PublishJoin(order().order_id, "r", 1, True)]


def test_failed_training_declines_and_is_over() -> None:
    events = [on.InvitationArrived(invitation()), on.HeadReady(b"\1" * 32), on.OrderArrived(order())]
    state, _ = run(started(), *events)
    state, actions = run(state, on.JobFailed("train", order().order_id, "training diverged"))
    assert reasons(actions) == ["training diverged"]
    assert state.phase == "idle"
    assert not state.tasks


def test_missing_chunks_are_asked_for_only_while_an_order_waits_for_them() -> None:
    state, _ = run(started(), on.InvitationArrived(invitation()))
    state, actions = run(state, on.Tick(), now=at(10))
    assert actions == []
    state, _ = run(state, on.OrderArrived(order()), now=at(10))
    state, actions = run(state, on.Tick(), now=at(10))
    assert actions == [do.AskMissing(b"\1" * 32)]


def test_questions_for_chunks_back_off_and_progress_resets_them() -> None:
    state, _ = run(started(), on.InvitationArrived(invitation()), on.OrderArrived(order(deadline=WALL + 1e6)))
    asked, time = [], 0.0
    while time < 300:
        time = wake_at(state) - 100.0
        state, actions = run(state, on.Tick(), now=at(time))
        asked += [time] * actions.count(do.AskMissing(b"\1" * 32))
    gaps = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert all(2 <= gap <= 2 + min(30, 2 * 2**n) for n, gap in enumerate(gaps))
    assert max(gaps) > 15
    state, _ = run(state, on.ChunkArrived(b"\1" * 32), now=at(400))
    assert state.heads[0].ask_at - 500.0 <= 2 * state.timing.ask_after


def test_update_without_a_receipt_is_sent_again_with_back_off() -> None:
    upload = Upload(b"u" * 16, give_up_at=1e9, send_at=100.0)
    state = replace(started(), uploads=(upload,))
    sent = []
    for _ in range(6):
        moment = state.uploads[0].send_at
        state, actions = run(state, on.Tick(), now=at(moment - 100.0))
        assert do.SendUpdate(b"u" * 16, is_again=bool(sent)) in actions
        sent.append(moment)
    gaps = [later - earlier for earlier, later in itertools.pairwise(sent)]
    assert all(10 <= gap <= 10 + 10 * 2**n for n, gap in enumerate(gaps)), (
        "time for a receipt, then full jitter"
    )
    assert max(gaps) > 60


def test_missing_receipt_sends_only_those_parts() -> None:
    state = replace(started(), uploads=(Upload(b"u" * 16, 1e9, 1e9),))
    _, actions = run(state, on.ReceiptArrived(b"u" * 16, "missing", b"t" * 32, missing=(1, 3)))
    assert actions == [do.SendUpdate(b"u" * 16, (1, 3))]
    assert run(state, on.ReceiptArrived(b"z" * 16, "missing", b"t" * 32, missing=(0,)))[1] == []


def test_nothing_is_sent_while_disconnected_and_all_of_it_after_connecting() -> None:
    uploads = (Upload(b"a" * 16, 1e9, 0.0), Upload(b"b" * 16, 1e9, 1e9))
    state, _ = run(replace(started(), uploads=uploads), on.Disconnected())
    state, actions = run(state, on.Tick(), now=at(50))
    assert actions == []
    _, actions = run(state, on.Connected(), now=at(50))
    assert actions == [do.PublishBirth(), do.SendUpdate(b"a" * 16), do.SendUpdate(b"b" * 16)]


def test_training_goes_on_while_disconnected() -> None:
    events = [on.InvitationArrived(invitation()), on.HeadReady(b"\1" * 32), on.OrderArrived(order())]
    state, _ = run(started(), *events, on.Disconnected())
    assert state.phase == "training"
    _, actions = run(state, on.JobDone(order().order_id, answer()))
    assert actions == [do.StoreUpdate(answer(), WALL + 660)]


def test_update_past_its_deadline_leaves_the_machine() -> None:
    state = replace(started(), uploads=(Upload(b"u" * 16, give_up_at=150.0, send_at=1e9),))
    state, actions = run(state, on.Tick(), now=at(50))
    assert do.Sweep() in actions
    assert not state.uploads


def test_pending_updates_of_the_last_life_are_sent_after_a_restart() -> None:
    event = on.Started(1, GRAPHS, False, ((b"u" * 16, WALL + 30),))
    state, _ = run(State(), event, on.ReleaseInstalled(1, GRAPHS))
    _, actions = run(state, on.Connected())
    assert do.SendUpdate(b"u" * 16, is_again=True) in actions
    assert state.uploads[0].give_up_at == pytest.approx(130.0)


def test_orders_that_a_restart_interrupted_are_declined() -> None:
    event = on.Started(1, GRAPHS, False, (), interrupted=((b"o" * 16, "r", 4),))
    state, actions = step(State(), event, NOW)
    assert actions[0] == do.PublishJoin(b"o" * 16, "r", 4, False, "the agent was restarted")
    assert not state.tasks


def test_announcement_of_another_release_is_checked_and_of_this_one_not() -> None:
    state, _ = run(started(), on.AnnouncementArrived(1))
    assert state.check_at > 1000
    state, _ = run(state, on.AnnouncementArrived(2))
    assert 100.0 <= state.check_at <= 101.0
    _, actions = run(state, on.Tick(), now=at(1))
    assert do.StartJob("update") in actions


def test_announcement_during_the_check_that_finds_it_needs_no_second_check() -> None:
    state, _ = step(State(), on.Started(0, b"", False, ()), NOW)
    state, _ = run(state, on.AnnouncementArrived(3), on.ReleaseInstalled(3, GRAPHS))
    assert state.check_at > 1000
    state, _ = step(State(), on.Started(0, b"", False, ()), NOW)
    state, _ = run(state, on.AnnouncementArrived(4), on.ReleaseInstalled(3, GRAPHS))
    assert state.check_at <= 101.0


def test_failed_checks_back_off_and_success_resets_them() -> None:
    state, _ = step(State(), on.Started(0, b"", False, ()), NOW)
    waits = []
    for _ in range(4):
        state, _ = run(state, on.JobFailed("update", b"", "no route"))
        waits.append(state.check_at - 100.0)
        state, _ = run(replace(state, check_at=100.0), on.Tick())
    assert all(0 <= wait <= 15 * 2**n for n, wait in enumerate(waits))
    later, _ = run(state, on.JobFailed("update", b"", "busy", asked_seconds=400.0))
    assert 400 <= later.check_at - 100.0 <= 800, "what the server asks for is the least, and spread again"
    assert run(state, on.ReleaseInstalled(1, GRAPHS))[0].check_failures == 0


def test_unknown_key_leads_to_a_check() -> None:
    assert run(started(), on.KeysUnknown())[0].check_at <= 101.0


def test_new_release_is_watched_and_confirmed() -> None:
    state, _ = run(started(), on.AnnouncementArrived(2))
    state, _ = run(state, on.Tick(), now=at(1))
    state, actions = run(state, on.ReleaseInstalled(2, GRAPHS), now=at(2))
    assert actions == [do.PublishBirth()]
    assert state.probation_until == pytest.approx(162.0)
    state, actions = run(state, on.Tick(), now=at(62))
    assert actions == [do.Sweep(), do.CheckHealth()]
    _, actions = run(state, on.Tick(), now=at(62.5))
    assert do.ConfirmRelease() in actions


def test_last_look_of_the_watch_is_heard_before_the_release_is_trusted() -> None:
    state = replace(started(), probation_until=200.0, health_at=200.0)
    state, actions = step(state, on.Tick(), at(100.0))
    assert do.CheckHealth() in actions
    assert do.ConfirmRelease() not in actions
    condemned, actions = step(state, on.ServedBadly(1, "strange"), at(100.0))
    assert do.RollBack("strange") in actions
    assert do.ConfirmRelease() not in step(condemned, on.Tick(), at(101.0))[1]
    assert do.ConfirmRelease() in step(state, on.Tick(), at(100.5))[1]


@pytest.mark.parametrize("seconds", [1.0, 5.0, 60.0])
def test_looks_at_a_new_release_do_not_put_off_its_confirmation(seconds: float) -> None:
    state = replace(
        started(), timing=Timing(health_every=seconds), probation_until=160.0, health_at=100.0 + seconds
    )
    confirmed = looks = 0
    while state.probation_until < math.inf:
        now = at(min(state.health_at, state.probation_until) - 100.0)
        assert now.elapsed < 162.0
        state, actions = step(state, on.Tick(), now)
        looks += actions.count(do.CheckHealth())
        confirmed += actions.count(do.ConfirmRelease())
    assert confirmed == 1
    assert looks >= 60.0 / seconds


def test_release_that_serves_badly_goes_back_only_on_probation() -> None:
    assert run(started(), on.ServedBadly(1, "bad"))[1] == []
    state = replace(started(), probation_until=200.0)
    assert run(state, on.ServedBadly(7, "bad"))[1] == []
    state, actions = run(state, on.ServedBadly(1, "bad"))
    assert actions == [do.RollBack("bad")]
    state, actions = run(state, on.RolledBack(0, b""))
    assert (state.release_version, actions) == (0, [do.PublishBirth()])


def test_heads_are_few_and_those_that_an_order_waits_for_stay() -> None:
    state, _ = run(started(), on.OrderArrived(order(1)))
    for number in range(1, 6):
        state, actions = run(state, on.InvitationArrived(invitation(number)))
    assert [head.invitation.round_number for head in state.heads] == [5, 4, 1]
    assert len(state.heads) == MAX_HEADS + 1
    assert do.DropHead(b"\3" * 32) in actions
    state, actions = run(state, on.InvitationArrived(invitation(6, is_open=False)))
    assert [head.invitation.round_number for head in state.heads] == [1]


def test_same_head_invited_again_is_not_gathered_again() -> None:
    state, _ = run(started(), on.InvitationArrived(invitation()), on.HeadReady(b"\1" * 32))
    state, actions = run(state, on.InvitationArrived(invitation()))
    assert actions == []
    assert state.heads == (Head(invitation(), complete=True, ask_at=state.heads[0].ask_at),)


def test_orders_run_by_their_deadline() -> None:
    state = started()
    for number, seconds in ((1, 50), (2, 20), (3, 90)):
        state, _ = run(state, on.OrderArrived(order(number, deadline=WALL + seconds)))
    state = replace(state, heads=tuple(Head(invitation(n), complete=True) for n in (1, 2, 3)))
    state, actions = run(state, on.Tick())
    assert [a.order.round_number for a in actions if isinstance(a, do.StartJob) and a.order] == [2]


def test_reports_are_regular_and_spread() -> None:
    moments = set()
    for salt in range(8):
        state, _ = step(State(salt=salt * 7919), on.Started(1, GRAPHS, False, ()), NOW)
        moments.add(state.telemetry_at)
        assert 160.0 <= state.telemetry_at <= 220.0
    assert len(moments) == 8
    state, actions = run(replace(started(), telemetry_at=150.0, report_at=150.0), on.Tick(), now=at(50))
    assert actions == [do.PublishTelemetry(), do.PublishReport()]
    assert state.telemetry_at >= 150.0 + Timing().telemetry_every


def test_step_is_pure_same_input_same_output() -> None:
    state = replace(started(), tasks=(Task(order(), 160.0),), uploads=(Upload(b"u" * 16, 500.0, 0.0),))
    assert step(state, on.Tick(), at(10)) == step(state, on.Tick(), at(10))
