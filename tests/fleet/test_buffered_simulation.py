"""A fleet with slow devices in buffered rounds: the quick ones are not held up, and what the slow ones learn counts."""

from __future__ import annotations

from collections import Counter

import pytest
import sqlalchemy as sa

from cloud_server.db.schema import orders, updates
from fleet.scenario import FaultScenario, RunScenario, Scenario
from fleet.simulate import RUN, job_cost, run_config
from fleet.simulation import Simulation
from fleet.virtual_people import virtual_federation
from models.bundle import Bundle

DEVICES, ROUNDS, SEED = 8, 6, 5
FAULTS = FaultScenario(slow_share=0.4, slow_factor=4.0)


def played(bundle: Bundle, run: RunScenario) -> Simulation:
    scenario = Scenario(run=run, faults=FAULTS)
    federation = virtual_federation(DEVICES, scenario.data, seed=SEED)
    config = run_config(scenario, devices=DEVICES, rounds=ROUNDS)
    simulation = Simulation(federation, bundle, config, seed=SEED, cost=job_cost(FAULTS, SEED))
    simulation.run()
    return simulation


@pytest.mark.slow
def test_slow_devices_count_in_later_rounds_and_hold_nobody_up(watch_bundle: Bundle) -> None:
    common = {"strategy": "FedAvg", "evaluate_every": 0, "quorum_share": 0.5}
    buffered = played(watch_bundle, RunScenario(mode="buffered", goal_share=0.5, **common))
    waiting = played(watch_bundle, RunScenario(**common))
    with buffered.base.database.read() as connection:
        joined = sa.select(updates, orders.c.round.label("asked_in")).join(
            orders, orders.c.order_id == updates.c.order_id
        )
        rows = connection.execute(joined.where(updates.c.run == RUN)).all()
    stale = [row for row in rows if row.state == "folded" and row.round > row.asked_in]
    assert stale
    assert {row.state for row in rows} <= {"folded", "late", "discarded"}
    assert set(Counter((row.round, row.device) for row in rows if row.state == "folded").values()) == {1}
    # On the devices' own books nothing is left over either.
    open_rows = [agent.parts.outbox.depth() for agent in buffered.agents.values()]
    ended = Counter[str]()
    for agent in buffered.agents.values():
        ended.update(agent.parts.outbox.totals())
    assert sum(open_rows) == 0
    assert ended["stored"] == sum(row.state in ("folded", "discarded") for row in rows)
    assert ended["refused"] == sum(row.state == "late" for row in rows)
    assert buffered.time.now() < waiting.time.now()
    buffered.close()
    waiting.close()
