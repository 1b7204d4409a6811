"""What each model of the zoo reaches, trained by federation and served as its int8 file; keeps it for the model cards.

One run of the simulation for each: real agents and aggregator, virtual time, the zoo's own settings of training.
`models/zoo/federated.json` is written from it, and every card from that. Takes some minutes, so only by name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.table import Row
from fleet.report import FleetReport
from fleet.scenario import load_scenario, with_model
from fleet.simulate import simulate
from models import zoo
from models.federated import FederatedResult, answers_of, keep

SCENARIO = Path("docs/examples/card.toml")
SEED = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """How many devices and rounds."""

    devices: int
    rounds: int


# The smartwatch has 16 real wrists; the images are divided among as many or a few more.
PLANS = {
    "watch_cnn1d": Plan(16, 20),
    "tiny_transformer": Plan(16, 20),
    "watch_autoencoder": Plan(16, 20),
    "fashion_cnn": Plan(20, 20),
    "fashion_mobile": Plan(20, 15),
    "digits_mlp": Plan(16, 20),
}


def measure() -> list[Row]:
    """All models; a model's result is kept as soon as there is one."""
    rows = []
    for model, plan in PLANS.items():
        result = federate(model, plan)
        keep({model: result})
        rows += rows_of(model, result)
        print(f"{model}: {result.int8_first} -> {result.int8_last}", file=sys.stderr)
    return rows


def federate(model: str, plan: Plan) -> FederatedResult:
    """Trains a model by federation and measures its first bundle and its last release."""
    scenario = with_model(load_scenario(SCENARIO), model)
    report = simulate(scenario, devices=plan.devices, rounds=plan.rounds, seed=SEED)
    return result_of(model, plan, report)


def result_of(model: str, plan: Plan, report: FleetReport) -> FederatedResult:
    """What the card keeps of a report."""
    first, last = report.releases[0], report.releases[-1]
    entry = zoo.load(model)
    torch.manual_seed(SEED)
    return FederatedResult(
        command=f"shoal-fleet simulate --model {model} --devices {plan.devices} --rounds {plan.rounds} "
        f"--seed {SEED} --scenario {SCENARIO.as_posix()}",
        data=report.facts["data"],
        split_hash=report.split_hash,
        seed=report.seed,
        devices=len(report.devices),
        rounds=len(report.rounds),
        releases=len(report.releases),
        hold_backs=len(report.hold_backs),
        strategy=report.facts["strategy"],
        codec=report.facts["codec"],
        samples=sum(row.test_windows for row in report.devices),
        metric=report.metric,
        int8_first=round(first.int8, 4),
        int8_last=round(last.int8, 4),
        float32_first=round(first.float32, 4),
        float32_last=round(last.float32, 4),
        update_bytes_ratio=round(report.update_bytes_ratio, 4),
        separation_first={name: round(auc, 3) for name, auc in first.separation.items()},
        separation_last={name: round(auc, 3) for name, auc in last.separation.items()},
        answers=answers_of(entry.make_model(), entry.input_shape),
    )


def rows_of(model: str, result: FederatedResult) -> list[Row]:
    """The result for the table of benchmarks."""
    note = f"{result.devices} devices, {result.rounds} rounds, {result.releases} releases, {result.samples} samples"
    return [
        Row(f"{model}: int8 {result.metric}, first bundle", result.int8_first, unit=""),
        Row(f"{model}: int8 {result.metric}, last release", result.int8_last, unit="", note=note),
        Row(f"{model}: float32 {result.metric}, last release", result.float32_last, unit=""),
        *(Row(f"{model}: AUC, {kind}", auc, unit="") for kind, auc in result.separation_last.items()),
        Row(f"{model}: update bytes / float32", result.update_bytes_ratio, note="sealed"),
    ]
