"""What attackers cost: accuracy under each attack against the plain mean without attackers, over seeds.

Played by the simulation: attackers are real agents whose updates are falsified before they are sealed. Judged is the
*head* of the last round, through its int8 file, on all devices' later windows, not the last release: the gate would
hide what a rule let through. Every run is kept in `build/bench/robustness.json` as soon as it is over, so that the
benchmark goes on where it was ended; delete the file to begin anew. Laws of the file: the same settings for every
rule; nothing is tuned on the reported windows.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.table import Row
from edge_agent.settings import EdgeSettings, ReportSettings
from fleet.attacks import ATTACKS, TARGET, chosen_attackers, with_trigger
from fleet.demo import DATASETS
from fleet.scenario import AttackScenario, DataScenario, RunScenario, Scenario
from fleet.simulate import conspiracy_of, run_config, trusted_samples
from fleet.simulation import Simulation
from fleet.workloads import workload
from models.bundle import Bundle
from models.candidate import CandidateMaker
from models.data.federation import Federation, Floats
from models.evaluate import answers_of, evaluate
from models.first_bundle import make_first_bundle

RESULTS = Path("build/bench/robustness.json")
SEEDS = (1, 2, 3, 4, 5)
DEFAULT = RunScenario().strategy
PLAIN = "FedAvg"
MODELS = {"smartwatch": "watch_cnn1d", "fashion-mnist": "fashion_cnn"}
ROUNDS = 20
"""After 10 both fleets still learn fast, so that any slow-down counts as loss, and what spoils a head that has nearly
arrived is not seen."""
IMAGES = 6_000


@dataclass(frozen=True, slots=True)
class Case:
    """One run. `attack` is `none`, one of `ATTACKS`, or `absent`: the attackers of that share and seed stay away."""

    data: str
    strategy: str
    attack: str
    attackers: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.data}/{self.strategy}/{self.attack}/{self.attackers:g}/{self.seed}"


def measure() -> list[Row]:
    """Plays what is not known yet, and says what is.

    `SHOAL_BENCH_RUNS` ends it after so many runs (0 plays none), `SHOAL_BENCH_DATA` names the one data set to play;
    `SHOAL_BENCH_PART=1/2` plays every second run, so that two of them share the work and the file.
    """
    left = int(os.environ.get("SHOAL_BENCH_RUNS", "1000000"))
    part, parts = map(int, os.environ.get("SHOAL_BENCH_PART", "1/1").split("/"))
    for number, case in enumerate(cases()):
        if os.environ.get("SHOAL_BENCH_DATA", case.data) != case.data or number % parts != part - 1:
            continue
        if left == 0:
            break
        if case.key in _load():
            continue
        left -= 1
        played = play(case)
        _save({**_load(), case.key: played})
        print(f"{case.key}: {played}", file=sys.stderr)
    return rows(_load())


def cases() -> Iterator[Case]:
    """All runs, seed by seed, so that an early end leaves whole seeds."""
    for seed in SEEDS:
        for data in MODELS:
            yield Case(data, PLAIN, "none", 0.0, seed)
            yield Case(data, DEFAULT, "none", 0.0, seed)
            for attack in ATTACKS:
                yield Case(data, DEFAULT, attack, 0.2, seed)
            for attack in ATTACKS:
                yield Case(data, "FLTrust", attack, 0.4, seed)
    for seed in SEEDS:
        for data in MODELS:
            yield Case(data, PLAIN, "absent", 0.4, seed)
            yield Case(data, PLAIN, "absent", 0.2, seed)


def play(case: Case) -> dict[str, float]:
    """One run: `accuracy` of the last head, and a backdoor's `success` on it."""
    federation, model = _federation(case), MODELS[case.data]
    # No evaluation and so no release: heads do not depend on them, and the head is what is judged.
    run = RunScenario(model=model, strategy=case.strategy, evaluate_every=0)
    kind = "none" if case.attack == "absent" else case.attack
    attack = AttackScenario(kind=kind, attackers=case.attackers)  # type: ignore[arg-type]
    scenario = Scenario(run=run, attack=attack)
    taking_part = _without_absent(federation, case)
    config = run_config(scenario, devices=len(taking_part.devices), rounds=ROUNDS)
    settings = EdgeSettings(report=ReportSettings(telemetry_seconds=3600.0, inference_seconds=3600.0))
    bundle = _first_bundle(case, federation)
    task = bundle.manifest.task
    simulation = Simulation(
        taking_part,
        bundle,
        config,
        seed=case.seed,
        settings=settings,
        conspiracy=conspiracy_of(scenario, federation, task, case.seed),
        trusted=trusted_samples(federation, scenario) if case.strategy == "FLTrust" else None,
    )
    simulation.run()
    head = CandidateMaker(bundle).fill(simulation.runner.head).int8
    simulation.close()
    x, y = _later_windows(federation)
    result = {"accuracy": round(evaluate(head, task, x, y).metric, 4)}
    triggered = answers_of(head, with_trigger(x[y != TARGET])).argmax(1)
    return {**result, "success": round(float(np.mean(triggered == TARGET)), 4)}


def rows(known: dict[str, dict[str, float]]) -> list[Row]:
    """One row an attack and data set: points lost against the plain mean of the same seeds."""
    found: list[Row] = []
    for data in MODELS:
        found += _loss(known, data, PLAIN, "absent", 0.2, "")
        found += _loss(known, data, PLAIN, "absent", 0.4, "")
        found += _loss(known, data, DEFAULT, "none", 0.0, "")
        for attack in ATTACKS:
            found += _loss(known, data, DEFAULT, attack, 0.2, "<= 4")
        for attack in ATTACKS:
            found += _loss(known, data, "FLTrust", attack, 0.4, "<= 6")
    return found


def _loss(
    known: dict[str, dict[str, float]], data: str, strategy: str, attack: str, share: float, goal: str
) -> list[Row]:
    pairs = [
        (
            known[Case(data, PLAIN, "none", 0.0, seed).key],
            known[Case(data, strategy, attack, share, seed).key],
        )
        for seed in SEEDS
        if {Case(data, PLAIN, "none", 0.0, seed).key, Case(data, strategy, attack, share, seed).key}
        <= set(known)
    ]
    if not pairs:
        return []
    losses = [100 * (plain["accuracy"] - attacked["accuracy"]) for plain, attacked in pairs]
    name = f"{data}: {strategy}, {attack} at {share:.0%}"
    note = f"{len(pairs)} of {len(SEEDS)} seeds, {min(losses):.1f} to {max(losses):.1f}"
    made = [Row(f"{name}: points lost", statistics.mean(losses), goal, "", note)]
    if attack == "backdoor":
        success = [100 * attacked["success"] for _, attacked in pairs]
        without = statistics.mean(100 * plain["success"] for plain, _ in pairs)
        note = f"per cent, {min(success):.0f} to {max(success):.0f}; without attackers {without:.0f}"
        made.append(
            Row(f"{name}: success", statistics.mean(success), "<= 10" if share < 0.3 else "", "", note)
        )
    return made


def _federation(case: Case) -> Federation:
    if case.data == "smartwatch":
        return DATASETS[case.data].load(case.seed)
    return workload(MODELS[case.data]).federation(20, DataScenario(samples=IMAGES), case.seed)


def _without_absent(federation: Federation, case: Case) -> Federation:
    """The fleet without attackers: what a rule that hears none of them can reach. Their later windows count as ever."""
    if case.attack != "absent":
        return federation
    away = chosen_attackers(federation.devices, case.attackers, case.seed)
    return replace(federation, devices={n: d for n, d in federation.devices.items() if n not in away})


def _first_bundle(case: Case, federation: Federation) -> Bundle:
    """Of a data set and seed, kept for the runs that follow: training it takes as long as a run."""
    folder = RESULTS.parent / "robustness" / f"{case.data}-{case.seed}"
    if not folder.exists():
        made = folder.with_name(f"{folder.name}.{os.getpid()}")
        make_first_bundle(federation, MODELS[case.data], made, seed=case.seed)
        try:
            made.rename(folder)
        except OSError:  # the other part of the benchmark was faster, and made the same
            shutil.rmtree(made)
    return Bundle.open(folder)


def _later_windows(federation: Federation) -> tuple[Floats, np.ndarray]:
    splits = federation.devices.values()
    return np.concatenate([each.test_x for each in splits]), np.concatenate([each.test_y for each in splits])


def _load() -> dict[str, dict[str, float]]:
    if not RESULTS.exists():
        return {}
    plain: dict[str, dict[str, float]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return plain


def _save(known: dict[str, dict[str, float]]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    written = RESULTS.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    written.replace(RESULTS)
