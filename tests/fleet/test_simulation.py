"""The whole loop in one process: the real aggregator and real agents under faults, judged by both sides' books."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloud_server.db.releases import RELEASED, load_releases
from cloud_server.db.rounds import load_rounds, load_updates
from fleet.scenario import DataScenario, FaultScenario, RunScenario, Scenario
from fleet.simulate import RUN, job_cost, plan_cuts, report_of, run_config, simulate
from fleet.simulation import Simulation
from fleet.virtual_people import virtual_federation
from models.bundle import Bundle
from models.federated import results
from wire.errors import ConfigurationError, RoundError

DEVICES = 8
QUIET = Scenario(run=RunScenario(evaluate_every=1))
STORMY = Scenario(
    run=RunScenario(evaluate_every=1, deadline_seconds=60.0),
    faults=FaultScenario(cuts_per_hour=240.0, cut_seconds=8.0, slow_share=0.25, slow_factor=3.0),
)


def play(bundle: Bundle, scenario: Scenario, *, rounds: int, seed: int = 5) -> tuple[Simulation, str]:
    """Plays a scenario to its end; returns the simulation, closed, and its report's text."""
    federation = virtual_federation(DEVICES, scenario.data, seed=seed)
    config = run_config(scenario, devices=DEVICES, rounds=rounds)
    simulation = Simulation(federation, bundle, config, seed=seed, cost=job_cost(scenario.faults, seed))
    plan_cuts(simulation, scenario.faults, seed)
    simulation.run()
    return simulation, report_of(scenario, simulation, seed).to_json()


@pytest.mark.parametrize("scenario", [QUIET, STORMY], ids=["quiet", "stormy"])
def test_simulation_with_the_same_seed_gives_the_same_bytes(watch_bundle: Bundle, scenario: Scenario) -> None:
    first, first_report = play(watch_bundle, scenario, rounds=2)
    second, second_report = play(watch_bundle, scenario, rounds=2)
    head = first.runner.head.sha256
    assert head == second.runner.head.sha256
    assert first_report == second_report
    other, _ = play(watch_bundle, scenario, rounds=2, seed=6)
    assert other.runner.head.sha256 != head
    for simulation in (first, second, other):
        simulation.close()


def test_simulation_folds_every_stored_update_once_through_lost_connections(watch_bundle: Bundle) -> None:
    simulation, _ = play(watch_bundle, STORMY, rounds=3)
    with simulation.base.database.read() as connection:
        rounds = load_rounds(connection, RUN)
        folded = [
            update
            for row in rounds
            for update in load_updates(connection, RUN, row.number, "train", "folded")
        ]
    assert len({update.update_id for update in folded}) == len(folded)
    assert sum(row.metrics.get("train_devices", 0) for row in rounds) == len(folded)
    # What the cloud folded, the device was told of: its outbox owes nothing and counts it as stored.
    stored = sum(agent.parts.outbox.totals().get("stored", 0) for agent in simulation.agents.values())
    assert stored >= len(folded)
    assert all(agent.parts.outbox.depth() == 0 for agent in simulation.agents.values())
    simulation.close()


def test_simulation_serves_the_last_release_on_every_device(watch_bundle: Bundle) -> None:
    simulation, _ = play(watch_bundle, QUIET, rounds=4)
    with simulation.base.database.read() as connection:
        released = [row.version for row in load_releases(connection) if row.state == RELEASED]
    assert len(released) > 1
    for agent in simulation.agents.values():
        model = agent.parts.serving.current
        assert model is not None
        assert model.release_version == max(released)
        answer = agent.infer(next(iter(simulation.federation.devices.values())).test_x[0])
        assert answer.release_version == max(released)
    simulation.close()


@pytest.mark.parametrize("model", ["digits_mlp", "watch_autoencoder"])
def test_simulation_of_another_model_learns_its_own_data(model: str) -> None:
    """An autoencoder too: from the first round on, without labels, and its gate wants a lower error."""
    data = DataScenario(alpha=100.0)
    scenario = Scenario(data=data, run=RunScenario(model=model, evaluate_every=1))
    report = simulate(scenario, devices=6, rounds=2, seed=3)
    assert [row.state for row in report.rounds] == ["done", "done"]
    assert all(row.replies == 6 for row in report.rounds)
    assert report.releases[-1].version > 1
    assert report.gain() > 0
    assert bool(report.releases[-1].separation) == (model == "watch_autoencoder")


def test_card_of_the_first_bundle_says_what_its_model_reached_in_a_fleet(watch_bundle: Bundle) -> None:
    card = (watch_bundle.folder / "CARD.md").read_text(encoding="utf-8")
    for part in (
        "## Data",
        "## Trained by federation, served as int8",
        results()["watch_cnn1d"].text(),
        "## Limits",
    ):
        assert part in card


def test_simulation_without_a_number_of_rounds_is_refused(watch_bundle: Bundle) -> None:
    federation = virtual_federation(1, DataScenario(), seed=1)
    config = run_config(QUIET, devices=1, rounds=1)
    with pytest.raises(RoundError, match="number of rounds"):
        Simulation(federation, watch_bundle, replace(config, policy=replace(config.policy, rounds=0)), seed=1)


def test_simulation_with_an_unknown_strategy_names_the_nearest(watch_bundle: Bundle) -> None:
    scenario = Scenario(run=RunScenario(strategy="FedAvgg"))
    with pytest.raises(ConfigurationError, match="FedAvgg") as caught:
        play(watch_bundle, scenario, rounds=1)
    assert "FedAvg" in caught.value.hint
