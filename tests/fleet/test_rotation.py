"""Keys that are rotated while a fleet learns: devices seal to the newest, nothing that was learned is lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloud_server.db.rounds import load_rounds, load_updates
from cloud_server.keys import CloudKeys
from cloud_server.release.key_watch import KeyWatch
from edge_agent.settings import EdgeSettings, ReleaseSettings
from fleet.scenario import RunScenario, Scenario
from fleet.simulate import RUN, job_cost, run_config
from fleet.simulated_device import FLEET, TENANT
from fleet.simulation import Simulation
from fleet.virtual_people import virtual_federation
from models.bundle import Bundle
from wire.primitives import KemPrivateKey, SigningKey

DEVICES = 6
ROUNDS = 5
SCENARIO = Scenario(run=RunScenario(evaluate_every=1))


@pytest.mark.parametrize("algorithm", ["x25519", "mlkem768-x25519"])
def test_rotation_in_the_middle_of_a_fleets_rounds_loses_no_update(
    watch_bundle: Bundle, algorithm: str
) -> None:
    federation = virtual_federation(DEVICES, SCENARIO.data, seed=5)
    simulation = Simulation(
        federation,
        watch_bundle,
        run_config(SCENARIO, devices=DEVICES, rounds=ROUNDS),
        seed=5,
        settings=EdgeSettings(release=ReleaseSettings(check_seconds=5.0)),
        cost=job_cost(SCENARIO.faults, 5),
    )
    rotation = _Rotation(simulation, algorithm)
    sealed_to: dict[int, set[bytes]] = {}

    def on_round(number: int) -> None:
        sealed_to[number] = {agent.parts.speaker.kem_key_id for agent in simulation.agents.values()}
        if number == 2:
            rotation.rotate()
        if number == 4:
            rotation.use_order()

    # Between two rounds the books are quiet; this one comes while updates are under way.
    simulation.time.later(3.0, rotation.rotate)
    simulation.run(on_round)
    with simulation.base.database.read() as connection:
        rounds = load_rounds(connection, RUN)
        folded = [
            update.update_id
            for row in rounds
            for update in load_updates(connection, RUN, row.number, "train", "folded")
        ]
    assert len(set(folded)) == len(folded) == DEVICES * ROUNDS
    outboxes = [agent.parts.outbox for agent in simulation.agents.values()]
    assert all(outbox.depth() == 0 for outbox in outboxes)
    assert not any(
        outbox.totals().get(state) for outbox in outboxes for state in ("refused", "expired", "evicted")
    )
    assert sealed_to[ROUNDS] == {rotation.keys.kem[0].key_id}
    assert rotation.keys.kem[0].algorithm == algorithm
    assert len(rotation.keys.kem) == 3
    simulation.close()


def test_stolen_kem_key_costs_no_update_and_nothing_more_is_sealed_to_it(watch_bundle: Bundle) -> None:
    """It is dropped while devices train: what they seal to it before they hear of that is sealed anew, counted once."""
    federation = virtual_federation(DEVICES, SCENARIO.data, seed=6)
    simulation = Simulation(
        federation,
        watch_bundle,
        run_config(SCENARIO, devices=DEVICES, rounds=2),
        seed=6,
        settings=EdgeSettings(release=ReleaseSettings(check_seconds=5.0)),
        cost=job_cost(SCENARIO.faults, 6),
    )
    rotation = _Rotation(simulation, "x25519")
    stolen = rotation.keys.kem[0].key_id
    agents = simulation.agents.values()
    sealed_to: dict[bytes, set[bytes]] = {}

    def look() -> None:
        is_stolen = rotation.keys.kem[0].key_id != stolen
        for row in (row for agent in agents for row in agent.parts.outbox.pending() if is_stolen):
            sealed_to.setdefault(row.update_id, set()).add(row.kem_key_id)
        if not is_stolen and any(agent.state.phase == "training" for agent in agents):
            rotation.steal()
        simulation.time.later(0.02, look)

    look()
    simulation.run(lambda number: None)
    with simulation.base.database.read() as connection:
        rounds = load_rounds(connection, RUN)
        folded = [
            update.update_id
            for row in rounds
            for update in load_updates(connection, RUN, row.number, "train", "folded")
        ]
    assert len(set(folded)) == len(folded) == DEVICES * 2
    waited = {update_id for update_id, keys in sealed_to.items() if stolen in keys}
    assert waited, "nothing was sealed to the key after it was stolen"
    assert waited <= set(folded)
    assert all(agent.parts.outbox.depth() == 0 for agent in agents)
    assert {agent.parts.speaker.kem_key_ids for agent in agents} == {frozenset({rotation.keys.kem[0].key_id})}
    simulation.close()


class _Rotation:
    """What the command and the service do, on the keys of a simulation."""

    def __init__(self, simulation: Simulation, algorithm: str) -> None:
        self.keys: CloudKeys = simulation.base.keys
        self._algorithm = algorithm
        self._watch = KeyWatch(
            lambda: self.keys,
            simulation.base.repository,
            downlink=simulation.cloud.downlink,
            inbox=simulation.cloud.aggregator.inbox,
            clock=simulation.time,
            tenant=TENANT,
            fleet=FLEET,
        )

    def rotate(self) -> None:
        """Another key to seal to, and another for orders that is only listed yet."""
        kem = (KemPrivateKey.generate(self._algorithm), *self.keys.kem)
        orders = (SigningKey.generate(), *self.keys.other_orders)
        self.keys = replace(self.keys, kem=kem, other_orders=orders)
        self._watch.tick()

    def steal(self) -> None:
        """Another key to seal to; the one before is listed no more, and opens nothing."""
        self.keys = replace(self.keys, kem=(KemPrivateKey.generate(self._algorithm),))
        self._watch.tick()

    def use_order(self) -> None:
        """Devices had time to hear of it: it signs now."""
        newest, *rest = self.keys.other_orders
        self.keys = replace(self.keys, order=newest, other_orders=(self.keys.order, *rest))
        self._watch.tick()
