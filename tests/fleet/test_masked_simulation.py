"""Masked rounds with real agents: the same seed gives the same bytes, through lost connections and vanished devices."""

from __future__ import annotations

import pytest

from cloud_server.db.rounds import load_rounds, load_updates
from fleet.scenario import FaultScenario, RunScenario, Scenario, SecureScenario
from fleet.simulate import RUN, job_cost, plan_cuts, report_of, run_config
from fleet.simulation import Simulation
from fleet.virtual_people import virtual_federation
from models.bundle import Bundle

DEVICES = 6
MASKED = RunScenario(
    strategy="FedAvg",
    evaluate_every=2,
    deadline_seconds=60.0,
)
PAIRWISE = SecureScenario(policy="pairwise", dropout=0.34)
STORMY = Scenario(
    run=MASKED,
    secure=PAIRWISE,
    faults=FaultScenario(cuts_per_hour=240.0, cut_seconds=8.0, slow_share=0.25, slow_factor=3.0),
)


def simulation_of(bundle: Bundle, scenario: Scenario, *, rounds: int) -> Simulation:
    federation = virtual_federation(DEVICES, scenario.data, seed=5)
    config = run_config(scenario, devices=DEVICES, rounds=rounds)
    simulation = Simulation(federation, bundle, config, seed=5, cost=job_cost(scenario.faults, 5))
    plan_cuts(simulation, scenario.faults, 5)
    return simulation


def play(bundle: Bundle) -> tuple[bytes, str]:
    simulation = simulation_of(bundle, STORMY, rounds=2)
    simulation.run()
    report = report_of(STORMY, simulation, 5).to_json()
    with simulation.base.database.read() as connection:
        folded = [
            update
            for row in load_rounds(connection, RUN)
            for update in load_updates(connection, RUN, row.number, "train", "folded")
        ]
    assert folded
    assert {update.codec for update in folded} == {"ring32"}
    assert all(update.num_examples == 1 and not update.metrics for update in folded)
    assert all(agent.parts.outbox.depth() == 0 for agent in simulation.agents.values())
    head = simulation.runner.head.sha256
    simulation.close()
    return head, report


@pytest.mark.slow
def test_masked_simulation_with_the_same_seed_gives_the_same_bytes(watch_bundle: Bundle) -> None:
    assert play(watch_bundle) == play(watch_bundle)


@pytest.mark.slow
def test_masked_round_goes_on_without_a_device_that_vanishes_after_it_shared(watch_bundle: Bundle) -> None:
    """Its connection is cut in mid-round: the others tell its mask key's shares, and the round is folded without it."""
    simulation = simulation_of(watch_bundle, Scenario(run=MASKED, secure=PAIRWISE), rounds=1)
    lost = sorted(simulation.agents)[0]
    agent = simulation.agents[lost]
    take = agent.parts.masked.hear

    def vanish(body: object) -> object:
        answer = take(body)  # type: ignore[arg-type]
        simulation.broker.cut(lost, for_seconds=3600.0)
        return answer

    agent.parts.masked.hear = vanish  # type: ignore[assignment,method-assign]
    simulation.run()
    with simulation.base.database.read() as connection:
        done = [row for row in load_rounds(connection, RUN) if row.head_sha256]
        folded = {u.device for u in load_updates(connection, RUN, done[0].number, "train", "folded")}
    assert lost not in folded
    assert len(folded) == DEVICES - 1
    simulation.close()
