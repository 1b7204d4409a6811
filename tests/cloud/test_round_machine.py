"""The round machine: every end of a round, and that none of them waits for ever."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cloud_server.rounds import events as ev
from cloud_server.rounds.machine import TRANSITIONS, step
from cloud_server.rounds.state import NEVER, Collection, Phase, RoundPolicy, RoundState, Standing
from wire.errors import ConfigurationError

POLICY = RoundPolicy(
    quorum=2,
    round_seconds=100.0,
    evaluate_seconds=50.0,
    resend_seconds=30.0,
    grace_seconds=10.0,
    backoff_seconds=5.0,
    backoff_max_seconds=40.0,
)
ALL = ("a", "b", "c")


class Script:
    """Feeds events and remembers what the machine asked for."""

    def __init__(self, policy: RoundPolicy = POLICY, state: RoundState | None = None) -> None:
        self.policy = policy
        self.state = state or RoundState()
        self.now = 1000.0

    def feed(self, *events: ev.Event, after: float = 0.0) -> list[ev.Action]:
        """The actions of all the events, timers left out."""
        self.now += after
        found: list[ev.Action] = []
        for event in events:
            self.state, actions = step(self.state, event, self.now, self.policy)
            found += [action for action in actions if not isinstance(action, ev.SetTimer)]
        return found

    def open(self, devices: tuple[str, ...] = ALL) -> list[ev.Action]:
        self.feed(ev.NodesChanged(frozenset(ALL)))
        return self.feed(ev.RoundOpened(devices, self.now + self.policy.round_seconds))

    def evaluate(self, devices: tuple[str, ...] = ALL) -> list[ev.Action]:
        self.open()
        self.feed(*map(ev.ReplyStored, ALL), ev.FoldDone())
        return self.feed(ev.EvaluationOpened(devices, self.now + self.policy.evaluate_seconds))


def test_round_opens_only_with_a_quorum() -> None:
    script = Script()
    assert script.feed(ev.NodesChanged(frozenset("a"))) == []
    assert script.feed(ev.NodesChanged(frozenset("ab"))) == [ev.OpenRound(1)]


def test_round_folds_when_all_have_answered() -> None:
    script = Script()
    assert script.open() == [ev.SendOrders(ALL)]
    assert script.feed(ev.JoinArrived("a", True), ev.ReplyStored("a"), ev.ReplyStored("b")) == []
    assert script.feed(ev.ReplyStored("c")) == [ev.CloseCollection(), ev.Fold()]
    assert script.feed(ev.FoldDone()) == [ev.CommitFold(True), ev.SendEvaluateOrders()]
    assert script.state.moved == 1


def test_round_closes_at_its_goal() -> None:
    script = Script(replace(POLICY, goal=2))
    script.open()
    assert script.feed(ev.ReplyStored("a"), ev.ReplyStored("b")) == [ev.CloseCollection(), ev.Fold()]


def test_round_does_not_wait_for_declined_refused_and_lost_devices() -> None:
    script = Script()
    script.open(("a", "b", "c", "d", "e"))
    script.feed(ev.ReplyStored("a"), ev.JoinArrived("b", False), ev.ReplyRefused("c"), ev.ReplyStored("d"))
    assert script.feed(ev.NodeLost("e")) == [ev.CloseCollection(), ev.Fold()]


def test_round_folds_what_it_has_at_the_deadline() -> None:
    script = Script()
    script.open()
    script.feed(*(ev.JoinArrived(device, True) for device in ALL))
    script.feed(ev.ReplyStored("a"), ev.ReplyStored("b"))
    assert script.feed(ev.Tick(), after=99.0) == []
    assert script.feed(ev.Tick(), after=1.0) == [ev.CloseCollection(), ev.Fold()]


def test_round_without_quorum_at_the_deadline_fails_and_backs_off() -> None:
    script = Script()
    script.open()
    script.feed(ev.ReplyStored("a"))
    assert script.feed(ev.Tick(), after=100.0) == [ev.FailRound("1 of 2 updates")]
    assert script.feed(ev.Tick(), after=4.0) == []
    assert script.feed(ev.Tick(), after=1.0) == [ev.OpenRound(2)]


def test_failures_in_a_row_back_off_longer_up_to_the_bound() -> None:
    script = Script()
    rests = []
    for _ in range(6):
        script.open()
        script.feed(*(ev.JoinArrived(device, False) for device in ALL))
        rests.append(script.state.not_before - script.now)
        script.now = script.state.not_before
        script.feed(ev.Tick())
    assert rests == [5.0, 10.0, 20.0, 40.0, 40.0, 40.0]


def test_a_good_round_ends_the_back_off() -> None:
    script = Script(state=RoundState(failures=3))
    script.open()
    script.feed(*map(ev.ReplyStored, ALL), ev.FoldDone())
    assert script.state.failures == 0


def test_lost_devices_get_grace_while_the_quorum_is_short() -> None:
    script = Script()
    script.open()
    script.feed(ev.ReplyStored("a"))
    assert script.feed(ev.NodeLost("b"), ev.NodeLost("c")) == []
    assert script.feed(ev.Tick(), after=9.0) == []
    assert script.feed(ev.NodesChanged(frozenset("ab"))) == [ev.ResendOrder("b")]
    assert script.feed(ev.ReplyStored("b")) == [ev.CloseCollection(), ev.Fold()]


def test_grace_is_as_long_as_the_fleet_is_asked_to_take_for_its_return() -> None:
    """After its broker's death everybody is lost at once, and comes back over the seconds that we asked for."""
    script = Script(replace(POLICY, round_seconds=1000.0))
    script.feed(ev.NodesChanged(frozenset(ALL), return_seconds=64.0))
    script.feed(ev.RoundOpened(ALL, script.now + 1000.0))
    assert script.feed(*map(ev.NodeLost, ALL)) == []
    assert script.feed(ev.Tick(), after=63.0) == []
    assert script.feed(ev.NodesChanged(frozenset(ALL), return_seconds=64.0)) == [
        ev.ResendOrder(device) for device in ALL
    ]
    script.feed(*map(ev.NodeLost, ALL))
    assert script.feed(ev.Tick(), after=64.0 + POLICY.grace_seconds - 1.0) == []
    assert [type(action) for action in script.feed(ev.Tick(), after=1.0)] == [ev.FailRound]


def test_device_that_returned_unnoticed_is_sent_the_order_that_it_waits_for() -> None:
    script = Script()
    script.open()
    script.feed(ev.JoinArrived("b", accepted=True), ev.ReplyStored("c"))
    assert script.feed(ev.NodeReturned("a")) == [ev.ResendOrder("a")]
    assert script.feed(*map(ev.NodeReturned, ("b", "c", "stranger"))) == []
    script.feed(ev.ReplyStored("a"), ev.ReplyStored("b"), ev.FoldDone())
    assert script.feed(ev.NodeReturned("a")) == []


def test_lost_devices_that_stay_away_fail_the_round_after_the_grace() -> None:
    script = Script()
    script.open()
    script.feed(*map(ev.NodeLost, ALL))
    assert script.feed(ev.Tick(), after=10.0) == [ev.FailRound("0 of 2 updates")]


def test_silent_devices_are_asked_again_and_joined_ones_are_not() -> None:
    script = Script()
    script.open()
    script.feed(ev.JoinArrived("b", True))
    assert script.feed(ev.Tick(), after=30.0) == [ev.ResendOrder("a"), ev.ResendOrder("c")]
    assert script.feed(ev.Tick(), after=29.0) == []


def test_an_answer_after_a_decline_or_a_loss_still_counts() -> None:
    script = Script()
    script.open()
    script.feed(ev.JoinArrived("a", False), ev.NodeLost("b"), ev.ReplyStored("a"), ev.ReplyStored("b"))
    assert script.state.cohort.answered == 2


def test_an_answered_device_stays_answered_whatever_comes_later() -> None:
    script = Script()
    script.open()
    script.feed(
        ev.ReplyStored("a"),
        ev.ReplyStored("a"),
        ev.JoinArrived("a", False),
        ev.NodeLost("a"),
        ev.ReplyRefused("a"),
    )
    assert script.state.cohort.members["a"] is Standing.ANSWERED
    assert script.state.cohort.answered == 1


def test_events_of_strangers_change_nothing() -> None:
    script = Script()
    script.open()
    before = script.state
    assert script.feed(ev.ReplyStored("x"), ev.JoinArrived("x", False), ev.ReplyRefused("x")) == []
    assert script.state == before


def test_a_fold_that_is_refused_fails_the_round() -> None:
    script = Script()
    script.open()
    script.feed(*map(ev.ReplyStored, ALL))
    assert script.feed(ev.FoldDone("not finite")) == [ev.FailRound("not finite")]
    assert script.state.moved == 0


def test_evaluation_ends_with_what_it_has() -> None:
    script = Script()
    assert script.evaluate() == [ev.SendOrders(ALL)]
    script.feed(ev.ReplyStored("a"))
    assert script.feed(ev.Tick(), after=50.0) == [ev.CloseCollection(), ev.Decide()]
    assert script.feed(ev.DecisionMade()) == [ev.CommitRound()]


def test_evaluation_of_nobody_decides_at_once() -> None:
    assert Script().evaluate(()) == [ev.CloseCollection(), ev.Decide()]


def test_rounds_between_evaluations_end_with_the_fold() -> None:
    script = Script(replace(POLICY, evaluate_every=2))
    script.open()
    actions = script.feed(*map(ev.ReplyStored, ALL), ev.FoldDone())
    assert actions[-2:] == [ev.CommitFold(False), ev.CommitRound()]
    assert script.feed(ev.Tick()) == [ev.OpenRound(2)]


def test_run_finishes_after_its_rounds() -> None:
    script = Script(replace(POLICY, rounds=1))
    script.evaluate()
    script.feed(*map(ev.ReplyStored, ALL))
    assert script.feed(ev.DecisionMade()) == [ev.CommitRound(), ev.FinishRun()]
    assert script.feed(ev.Tick(), ev.NodesChanged(frozenset(ALL)), after=1e6) == []


def test_paused_run_ends_its_round_and_opens_no_other() -> None:
    script = Script()
    script.evaluate()
    script.feed(ev.RunPaused(True), *map(ev.ReplyStored, ALL))
    assert script.feed(ev.DecisionMade()) == [ev.CommitRound()]
    assert script.feed(ev.Tick(), after=1000.0) == []
    assert script.feed(ev.RunPaused(False)) == [ev.OpenRound(2)]


def test_clock_set_back_does_not_make_a_deadline_longer() -> None:
    script = Script()
    script.open()
    script.now -= 100_000.0
    script.feed(ev.Tick())
    assert script.state.deadline == script.now + 100.0


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        (Phase.TRAINING, [ev.SendOrders(("b",))]),
        (Phase.FOLDING, [ev.Fold()]),
        (Phase.DECIDING, [ev.Decide()]),
    ],
)
def test_resume_does_again_what_was_under_way(phase: Phase, expected: list[ev.Action]) -> None:
    cohort = Collection.of({"a": Standing.ANSWERED, "b": Standing.WAITING, "c": Standing.DECLINED})
    script = Script(state=RoundState(phase=phase, round_number=3, cohort=cohort, deadline=1050.0))
    assert script.feed(ev.Resumed()) == expected


def test_resume_counts_nobody_as_lost_who_was_not_heard_of_yet() -> None:
    cohort = Collection.of(dict.fromkeys(ALL, Standing.WAITING))
    script = Script(state=RoundState(phase=Phase.TRAINING, round_number=3, cohort=cohort, deadline=1090.0))
    script.feed(ev.Resumed())
    script.feed(ev.NodesChanged(frozenset("a")), ev.NodesChanged(frozenset("ab")))
    assert script.state.cohort.outstanding == 3


@pytest.mark.parametrize("seed", range(60))
def test_any_events_end_every_round_by_its_deadline(seed: int) -> None:
    """Whatever happens in whatever order: a collection is over by its deadline, and counts agree with members."""
    rng = random.Random(seed)
    script = Script(replace(POLICY, goal=rng.choice([0, 2]), evaluate_every=rng.choice([0, 1, 2])))
    for _ in range(300):
        device = rng.choice(ALL)
        deadline = script.now + rng.choice([100.0, 50.0])
        events: list[ev.Event] = [
            ev.Tick(),
            ev.NodesChanged(frozenset(d for d in ALL if rng.random() < 0.8)),
            ev.NodeLost(device),
            ev.NodeReturned(device),
            ev.JoinArrived(device, rng.random() < 0.7),
            ev.ReplyStored(device),
            ev.ReplyRefused(device),
        ]
        event = rng.choice(events)
        if script.state.phase is Phase.OPENING:
            event = rng.choice([ev.RoundOpened(ALL, deadline), ev.RoundNotOpened("nobody")])
        elif script.state.phase is Phase.FOLDING:
            event = ev.FoldDone(rng.choice(["", "bad"]))
        elif script.state.phase is Phase.DECIDING:
            event = ev.DecisionMade()
        elif script.state.phase is Phase.EVALUATING and not script.state.cohort.members:
            event = ev.EvaluationOpened(rng.choice([ALL, ()]), deadline)
        script.feed(event, after=rng.choice([0.0, 0.0, 1.0, 20.0]))
        state = script.state
        assert state.cohort.outstanding == Collection.of(state.cohort.members).outstanding
        assert state.cohort.answered == Collection.of(state.cohort.members).answered
        assert state.cohort.lost == Collection.of(state.cohort.members).lost
        if state.phase in (Phase.TRAINING, Phase.EVALUATING) and state.cohort.members:
            assert state.deadline < NEVER
            late = Script(script.policy, state)
            late.now = max(script.now, state.deadline)
            late.feed(ev.Tick())
            assert late.state.phase is not state.phase


def test_every_handler_is_reachable_from_a_phase_that_exists() -> None:
    assert {phase for phase, _ in TRANSITIONS} == set(Phase) - {Phase.FINISHED}


@pytest.mark.parametrize("changes", [{"quorum": 0}, {"round_seconds": 0.0}, {"goal": 1}, {"rounds": -1}])
def test_policy_out_of_bounds_is_an_error_that_names_it(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        replace(POLICY, **changes)  # type: ignore[arg-type]
    assert caught.value.facts["name"] in changes
    assert caught.value.hint


def test_orders_of_a_large_cohort_are_sent_again_later_than_those_of_a_small_one() -> None:
    """An aggregator that is still busy with the first answers must not ask for more of them."""
    devices = tuple(f"d{number:05}" for number in range(5_000))
    script = Script(replace(POLICY, round_seconds=1000.0))
    script.feed(ev.NodesChanged(frozenset(devices)))
    script.feed(ev.RoundOpened(devices, script.now + 1000.0))
    assert script.feed(ev.Tick(), after=POLICY.resend_seconds + 1.0) == []
    again = script.feed(ev.Tick(), after=20.0)
    assert again == [ev.ResendOrder(device) for device in devices]
    assert script.feed(ev.Tick(), after=POLICY.resend_seconds + 1.0) == []
