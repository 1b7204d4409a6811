"""The door to the link on a virtual clock: what waits, what passes, what it has cost, and what a restart remembers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path

import pytest
from msgspec import structs

from edge_agent import actions as do
from edge_agent import events as on
from edge_agent.agent import Agent
from edge_agent.link.allowance import NOTE_NAME, Allowance, read_note
from edge_agent.link.budget import IDLE_SHARE, idle_bytes_a_day, keepalive_for
from edge_agent.link.door import AHEAD_BYTES, Link, plan_of
from edge_agent.settings import (
    EdgeSettings,
    LinkSettings,
    NetworkSettings,
    ReportSettings,
    load_edge_settings,
)
from edge_agent.store.storage import MEMORY, Database, open_database
from edge_agent.vitals.check import judge_link
from models.bundle import Bundle
from process.options import render_toml
from tests.edge.lab import Lab, VirtualTime, feed
from tests.edge.test_state import NOW, at, run, started
from wire.errors import ConfigurationError, TransportError
from wire.messages import InferenceReport, Telemetry, Update
from wire.traffic import Traffic, TrafficMeter

MORNING = 1_800_000_000.0
"""Where the lab's clock begins: 2027-01-15, 08:00 UTC."""
HOUR = 3600.0


def settings(**link: object) -> EdgeSettings:
    chosen = LinkSettings(timezone="UTC", **link)  # type: ignore[arg-type]
    return EdgeSettings(link=chosen, network=NetworkSettings(late_seconds=30 * 86_400.0))


def quiet(**link: object) -> EdgeSettings:
    """Of a device that says little: virtual days are short."""
    report = ReportSettings(telemetry_seconds=900.0, inference_seconds=3600.0)
    return structs.replace(settings(**link), report=report)


class CountedLine:
    """A connection whose cost a test sets, and which remembers what it was asked."""

    def __init__(self) -> None:
        self.sent = self.received = 0
        self.muted: list[tuple[str, ...]] = []
        self.spreads: list[float] = []

    def traffic(self) -> Traffic:
        return Traffic(self.sent, self.received)

    def mute(self, filters: Collection[str]) -> None:
        self.muted.append(tuple(filters))

    def spread(self, seconds: float) -> None:
        self.spreads.append(seconds)


@pytest.fixture
def clock() -> VirtualTime:
    return VirtualTime()


@pytest.fixture
def line() -> CountedLine:
    return CountedLine()


def door(
    clock: VirtualTime, line: CountedLine, database: Database, folder: Path | None = None, **link: object
) -> Link:
    found = Link(plan_of(settings(**link)), database, clock, line, folder)
    found.begin(["rd", "bl"])
    return found


# ---- the budget ------------------------------------------------------------------------------------------------


def test_link_shuts_when_its_budget_is_spent_and_opens_with_the_next_day(
    clock: VirtualTime, line: CountedLine
) -> None:
    link = door(clock, line, open_database(MEMORY, clock=clock), metered=True, bytes_per_day=10_000_000)
    line.received = 4_000_000
    assert link.look().is_open
    line.sent = 5_500_000
    view = link.look()
    assert (view.is_open, view.spent_day) == (False, 9_500_000), "an idle agent needs the rest of the day"
    assert view.reason == "its budget of the day is spent"
    assert datetime.fromtimestamp(view.until, UTC) == datetime(2027, 1, 16, tzinfo=UTC)
    assert not link.may_upload(1000)
    clock.advance_to(16 * HOUR)
    assert link.look().is_open
    assert link.view.spent_day == 0
    assert link.view.spent_month == 9_500_000
    assert line.muted == [(), ("rd", "bl"), ()]


def test_month_shuts_the_link_until_its_day(clock: VirtualTime, line: CountedLine) -> None:
    database = open_database(MEMORY, clock=clock)
    link = door(clock, line, database, metered=True, bytes_per_month=100_000_000, month_begins=20)
    line.sent = 99_000_000
    assert link.look().reason == "its budget of the month is spent"
    assert datetime.fromtimestamp(link.view.until, UTC) == datetime(2027, 1, 20, tzinfo=UTC)


def test_what_was_spent_survives_restarts_and_a_clock_that_jumps(
    clock: VirtualTime, line: CountedLine
) -> None:
    database = open_database(MEMORY, clock=clock)
    budget = {"metered": True, "bytes_per_day": 10_000_000}
    link = door(clock, line, database, **budget)
    line.sent = 9_900_000
    assert not link.look().is_open
    for years in (14, 0):  # to 2040 and back
        clock.wall_offset = MORNING + years * 31_557_600.0
        again = door(clock, CountedLine(), database, **budget)
        assert again.view.is_open is bool(years)
        assert again.view.spent_day == (0 if years else 9_900_000)
    clock.advance_to(16 * HOUR)
    assert again.look().is_open


def test_damaged_ledger_begins_at_nothing_and_says_so(
    clock: VirtualTime, line: CountedLine, caplog: pytest.LogCaptureFixture
) -> None:
    database = open_database(MEMORY, clock=clock)
    for damaged in (b"{", b'{"days":{"x":-1}}', 7, "text"):
        database.set_fact("link_ledger", damaged)
        assert door(clock, line, database, metered=True, bytes_per_day=10_000_000).view.spent_day == 0
    assert "link_ledger_unusable" in caplog.text


def test_budget_is_not_overrun_by_more_than_what_is_on_its_way(clock: VirtualTime, line: CountedLine) -> None:
    """A socket that takes everything at once, and one that takes nothing for a while."""
    link = door(clock, line, open_database(MEMORY, clock=clock), metered=True, bytes_per_day=20_000_000)
    chunk, handed = 120_000, 0
    for number in range(1000):
        if link.may_upload(chunk):
            link.passed(chunk, is_upload=True)
            handed += chunk
        elif line.sent + chunk > handed and not link.may_upload(chunk):
            break
        if number % 3 == 0:
            line.sent = handed
        assert handed - line.sent <= AHEAD_BYTES, "what is handed over too early cannot be held back any more"
    most = 20_000_000 - link.plan.idle_bytes_a_day * 16 / 24  # until midnight
    assert most - chunk < handed <= most


def test_check_stops_at_the_budget_and_its_cost_counts_even_if_the_agent_dies(
    clock: VirtualTime, line: CountedLine, tmp_path: Path
) -> None:
    class Meter(TrafficMeter):
        bytes = 0

        def total(self) -> Traffic:
            return Traffic(received_bytes=self.bytes)

    database, meter = open_database(MEMORY, clock=clock), Meter()
    budget = {"metered": True, "bytes_per_day": 10_000_000}
    link = door(clock, line, database, tmp_path, **budget)
    terms = link.terms()
    assert terms.is_open
    assert 8_000_000 < (terms.bytes_left or 0) < 10_000_000
    allowance = Allowance(tmp_path / NOTE_NAME, meter, clock, bytes_left=terms.bytes_left, until=terms.until)

    def download() -> None:
        for _ in range(1000):
            meter.bytes += 100_000
            allowance.check()
            link.look()  # while the check runs, its note is its own

    with pytest.raises(TransportError, match="budget") as caught:
        download()
    assert caught.value.facts["is_final"]
    assert link.view.spent_day == 0
    # The agent and its check are killed: nobody told of the end.
    again = door(clock, CountedLine(), database, tmp_path, **budget)
    assert 0 <= meter.bytes - again.view.spent_day <= 256 * 1024
    assert not (tmp_path / NOTE_NAME).exists()


@pytest.mark.parametrize("content", [b"", b"-5", b"12x", b"9" * 400, b"\xff"])
def test_note_that_cannot_be_read_is_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "note").write_bytes(content)
    assert read_note(tmp_path / "note") in (0, int("9" * 32))
    assert read_note(tmp_path / "note") == 0


# ---- what a person is shown ------------------------------------------------------------------------------------


def shown(link: Link) -> dict[str, object]:
    return {"link": link.as_dict()}


def test_check_says_until_when_the_link_is_shut_and_what_it_has_cost(
    clock: VirtualTime, line: CountedLine
) -> None:
    budget = {"metered": True, "bytes_per_day": 10_000_000}
    link = door(clock, line, open_database(MEMORY, clock=clock), **budget)
    wanted = settings(**budget)
    assert judge_link(wanted, shown(link), clock).level == "ok"
    line.sent = 9_900_000
    link.look()
    found = judge_link(wanted, shown(link), clock)
    assert found.level == "warn"
    assert "its budget of the day is spent; 9.9 MB of 10.0 MB this day" in found.detail
    assert found.hint


def test_check_warns_of_a_budget_that_an_idle_agent_alone_uses_up(clock: VirtualTime) -> None:
    found = judge_link(settings(metered=True, bytes_per_day=1_000_000), {}, clock)
    assert found.level == "warn"
    assert "report.telemetry_seconds" in found.hint
    assert judge_link(EdgeSettings(), {}, clock).detail == "no limits"
    closed = judge_link(settings(windows=["02:00-05:00"]), {}, clock)
    assert closed.level == "ok", "as it should be"
    assert "outside of its windows until" in closed.detail


# ---- the keepalive ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1e5, 3e5, 1e6, 3e6, 5e6, 1e7, 1e8, float("inf")])
def test_keepalive_is_the_shortest_that_leaves_half_of_the_budget(budget: float) -> None:
    habits = {"heartbeat": 600.0, "report": 3600.0, "check": 86_400.0}
    keepalive = keepalive_for(budget, nat_seconds=300, **habits)
    assert 30 <= keepalive <= 270
    idle = idle_bytes_a_day(keepalive=keepalive, **habits)
    assert idle <= IDLE_SHARE * budget or keepalive == 270, "as little as the network allows"
    if keepalive > 30:
        assert idle_bytes_a_day(keepalive=keepalive - 1, **habits) > IDLE_SHARE * budget


def test_keepalive_of_the_settings_goes_before_the_budget_and_thirty_is_that_of_no_budget() -> None:
    assert plan_of(EdgeSettings()).keepalive_seconds == 30
    metered = settings(metered=True, bytes_per_day=1_000_000)
    assert plan_of(metered).keepalive_seconds == 270
    wanted = structs.replace(metered, network=NetworkSettings(keepalive_seconds=45))
    assert plan_of(wanted).keepalive_seconds == 45


@pytest.mark.parametrize(
    ("link", "match"),
    [
        ({"metered": True}, "go together"),
        ({"bytes_per_day": 5}, "go together"),
        ({"windows": ["25:00-26:00"]}, "window"),
        ({"timezone": "Mars/Olympus"}, "zone"),
    ],
)
def test_link_that_cannot_be_is_refused_when_settings_are_read(
    tmp_path: Path, link: dict[str, object], match: str
) -> None:
    place = tmp_path / "agent.toml"
    place.write_text(render_toml(EdgeSettings(link=LinkSettings(**link))), encoding="utf-8")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=match):
        load_edge_settings(place, {})


# ---- the state machine -----------------------------------------------------------------------------------------


def test_shut_link_holds_updates_questions_reports_and_ordinary_checks() -> None:
    state, _ = run(started(pending=((b"u" * 16, 4e9),)), on.LinkLooked(False))
    state = dataclasses.replace(state, report_at=0.0, telemetry_at=0.0, check_at=0.0)
    state, actions = run(state, on.Tick(), now=at(5))
    assert {type(action) for action in actions} == {do.PublishTelemetry}
    state, actions = run(state, on.Connected(), now=at(6))
    assert not [action for action in actions if isinstance(action, do.SendUpdate)]
    state, actions = run(state, on.LinkLooked(True), now=at(7))
    assert all(107 <= upload.send_at <= 108 for upload in state.uploads), "spread, as the whole fleet begins"
    _, actions = run(state, on.Tick(), now=at(9))
    assert {do.SendUpdate(b"u" * 16, is_again=True), do.PublishReport(), do.StartJob("update")} <= set(
        actions
    )


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(on.AnnouncementArrived(1, 9), id="keys came or went"),
        pytest.param(on.AnnouncementArrived(1), id="a rollback"),
        pytest.param(on.KeysUnknown(), id="a key that we do not know"),
        pytest.param(on.CheckWanted(), id="a certificate"),
        pytest.param(on.Disconnected(is_distrust=True), id="distrust"),
    ],
)
def test_keys_certificates_and_rollbacks_do_not_wait_for_the_link(event: on.Event) -> None:
    known = dataclasses.replace(started(release_version=2), keys_version=7)
    state, _ = run(known, on.LinkLooked(False))
    state, _ = run(state, event)
    _, actions = run(state, on.Tick(), now=at(2))
    assert do.StartJob("update") in actions


def test_new_release_waits_for_the_link_and_is_fetched_when_it_opens() -> None:
    state, _ = run(started(release_version=2), on.LinkLooked(False), on.AnnouncementArrived(3))
    state, actions = run(state, on.Tick(), now=at(1000))
    assert do.StartJob("update") not in actions
    state, _ = run(state, on.LinkLooked(True), now=at(1001))
    _, actions = run(state, on.Tick(), now=at(1003))
    assert do.StartJob("update") in actions


def test_announcement_says_how_long_the_fleet_takes() -> None:
    state, actions = run(started(), on.AnnouncementArrived(2, reconnect_seconds=40.0, spread_seconds=600.0))
    assert do.SpreadReturns(40.0) in actions
    starts = []
    for salt in range(200):
        other, _ = run(
            dataclasses.replace(started(), salt=salt * 7919), on.AnnouncementArrived(2, 0, 0.0, 600.0)
        )
        starts.append(other.check_at - NOW.elapsed)
    assert min(starts) < 60 < 540 < max(starts) <= 600
    assert run(state, on.AnnouncementArrived(2))[0].spread == 0.0


# ---- the agent -------------------------------------------------------------------------------------------------


def taught(lab: Lab, bundle: Bundle, database: Database, wanted: EdgeSettings) -> Agent:
    agent = lab.agent(settings=wanted, database=database)
    lab.run(20.0)
    return agent


def test_windowed_device_trains_and_sends_inside_of_its_window_only(bundle: Bundle, tmp_path: Path) -> None:
    lab = Lab(bundle, tmp_path)
    cloud, database = lab.cloud, open_database(MEMORY, clock=lab.time)
    lab.settle()
    cloud.release(cloud.candidate(), 1)
    wanted = quiet(windows=["09:00-10:00"])
    agent = taught(lab, bundle, database, wanted)
    assert agent.parts.serving.current is None, "a release waits, too"
    assert not agent.parts.link.view.is_open
    lab.run(HOUR)  # 09:00
    assert agent.parts.serving.current is not None
    feed(agent, bundle)
    cloud.invite(cloud.head_of(bundle.checkpoint().params), seconds=20 * 86_400.0)
    cloud.order("dev-1")
    cloud.broadcast()
    lab.run(60.0)
    assert lab.joins()[-1].accepted
    heard = cloud.of(Update)[0]
    lab.run(HOUR)  # past 10:00, and no receipt came
    sent = len(cloud.of(Update))
    reports, beats = len(cloud.of(InferenceReport)), len(cloud.of(Telemetry))
    cloud.order("dev-1")
    lab.run(2 * HOUR)
    assert "waits: it is outside of its windows" in lab.joins()[-1].reason
    lab.agents.clear()
    lab.broker.cut("dev-1", for_seconds=1e9)
    agent = lab.agent(settings=wanted, database=database)
    lab.run(12 * HOUR)  # restarted, the next day, 00:00
    assert len(cloud.of(Update)) == sent
    assert len(cloud.of(InferenceReport)) == reports
    assert len(cloud.of(Telemetry)) > beats + 40, "heartbeats pass at all hours"
    lab.run(10 * HOUR)
    assert len(cloud.of(Update)) > sent
    assert {each.transfer for each in cloud.of(Update)} == {heard.transfer}
    cloud.receipt("dev-1", heard)
    lab.settle()
    assert agent.parts.outbox.totals()["stored"] == 1


def test_metered_device_without_a_socket_counts_at_its_door(bundle: Bundle, tmp_path: Path) -> None:
    lab = Lab(bundle, tmp_path)
    cloud, database = lab.cloud, open_database(MEMORY, clock=lab.time)
    lab.settle()
    cloud.release(cloud.candidate(), 1)
    agent = taught(lab, bundle, database, quiet(metered=True, bytes_per_day=2_000_000))
    head = cloud.head_of(bundle.checkpoint().params)
    cloud.invite(head, seconds=20 * 86_400.0)
    for _ in range(200):
        if not agent.parts.link.view.is_open:
            break
        for _ in range(1 + 100_000 // len(head.to_bytes())):
            cloud.broadcast()
        lab.run(20.0)
    assert agent.parts.link.view.reason == "its budget of the day is spent"
    assert 1_000_000 <= agent.parts.link.view.spent_day <= 2_000_000
    cloud.order("dev-1")
    lab.settle()
    assert "its budget of the day is spent" in lab.joins()[-1].reason
    spent = agent.parts.link.view.spent_day
    lab.agents.clear()
    lab.broker.cut("dev-1", for_seconds=1e9)
    agent = lab.agent(settings=quiet(metered=True, bytes_per_day=2_000_000), database=database)
    assert agent.parts.link.view.spent_day >= spent
    assert not agent.parts.link.view.is_open
    lab.run(16 * HOUR)
    assert agent.parts.link.view.is_open
