"""`shoal-fleet simulate`: a scenario played on virtual time, and its report.

Laws of the file: no time of the machine is in the report; the same scenario, numbers and seed give the same bytes.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from cloud_server.assembly import RunConfig
from cloud_server.db.privacy import load_charges
from cloud_server.privacy.budget import PrivateRun
from cloud_server.privacy.keys import LedgerKeys
from cloud_server.refine.reference import reference_config
from cloud_server.refine.refinement import Refinery
from cloud_server.release.gate import GatePolicy
from cloud_server.rounds.state import RoundPolicy
from cloud_server.secure.opening import masking_rules
from cloud_server.settings import TrainSettings
from edge_agent.ports import JobResult
from edge_agent.settings import EdgeSettings, HealthSettings, ReleaseSettings, ReportSettings
from fleet.attackers import Conspiracy
from fleet.attacks import POISONS, TARGET, with_trigger
from fleet.books import Judge, device_row, read_books, release_rows, round_rows
from fleet.report import FleetReport
from fleet.scenario import FaultScenario, Scenario
from fleet.simulation import Simulation
from fleet.workloads import workload
from models.data.federation import Federation
from models.first_bundle import make_first_bundle
from models.zoo import load
from process.progress import Progress
from wire.errors import ConfigurationError
from wire.manifest import TaskSpec
from wire.primitives import SigningKey

RUN = "simulated"


def simulate(scenario: Scenario, *, devices: int, rounds: int, seed: int) -> FleetReport:
    """Plays a scenario.

    Raises:
        ConfigurationError: (operator) a model, strategy or parameter that does not exist, or data that cannot be
            divided so.
        DataError: (operator) the model's data set is not on this machine.
        RoundError: the fleet stands still before the run is finished.
    """
    federation = workload(scenario.run.model).federation(devices, scenario.data, seed)
    task = load(scenario.run.model).task.spec()
    conspiracy = conspiracy_of(scenario, federation, task, seed)
    with tempfile.TemporaryDirectory(prefix="shoal-simulate-") as folder:
        bundle = make_first_bundle(federation, scenario.run.model, Path(folder) / "bundle", seed=seed)
        simulation = Simulation(
            federation,
            bundle,
            run_config(scenario, devices=devices, rounds=rounds, seed=seed),
            seed=seed,
            settings=_agent_settings(),
            cost=job_cost(scenario.faults, seed),
            helper_devices=scenario.secure.min_devices,
            conspiracy=conspiracy,
            trusted=trusted_samples(federation, scenario) if scenario.run.strategy == "FLTrust" else None,
        )
        try:
            plan_cuts(simulation, scenario.faults, seed)
            with Progress("rounds", rounds) as progress:
                simulation.run(lambda moved: progress.advance(moved - progress.done))
            return report_of(scenario, simulation, seed, conspiracy)
        finally:
            simulation.close()


def run_config(scenario: Scenario, *, devices: int, rounds: int, seed: int = 0) -> RunConfig:
    """The run of a scenario for a fleet of so many devices.

    Args:
        seed: of the noise and the cohorts of a private run, which a simulation must be able to repeat.
    """
    run = scenario.run
    quorum, goal = max(1, int(devices * run.quorum_share)), int(devices * run.goal_share)
    return RunConfig(
        run=RUN,
        strategy=run.strategy,
        strategy_parameters=run.parameters,
        policy=RoundPolicy(
            quorum=min(quorum, goal) if goal else quorum,
            goal=goal,
            mode=run.mode,
            max_staleness=run.max_staleness,
            staleness_exponent=run.staleness_exponent,
            rounds=rounds,
            round_seconds=run.deadline_seconds,
            evaluate_every=run.evaluate_every,
        ),
        train=train_settings(scenario).config(),
        gate=GatePolicy(max_operator_drop=run.max_operator_drop),
        masking=masking_rules(scenario.secure.policy, scenario.secure.dropout, 0.0),
        privacy=private_run(scenario, seed),
    )


def conspiracy_of(scenario: Scenario, federation: Federation, task: TaskSpec, seed: int) -> Conspiracy | None:
    """The scenario's attackers; None where it has none.

    Raises:
        ConfigurationError: (operator) the attack does not go with the fleet or its model.
    """
    attack = scenario.attack
    if attack.kind == "none" or attack.attackers == 0.0:
        return None
    if scenario.secure.policy != "plain" and attack.kind not in POISONS:
        raise ConfigurationError(
            f"{attack.kind} falsifies what is sent, which no attacker of ours can do under masks",
            hint="attack the data (label_flip, backdoor), or leave secure.policy plain",
        )
    return Conspiracy(attack.kind, attack.attackers, federation.devices, task, seed=seed)


def trusted_samples(federation: Federation, scenario: Scenario) -> Refinery:
    """The operator's own training windows, for FLTrust."""
    chosen, own = load(scenario.run.model), federation.operator
    config = reference_config(train_settings(scenario).config())
    return Refinery(chosen.make_model, chosen.task, own.train_x, own.train_y, config=config)


def attack_success(judge: Judge, version: int, federation: Federation) -> float:
    """Share of the devices' later windows, of other labels, that a release answers with a backdoor's target once the
    trigger is in them."""
    splits = federation.devices.values()
    x, y = np.concatenate([each.test_x for each in splits]), np.concatenate([each.test_y for each in splits])
    return judge.share_answered(version, with_trigger(x[y != TARGET]), TARGET)


def private_run(scenario: Scenario, seed: int) -> PrivateRun | None:
    """The scenario's differential privacy, of which the seed knows every secret; None where it has none."""
    plan = scenario.privacy.plan()
    if plan is None:
        return None

    def draw(what: str) -> bytes:
        return hashlib.sha256(f"simulated privacy {seed} {what}".encode()).digest()

    keys = LedgerKeys((SigningKey.from_bytes(draw("key")),))
    return PrivateRun(plan, lambda: keys, lambda number: draw(f"round {number}"))


def privacy_facts(simulation: Simulation) -> dict[str, str]:
    """What a private run has spent, for the report."""
    with simulation.base.database.read() as connection:
        charges = load_charges(connection)
    if not charges:
        return {}
    last = charges[-1]
    return {"epsilon": f"{last.epsilon:.3f} at delta {last.delta:g}, {len(charges)} rounds charged"}


def train_settings(scenario: Scenario) -> TrainSettings:
    """What the scenario asks of devices, or what suits its model."""
    return scenario.train or workload(scenario.run.model).train


def job_cost(faults: FaultScenario, seed: int) -> Callable[[str, JobResult], float]:
    """Virtual seconds of a job: some devices are slow, and every job differs a little, by the seed."""

    def cost(device: str, result: JobResult) -> float:
        is_slow = random.Random(f"{seed} slow {device}").random() < faults.slow_share
        jitter = random.Random(f"{seed} job {device} {result.kind} {result.key.hex()}").uniform(0.8, 1.2)
        share = 1.0 if result.kind == "train" else 0.25
        return faults.job_seconds * share * jitter * (faults.slow_factor if is_slow else 1.0)

    return cost


def plan_cuts(simulation: Simulation, faults: FaultScenario, seed: int) -> None:
    """Plans lost connections: for each device a Poisson process, drawn as it goes."""
    if faults.cuts_per_hour <= 0:
        return
    mean_seconds = 3600.0 / faults.cuts_per_hour
    for device in simulation.agents:
        _plan_next_cut(
            simulation, device, random.Random(f"{seed} cuts {device}"), mean_seconds, faults.cut_seconds
        )


def _plan_next_cut(
    simulation: Simulation, device: str, rng: random.Random, mean_seconds: float, cut_seconds: float
) -> None:
    def cut() -> None:
        simulation.broker.cut(device, for_seconds=rng.uniform(0.5, 1.5) * cut_seconds)
        _plan_next_cut(simulation, device, rng, mean_seconds, cut_seconds)

    simulation.time.later(rng.expovariate(1.0 / mean_seconds), cut)


def _agent_settings() -> EdgeSettings:
    """Heartbeats of a simulated fleet are rarer: they cost real time and say nothing new."""
    return EdgeSettings(
        release=ReleaseSettings(probation_seconds=30.0),
        # A simulated device has no machine around it that could be ill.
        health=HealthSettings(remedies="off", check_seconds=3600.0),
        report=ReportSettings(telemetry_seconds=3600.0, inference_seconds=3600.0),
    )


def report_of(
    scenario: Scenario, simulation: Simulation, seed: int, conspiracy: Conspiracy | None = None
) -> FleetReport:
    """The report of a simulation that has run."""
    federation, bundle = simulation.federation, simulation.bundle
    with simulation.base.database.read() as connection:
        books = read_books(connection, RUN)
    judge = Judge(bundle, simulation.base.publisher.checkpoint)
    rows = []
    for device, split in federation.devices.items():
        parts = simulation.agents[device].parts
        traffic = (parts.outgoing.sent_bytes_total, parts.received_bytes_total)
        counts = (parts.serving.total.requests, parts.serving.total.errors)
        rows.append(device_row(device, split, books, judge, traffic=traffic, counts=counts))
    task = judge.task
    attacked: dict[str, str] = {}
    success = None
    if conspiracy is not None:
        attacked["attack"] = f"{conspiracy.attack} by {len(conspiracy.attackers)} of {conspiracy.devices}"
        if conspiracy.attack == "backdoor":
            success = attack_success(judge, books.released[-1].version, federation)
    return FleetReport(
        title=f"Shoal simulation: {bundle.manifest.model}, {len(rows)} devices, {len(books.rounds)} rounds",
        seed=seed,
        split_hash=federation.split_hash(),
        devices=tuple(rows),
        rounds=tuple(replace(row, seconds=None) for row in round_rows(books, task.metric)),
        releases=release_rows(books, judge, federation),
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        facts={
            "model": bundle.manifest.model,
            "data": federation.name,
            "strategy": scenario.run.strategy,
            "codec": train_settings(scenario).codec if scenario.secure.policy == "plain" else "masked",
            "head": simulation.runner.head.sha256.hex(),
            **attacked,
            **privacy_facts(simulation),
        },
        attack_success=success,
    )
