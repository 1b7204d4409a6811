"""Differential privacy through the whole loop: real agents, the real aggregator, and what was spent in the report."""

from __future__ import annotations

import json
import math

import pytest
from msgspec import structs

from cloud_server.db.privacy import load_charges
from cloud_server.db.rounds import load_updates
from cloud_server.privacy.accountant import Mechanism, epsilon_of
from cloud_server.privacy.budget import mechanism_for
from cloud_server.settings import PrivacySettings
from fleet.scenario import RunScenario, Scenario, SecureScenario
from fleet.simulate import RUN, report_of, run_config
from fleet.simulation import Simulation
from fleet.virtual_people import virtual_federation
from models.bundle import Bundle

DEVICES = 8
# So little noise that eight devices learn: what is tested here is that the loop closes.
PRIVATE = Scenario(
    run=RunScenario(evaluate_every=1),
    privacy=PrivacySettings(
        mode="central", clipping_norm=1.0, noise_multiplier=0.05, sampling_rate=0.5, epsilon=1e5
    ),
)


def play(bundle: Bundle, scenario: Scenario, *, rounds: int, seed: int = 5) -> tuple[Simulation, str]:
    federation = virtual_federation(DEVICES, scenario.data, seed=seed)
    config = run_config(scenario, devices=DEVICES, rounds=rounds, seed=seed)
    simulation = Simulation(federation, bundle, config, seed=seed)
    simulation.run()
    return simulation, report_of(scenario, simulation, seed).to_json()


def test_private_fleet_says_what_it_spent_and_says_the_same_again(watch_bundle: Bundle) -> None:
    first, text = play(watch_bundle, PRIVATE, rounds=2)
    second, again = play(watch_bundle, PRIVATE, rounds=2)
    assert text == again
    with first.base.database.read() as connection:
        charges = load_charges(connection)
        counted = [load_updates(connection, RUN, row.round, "train", "folded") for row in charges]
    assert [row.cohort for row in charges] == [len(updates) for updates in counted]
    spent = epsilon_of([(Mechanism(0.05, 0.5), len(charges))], 1e-5)
    assert json.loads(text)["facts"]["epsilon"].startswith(
        f"{spent:.3f} at delta 1e-05, {len(charges)} rounds"
    )
    for simulation in (first, second):
        simulation.close()


def test_fleet_whose_budget_is_spent_ends_before_its_last_round(watch_bundle: Bundle) -> None:
    spent = epsilon_of([(Mechanism(0.05, 0.5), 1)], 1e-5)
    privacy = PrivacySettings(mode="central", noise_multiplier=0.05, sampling_rate=0.5, epsilon=1.001 * spent)
    simulation, _ = play(watch_bundle, Scenario(run=PRIVATE.run, privacy=privacy), rounds=3)
    with simulation.base.database.read() as connection:
        assert len(load_charges(connection)) == 1
    assert simulation.runner.is_finished
    simulation.close()


@pytest.mark.slow
def test_fleet_that_adds_its_own_noise_under_masks_says_what_it_spent_and_stops(watch_bundle: Bundle) -> None:
    """Real agents clip, round and add noise; the aggregator opens sums only; the second of three rounds is the last."""
    privacy = PrivacySettings(mode="distributed", clipping_norm=1.0, noise_multiplier=0.5, sampling_rate=1.0)
    plan = privacy.plan()
    assert plan is not None
    cost = mechanism_for(plan, watch_bundle.manifest.params_size)
    scenario = Scenario(
        run=RunScenario(strategy="FedAvg", deadline_seconds=60.0),
        secure=SecureScenario(policy="pairwise", dropout=0.3),
        privacy=structs.replace(privacy, epsilon=1.0001 * epsilon_of([(cost, 2)], privacy.delta)),
    )
    simulation, text = play(watch_bundle, scenario, rounds=3)
    again, repeated = play(watch_bundle, scenario, rounds=3)
    # Simulated devices draw their noise from the simulation's seed; others from their system.
    assert repeated == text
    again.close()
    with simulation.base.database.read() as connection:
        charges = load_charges(connection)
        folded = [load_updates(connection, RUN, row.round, "train", "folded") for row in charges]
    assert [(row.mode, row.sampling_rate) for row in charges] == [("distributed", 1.0)] * 2
    assert all(len(updates) == DEVICES for updates in folded)
    assert {update.codec for updates in folded for update in updates} == {"ring32"}
    assert json.loads(text)["facts"]["epsilon"].endswith("2 rounds charged")
    # What moved is noise: of all eight, made for six, a mean of eight, twice; and what the patch still owes.
    moved = simulation.runner.head.params.astype(float) - watch_bundle.checkpoint().params
    expected = 0.5 * math.sqrt(8 / 6) / 8 * math.sqrt(2)
    assert moved.std() == pytest.approx(expected, rel=0.1)
    simulation.close()
