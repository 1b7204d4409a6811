"""Rounds with a helper and real agents: the head is that of the pairwise masks bit for bit, and of no masks nearly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec import structs

from cloud_server.db.rounds import load_rounds, load_updates
from edge_agent.rounds.masked_rounds import Draft
from fleet.scenario import FaultScenario, RunScenario, Scenario, SecureScenario
from fleet.simulate import RUN, job_cost, plan_cuts, report_of, run_config, train_settings
from fleet.simulation import Simulation
from fleet.virtual_people import virtual_federation
from models.bundle import Bundle
from wire.codec import decode
from wire.messages import CodecName, Update, decode_body
from wire.ring import choose_ring, decode_mean, ring_of

DEVICES = 5
RUN_OF_MEANS = RunScenario(strategy="FedAvg", evaluate_every=0, deadline_seconds=60.0)
HELPED = SecureScenario(policy="two_server")
STORM = FaultScenario(cuts_per_hour=240.0, cut_seconds=8.0, slow_share=0.25, slow_factor=3.0)


def simulation_of(
    bundle: Bundle,
    secure: SecureScenario,
    *,
    rounds: int,
    faults: FaultScenario | None = None,
    codec: CodecName = "dithered",
) -> Simulation:
    train = structs.replace(train_settings(Scenario(run=RUN_OF_MEANS)), codec=codec)
    scenario = Scenario(run=RUN_OF_MEANS, secure=secure, train=train, faults=faults or FaultScenario())
    federation = virtual_federation(DEVICES, scenario.data, seed=5)
    simulation = Simulation(
        federation,
        bundle,
        run_config(scenario, devices=DEVICES, rounds=rounds),
        seed=5,
        cost=job_cost(scenario.faults, 5),
        helper_devices=secure.min_devices,
    )
    plan_cuts(simulation, scenario.faults, 5)
    return simulation


def test_sum_that_the_helper_unmasks_is_the_sum_of_the_encodings(watch_bundle: Bundle) -> None:
    simulation = simulation_of(watch_bundle, HELPED, rounds=1)
    drafts: list[Draft] = []
    for agent in simulation.agents.values():
        hold = agent.parts.masked.hold

        def keep(draft: Draft, hold: object = hold) -> None:
            drafts.append(draft)
            hold(draft)  # type: ignore[operator]

        agent.parts.masked.hold = keep  # type: ignore[method-assign]
    simulation.run()
    assert len(drafts) == DEVICES
    terms = drafts[0].order.helped
    assert terms is not None
    ring = ring_of(terms)
    total = sum((draft.values for draft in drafts), np.zeros(len(drafts[0].values), ring.dtype))
    mean = decode_mean(total, ring, DEVICES)
    assert np.abs(moved_by(simulation, watch_bundle) - mean).max() < 1e-5
    assert simulation.helper is not None
    assert simulation.helper.store.summary()[0] == 1
    simulation.close()


def moved_by(simulation: Simulation, bundle: Bundle) -> np.ndarray:
    """What the rule wanted of the head, float32 [P]: the step that travelled, and what its code still owes."""
    residual = simulation.runner._desk._step.residual
    assert residual is not None
    return np.asarray(simulation.runner.head.params - bundle.checkpoint().params + residual)


@pytest.mark.slow
def test_mean_under_masks_is_the_mean_without_within_the_rings_step(watch_bundle: Bundle) -> None:
    helped = simulation_of(watch_bundle, HELPED, rounds=1)
    helped.run()
    plain = simulation_of(watch_bundle, SecureScenario(), rounds=1, codec="fp32")
    sent: list[Update] = []
    for agent in plain.agents.values():
        put = agent.parts.outbox.put

        def note(*row: Any, put: Any = put) -> Any:
            sent.append(decode_body(row[5], Update))
            return put(*row)

        agent.parts.outbox.put = note  # type: ignore[method-assign]
    plain.run()
    vectors = [np.frombuffer(codec_payload(update), "<f4") for update in sent]
    assert len(vectors) == DEVICES
    ring = choose_ring(DEVICES, len(vectors[0]), train_settings(Scenario(run=RUN_OF_MEANS)).clipping_norm)
    difference = np.abs(moved_by(helped, watch_bundle) - np.mean(vectors, axis=0))
    assert 0.0 < difference.max() <= ring.step + 1e-6
    helped.close()
    plain.close()


def codec_payload(update: Update) -> bytes:
    """The values of an update that was sent as float32, without the code's header (clause 8.1)."""
    assert update.codec == "fp32"
    return decode(update.payload, "fp32", update.params_size).tobytes()


@pytest.mark.slow
def test_masks_of_a_helper_and_of_neighbours_come_off_alike(watch_bundle: Bundle) -> None:
    """The same updates, the same ring, the same noise of rounding: either way the head has the same bytes."""
    heads = []
    for secure in (HELPED, SecureScenario(policy="pairwise", dropout=0.2)):
        simulation = simulation_of(watch_bundle, secure, rounds=1)
        simulation.run()
        heads.append(simulation.runner.head.sha256)
        simulation.close()
    assert heads[0] == heads[1]


@pytest.mark.slow
def test_helped_simulation_goes_through_lost_connections_and_repeats_itself(watch_bundle: Bundle) -> None:
    outcomes = []
    for _ in range(2):
        simulation = simulation_of(watch_bundle, HELPED, rounds=2, faults=STORM)
        simulation.run()
        scenario = Scenario(run=RUN_OF_MEANS, secure=HELPED, faults=STORM)
        report = report_of(scenario, simulation, 5).to_json()
        with simulation.base.database.read() as connection:
            folded = [
                update
                for row in load_rounds(connection, RUN)
                for update in load_updates(connection, RUN, row.number, "train", "folded")
            ]
        assert folded
        assert all(update.num_examples == 1 and not update.metrics for update in folded)
        assert all(agent.parts.outbox.depth() == 0 for agent in simulation.agents.values())
        outcomes.append((simulation.runner.head.sha256, report))
        simulation.close()
    assert outcomes[0] == outcomes[1]


def test_helper_that_does_not_know_the_devices_lets_no_round_through(watch_bundle: Bundle) -> None:
    """The aggregator approves five; four of them are nobody to the helper."""
    simulation = simulation_of(watch_bundle, HELPED, rounds=1)
    assert simulation.helper is not None
    store = simulation.helper.store
    known = sorted(simulation.agents)
    for device in known[1:]:
        assert store.remove(device)
    aggregator = simulation.cloud.aggregator
    aggregator.start(aggregator.handle)
    for agent in simulation.agents.values():
        agent.start()
        simulation._note_wake(agent)
    aggregator.begin(simulation.runner)
    while simulation.runner.view().failures == 0:
        simulation._settle()
        simulation.time.advance_to(simulation._next_moment())
    assert store.summary()[0] == 0
    assert simulation.runner.view().moved == 0
    with simulation.base.database.read() as connection:
        reason = load_rounds(connection, RUN)[0].reason
    assert reason == "the helper told no masks of 5 devices (unusable); it can sum those of 1"
    simulation.close()
