"""Clocks that lie: inference never stops, expired metadata never comes back, the floor moves by what was signed."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from edge_agent.agent import Agent
from edge_agent.release.fetcher import MemoryFetcher
from edge_agent.release.tuf_client import check
from edge_agent.store.storage import MEMORY, Database, open_database
from edge_agent.store.time_floor import BUILT, RECEIPT_LIFE_SECONDS, RECEIPT_STEP_SECONDS, FlooredClock
from tests.edge.lab import START, Lab, feed
from tests.edge.tiny_release import SteppedClock
from wire.errors import ReleaseError
from wire.messages import Update

DAY = 86_400.0
YEAR = 365 * DAY


@pytest.fixture
def database() -> Database:
    return open_database(MEMORY, clock=SteppedClock())


def test_device_that_starts_in_1970_counts_from_the_build(database: Database) -> None:
    assert FlooredClock(SteppedClock(0.0), database, built=BUILT).now() == BUILT
    assert time.time() > BUILT


def test_floor_follows_the_time_at_which_metadata_was_signed(database: Database) -> None:
    clock = FlooredClock(SteppedClock(0.0), database, built=BUILT)
    clock.note_metadata(BUILT + YEAR, BUILT + YEAR + DAY)
    assert clock.now() == BUILT + YEAR
    clock.note_metadata(BUILT, BUILT + DAY)
    assert clock.now() == BUILT + YEAR


def test_metadata_that_says_it_was_signed_after_its_end_moves_the_floor_to_its_end(
    database: Database,
) -> None:
    clock = FlooredClock(SteppedClock(0.0), database)
    clock.note_metadata(BUILT + YEAR, BUILT + DAY)
    assert clock.floor == BUILT + DAY


def test_floor_follows_a_receipt_but_not_beyond_the_metadata_of_the_day(database: Database) -> None:
    clock = FlooredClock(SteppedClock(0.0), database, built=BUILT)
    clock.note_acknowledgement(BUILT + YEAR)
    assert clock.floor == BUILT  # no metadata was verified yet: nothing says how far a stolen key may reach
    clock.note_metadata(BUILT + DAY, BUILT + DAY + 5000.0)
    clock.note_acknowledgement(BUILT + DAY + 600.0 + RECEIPT_LIFE_SECONDS)
    assert clock.floor == BUILT + DAY + 600.0
    for _ in range(3):
        clock.note_acknowledgement(BUILT + YEAR)
    assert clock.floor == BUILT + DAY + 5000.0
    clock.note_acknowledgement(0.0)
    assert clock.floor == BUILT + DAY + 5000.0


def test_one_receipt_moves_the_floor_at_most_an_hour_beyond_what_the_device_takes_for_now(
    database: Database,
) -> None:
    machine = SteppedClock(BUILT + 10 * DAY)
    clock = FlooredClock(machine, database, built=BUILT)
    clock.note_metadata(BUILT + 10 * DAY, BUILT + 11 * DAY)
    clock.note_acknowledgement(BUILT + YEAR)
    assert clock.floor == BUILT + 10 * DAY + RECEIPT_STEP_SECONDS
    clock.note_acknowledgement(BUILT + YEAR)
    assert clock.floor == BUILT + 10 * DAY + 2 * RECEIPT_STEP_SECONDS


def test_aggregator_in_another_year_does_not_take_a_device_along_whose_clock_is_right(
    database: Database,
) -> None:
    machine = SteppedClock(BUILT + 10 * DAY)
    clock = FlooredClock(machine, database, built=BUILT)
    clock.note_metadata(BUILT + 14 * YEAR, BUILT + 14 * YEAR + DAY)
    assert clock.floor == BUILT + 11 * DAY
    assert clock.behind_seconds == DAY
    # A clock that is behind is not asked.
    clock.note_metadata(BUILT + 20 * DAY, BUILT + 21 * DAY)
    assert clock.floor == BUILT + 20 * DAY


def test_floor_and_its_bound_survive_a_restart(tmp_path: Path) -> None:
    first = open_database(tmp_path)
    clock = FlooredClock(SteppedClock(0.0), first)
    clock.note_metadata(BUILT, BUILT + DAY)
    first.close()
    again = FlooredClock(SteppedClock(0.0), open_database(tmp_path))
    again.note_acknowledgement(BUILT + YEAR)
    reached = BUILT + RECEIPT_STEP_SECONDS
    assert (again.now(), again.behind_seconds) == (reached, reached)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_time_that_is_no_number_moves_nothing(database: Database, value: float) -> None:
    clock = FlooredClock(SteppedClock(0.0), database)
    clock.note_metadata(value, value)
    clock.raise_to(value)
    assert clock.floor == 0.0


def test_release_check_moves_the_floor_to_the_time_of_its_timestamp(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(60)
    assert agent.parts.serving.current is not None
    signed = lab.cloud.repository._load().timestamp.unrecognized_fields["shoal_signed_at"]
    assert agent.parts.clock.floor >= signed >= START


def test_receipt_moves_the_floor_of_a_device(lab: Lab) -> None:
    agent = installed(lab)
    feed(agent, lab.bundle)
    before = agent.parts.clock.floor
    lab.run(3600)
    lab.cloud.invite(lab.bundle.checkpoint())
    lab.cloud.order("dev-1")
    lab.cloud.broadcast()
    lab.run(30)
    lab.cloud.receipt("dev-1", lab.cloud.of(Update)[-1], expiry=int(lab.time.now() + RECEIPT_LIFE_SECONDS))
    lab.run(5)
    assert agent.parts.clock.floor > before + 3600
    assert agent.parts.outbox.depth() == 0


@pytest.mark.parametrize("offset", [-START, 14 * YEAR, -3600.0, 3600.0], ids=["1970", "2040", "-1 h", "+1 h"])
def test_clock_that_lies_never_stops_inference(lab: Lab, offset: float) -> None:
    agent = installed(lab)
    window = np.zeros(agent.input_shape, np.float32)
    before = agent.infer(window)
    lab.time.wall_offset += offset
    lab.run(7 * 3600)  # a release check falls into it
    assert agent.infer(window).release_version == before.release_version == 1
    assert agent.parts.serving.total.errors == 0
    assert agent.parts.clock.floor < START + DAY  # by what was signed, never by the machine's clock
    lab.time.wall_offset -= offset
    lab.cloud.repository.refresh()
    lab.cloud.release(lab.cloud.candidate(lab.bundle.checkpoint().params * np.float32(0.9)), 2)
    lab.run(7 * 3600)
    assert agent.infer(window).release_version == 2


def test_clock_that_was_set_back_does_not_bring_expired_metadata_back(lab: Lab) -> None:
    """The attacker turns the clock back and serves what was current then: the floor says it has expired."""
    agent = installed(lab)
    old = {key: lab.cloud.repository.read("/" + key) for key in ("metadata/timestamp.json",)}
    lab.run(30 * 3600)
    lab.cloud.repository.refresh()
    lab.run(7 * 3600)  # a device looks every six hours
    floor = agent.parts.clock.floor
    assert floor > START + DAY
    fetcher = MemoryFetcher(lambda path: old.get(path.lstrip("/")) or lab.cloud.repository.read(path))
    lying = SteppedClock(START)
    database = agent.parts.database
    root = lab.cloud.repository.first_root()
    assert check(lab.folder / "fresh", root, fetcher, "stable", lying).release_version == 1
    with pytest.raises(ReleaseError, match="expired"):
        check(lab.folder / "floored", root, fetcher, "stable", FlooredClock(lying, database))


def installed(lab: Lab) -> Agent:
    """A device that serves release 1."""
    agent = lab.agent()
    lab.run(600)
    return agent
