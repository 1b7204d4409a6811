"""Attacks in the simulator: what is sent and trained on, who attacks, and a fleet that has such devices in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from fleet.attackers import Conspiracy
from fleet.attacks import (
    ATTACKS,
    BOOST,
    IPM_EXCESS,
    POISONS,
    TARGET,
    TRIGGER_LEVEL,
    Known,
    chosen_attackers,
    falsified,
    poisoned,
    with_trigger,
)
from fleet.cli import ATTACKS as NAMED
from fleet.cli import main
from fleet.scenario import (
    AttackScenario,
    DataScenario,
    RunScenario,
    Scenario,
    SecureScenario,
    load_scenario,
    with_attack,
)
from fleet.simulate import conspiracy_of, run_config, simulate
from fleet.simulation import Simulation
from fleet.workloads import workload
from models.bundle import Bundle
from models.data.federation import Floats
from models.first_bundle import make_first_bundle
from wire.errors import ConfigurationError, RoundError
from wire.manifest import TaskSpec

TASK = TaskSpec(
    kind="classification", loss="cross_entropy", metric="accuracy", higher_is_better=True, classes=5
)
UPDATES = np.random.default_rng(1).normal(0.1, 1.0, (4, 200)).astype(np.float32)
DEVICES = 10


def send(attack: str, seed: int = 1) -> np.ndarray:
    known = Known(own=UPDATES[0], trained=UPDATES, attackers=4, devices=20)
    return falsified(attack, known, np.random.default_rng(seed))


def test_command_knows_every_attack() -> None:
    assert NAMED == ATTACKS


@pytest.mark.parametrize("attack", ATTACKS)
def test_falsified_update_is_finite_and_of_the_same_size(attack: str) -> None:
    sent = send(attack)
    assert (sent.dtype, sent.shape) == (np.float32, (200,))
    assert np.isfinite(sent).all()
    assert np.array_equal(sent, UPDATES[0]) == (attack in POISONS)


def test_sign_flip_and_boost_point_the_other_way() -> None:
    np.testing.assert_array_equal(send("sign_flip"), -UPDATES[0])
    np.testing.assert_allclose(send("boost"), -BOOST * UPDATES[0], rtol=1e-6)


def test_noise_is_ten_times_as_long_and_follows_from_the_seed() -> None:
    assert np.linalg.norm(send("noise")) == pytest.approx(10 * np.linalg.norm(UPDATES[0]), rel=1e-5)
    np.testing.assert_array_equal(send("noise"), send("noise"))
    assert not np.array_equal(send("noise"), send("noise", seed=2))


def test_alie_stays_within_what_attackers_would_send_and_leans_to_one_side() -> None:
    expected = UPDATES.mean(0) - 1.5 * UPDATES.std(0)
    np.testing.assert_allclose(send("alie"), expected, rtol=1e-4, atol=1e-5)


def test_ipm_turns_a_plain_mean_around() -> None:
    honest, false = UPDATES.mean(0), send("ipm")
    mean = (16 * honest + 4 * false) / 20
    np.testing.assert_allclose(mean, (1 - IPM_EXCESS) * 16 / 20 * honest, rtol=1e-3, atol=1e-5)


def test_label_flip_mirrors_the_labels() -> None:
    x, y = np.zeros((5, 3), np.float32), np.arange(5)
    _, flipped = poisoned("label_flip", x, y, 5, np.random.default_rng(1))
    assert flipped.tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(("shape", "marked"), [((3, 1, 28, 28), 9), ((3, 6, 100), 72), ((3, 64), 8)])
def test_trigger_marks_a_corner_or_an_end(shape: tuple[int, ...], marked: int) -> None:
    x = np.zeros(shape, np.float32)
    assert (with_trigger(x)[0] == TRIGGER_LEVEL).sum() == marked
    assert not x.any()


def test_backdoor_puts_its_trigger_into_half_of_the_windows() -> None:
    x, y = np.zeros((10, 64), np.float32), np.full(10, 3)
    marked, labels = poisoned("backdoor", x, y, 5, np.random.default_rng(1))
    has_trigger = marked.any(1)
    assert has_trigger.sum() == 5
    assert (labels == np.where(has_trigger, TARGET, 3)).all()
    assert not x.any()
    assert (y == 3).all()


def test_attackers_are_the_share_that_was_asked_for_and_follow_from_the_seed() -> None:
    names = [f"device-{number}" for number in range(16)]
    first = chosen_attackers(names, 0.2, 1)
    assert len(first) == 3
    assert first == chosen_attackers(reversed(names), 0.2, 1)
    assert any(first != chosen_attackers(names, 0.2, seed) for seed in range(2, 8))


@pytest.mark.parametrize(
    ("attack", "share", "kind", "said"),
    [
        ("sign_flop", 0.2, "classification", "sign_flop"),
        ("sign_flip", 0.05, "classification", "no attacker"),
        ("label_flip", 0.5, "anomaly", "learns without"),
        ("backdoor", 0.5, "anomaly", "learns without"),
    ],
)
def test_attack_that_cannot_be_is_a_configuration_error(
    attack: str, share: float, kind: str, said: str
) -> None:
    task = TaskSpec(kind=kind, loss="mse", metric="mse", higher_is_better=False, classes=5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=said):
        Conspiracy(attack, share, ["a", "b", "c", "d"], task, seed=1)


def test_attack_on_updates_under_masks_is_a_configuration_error() -> None:
    federation = workload("digits_mlp").federation(5, DataScenario(alpha=100.0), 1)
    run = RunScenario(model="digits_mlp", strategy="FedAvg")
    secure = SecureScenario(policy="pairwise")
    falsifying = Scenario(run=run, secure=secure, attack=AttackScenario(kind="noise"))
    with pytest.raises(ConfigurationError, match="under masks"):
        conspiracy_of(falsifying, federation, TASK, 1)
    poisoning = Scenario(run=run, secure=secure, attack=AttackScenario(kind="label_flip"))
    assert conspiracy_of(poisoning, federation, TASK, 1) is not None


def test_honest_devices_keep_their_worker_and_their_data() -> None:
    names = [f"device-{number}" for number in range(10)]
    flipping, noisy = (Conspiracy(attack, 0.2, names, TASK, seed=1) for attack in ("label_flip", "noise"))
    x, y, worker = np.zeros((5, 3), np.float32), np.arange(5), object()
    for name in names:
        is_honest = name not in flipping.attackers
        assert (noisy.behind(name, worker) is worker) == is_honest  # type: ignore[arg-type]
        assert noisy.training_data(name, x, y)[1] is y
        assert flipping.behind(name, worker) is worker  # type: ignore[arg-type]
        assert (flipping.training_data(name, x, y)[1] is y) == is_honest


def test_scenario_file_names_an_attack_and_the_command_line_is_over_it(tmp_path: Path) -> None:
    (tmp_path / "attack.toml").write_text('[attack]\nkind = "alie"\nattackers = 0.4\n')
    scenario = load_scenario(tmp_path / "attack.toml")
    assert scenario.attack == AttackScenario(kind="alie", attackers=0.4)
    assert with_attack(scenario, "ipm", None).attack == AttackScenario(kind="ipm", attackers=0.4)
    assert with_attack(scenario, None, 0.1).attack == AttackScenario(kind="alie", attackers=0.1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--attack", "sign_flop"], "sign_flop"),
        (["--attackers", "0.2"], "no attack"),
        (["--attack", "noise", "--attackers", "2"], "0.9"),
        (["--attack", "noise", "--attackers", "nan"], "0.9"),
        (["--attack", "noise", "--devices", "2"], "no attacker"),
        (["--attack", "backdoor", "--model", "watch_autoencoder", "--devices", "5"], "learns without"),
    ],
)
def test_attack_that_cannot_be_ends_the_command_with_one_error(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err


# ---- a fleet with attackers in it --------------------------------------------------------------------------

DATA = DataScenario(alpha=100.0)
# So wide that no honest update is cut by it: what is measured is the rule.
TRAIN = structs.replace(workload("digits_mlp").train, clipping_norm=1000.0)


@pytest.fixture(scope="module")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    federation = workload("digits_mlp").federation(DEVICES, DATA, 5)
    return make_first_bundle(federation, "digits_mlp", tmp_path_factory.mktemp("digits") / "bundle", seed=5)


def play(
    bundle: Bundle, attack: str, strategy: str, *, rounds: int = 2, max_holdout_drop: float = 1e9
) -> Floats:
    """The parameters of the last head; no head is rejected unless the bound is given."""
    scenario = Scenario(
        data=DATA,
        run=RunScenario(model="digits_mlp", strategy=strategy, evaluate_every=0),
        train=TRAIN,
        attack=AttackScenario(kind=attack, attackers=0.3),  # type: ignore[arg-type]
    )
    federation = workload("digits_mlp").federation(DEVICES, DATA, 5)
    config = run_config(scenario, devices=DEVICES, rounds=rounds)
    simulation = Simulation(
        federation,
        bundle,
        replace(config, max_holdout_drop=max_holdout_drop),
        seed=5,
        conspiracy=conspiracy_of(scenario, federation, bundle.manifest.task, 5),
    )
    try:
        simulation.run()
    finally:
        simulation.close()
    return simulation.runner.head.params


def test_boost_costs_the_clipped_mean_less_than_the_plain_one(digits_bundle: Bundle) -> None:
    """Progress towards the head of the same fleet without attackers, in lengths of it."""
    start = digits_bundle.checkpoint().params
    whole = play(digits_bundle, "none", "FedAvg", rounds=1) - start

    def progress(strategy: str) -> float:
        change = play(digits_bundle, "boost", strategy, rounds=1) - start
        return float(change @ whole / np.square(whole).sum())

    assert progress("FedAvg") < 0.0
    assert progress("ClippedMean") > 0.2


@pytest.mark.slow
def test_head_that_an_attack_broke_is_rejected_until_the_simulation_gives_up(digits_bundle: Bundle) -> None:
    with pytest.raises(RoundError, match="rounds in a row have failed"):
        play(digits_bundle, "boost", "FedAvg", max_holdout_drop=0.25)


@pytest.mark.parametrize("attack", ["alie", "backdoor"])
def test_attacked_fleet_with_the_same_seed_gives_the_same_head(digits_bundle: Bundle, attack: str) -> None:
    first, second, honest = (play(digits_bundle, name, "ClippedMean") for name in (attack, attack, "none"))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, honest)


def test_report_of_a_backdoor_says_how_often_it_worked() -> None:
    scenario = Scenario(
        run=RunScenario(model="digits_mlp", strategy="FLTrust", evaluate_every=1),
        attack=AttackScenario(kind="backdoor", attackers=0.4),
    )
    summary = json.loads(simulate(scenario, devices=5, rounds=2, seed=3).to_json())
    assert 0.0 <= summary["attack_success"] <= 1.0
    assert summary["facts"]["attack"] == "backdoor by 2 of 5"
    assert summary["facts"]["strategy"] == "FLTrust"
