"""Who is a member of a round under masks: devices that the registry approves, under either policy."""

from __future__ import annotations

import pytest

from cloud_server.db import rounds as books
from fleet.scenario import RunScenario, Scenario, SecureScenario
from fleet.simulate import RUN, run_config
from fleet.simulation import Simulation
from fleet.virtual_people import virtual_federation
from models.bundle import Bundle
from wire.helper import HelperQuestion, read_question

DEVICES = 6


@pytest.mark.parametrize("policy", ["pairwise", "two_server"])
def test_only_approved_devices_are_members_and_counted(watch_bundle: Bundle, policy: str) -> None:
    """One in quarantine and one revoked speak, and stand in no roster, no terms and no question."""
    secure = SecureScenario(policy=policy, dropout=0.0)  # type: ignore[arg-type]
    scenario = Scenario(run=RunScenario(strategy="FedAvg", evaluate_every=0), secure=secure)
    federation = virtual_federation(DEVICES, scenario.data, seed=5)
    simulation = Simulation(federation, watch_bundle, run_config(scenario, devices=DEVICES, rounds=1), seed=5)
    out, revoked, *approved = sorted(simulation.agents)
    simulation.base.registry.quarantine(out, "seen too often")
    simulation.base.registry.revoke(revoked, "stolen")
    questions: list[HelperQuestion] = []
    if simulation.helper is not None:
        ask = simulation.helper.ask

        def listen(question: bytes, total_bytes: int) -> None:
            questions.append(read_question(question))
            ask(question, total_bytes)

        simulation.helper.ask = listen  # type: ignore[method-assign]
    simulation.run()
    with simulation.base.database.read() as connection:
        (row,) = books.load_rounds(connection, RUN)
        asked = {order.device for order in books.load_orders(connection, RUN, row.number, "train")}
        folded = {each.device for each in books.load_updates(connection, RUN, row.number, "train", "folded")}
    assert asked == folded == set(approved)
    if policy == "pairwise":
        (group,) = row.config["mask_groups"]
        assert [device for device, _ in group["members"]] == approved
        assert group["terms"]["members"] == len(approved)
    else:
        assert row.config["helped"]["members"] == len(approved)
        assert [len(question.seeds) for question in questions] == [len(approved)]
    simulation.close()


def test_too_few_approved_devices_open_no_round_under_masks(watch_bundle: Bundle) -> None:
    """Six are here and speak; with four in quarantine nobody would hide anybody."""
    scenario = Scenario(
        run=RunScenario(strategy="FedAvg", quorum_share=0.34), secure=SecureScenario(policy="two_server")
    )
    federation = virtual_federation(DEVICES, scenario.data, seed=5)
    simulation = Simulation(federation, watch_bundle, run_config(scenario, devices=DEVICES, rounds=1), seed=5)
    for device in sorted(simulation.agents)[2:]:
        simulation.base.registry.quarantine(device)
    aggregator = simulation.cloud.aggregator
    aggregator.start(aggregator.handle)
    for agent in simulation.agents.values():
        agent.start()
        simulation._note_wake(agent)
    aggregator.begin(simulation.runner)
    end = simulation.time.now() + 300.0
    while simulation.time.now() < end:
        simulation._settle()
        simulation.time.advance_to(min(simulation._next_moment(), end))
    with simulation.base.database.read() as connection:
        assert books.load_rounds(connection, RUN) == []
    simulation.close()
