"""Private rounds on a virtual clock: what is charged, what is drawn, what is told, and that a crash changes nothing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from cloud_server.db import schema
from cloud_server.db.privacy import count_uncharged, load_charges
from cloud_server.privacy.accountant import Mechanism, epsilon_of
from cloud_server.privacy.budget import EXHAUSTED, PrivateRun
from cloud_server.privacy.central import SIGMA, lattice_for
from cloud_server.privacy.keys import LedgerKeys
from cloud_server.privacy.ledger import verify_ledger
from cloud_server.privacy.plan import PrivacyPlan
from cloud_server.privacy.run import check_private, make_private
from cloud_server.privacy.sampling import sample_cohort
from cloud_server.rounds.runner import RoundRunner
from cloud_server.rounds.state import RoundPolicy
from tests.cloud.round_lab import BlownFuseError, Device, Lab, open_transaction
from wire.codec import decode
from wire.discrete_gaussian import WordStream, discrete_gaussian
from wire.errors import ConfigurationError, TrustError
from wire.messages import Order
from wire.primitives import SigningKey

PLAN = PrivacyPlan(clipping_norm=1.0, noise_multiplier=1.0, sampling_rate=0.5, epsilon=50.0)
KEY = SigningKey.from_bytes(bytes(range(32)))


def ledger_keys() -> LedgerKeys:
    return LedgerKeys((KEY,))


def secret_of(number: int) -> bytes:
    return hashlib.sha256(f"round {number}".encode()).digest()


def private_lab(
    devices: int = 12,
    *,
    plan: PrivacyPlan = PLAN,
    draw_secret: Callable[[int], bytes] | None = secret_of,
    **options: Any,
) -> Lab:
    private = (
        PrivateRun(plan, ledger_keys) if draw_secret is None else PrivateRun(plan, ledger_keys, draw_secret)
    )
    return Lab(
        devices,
        make_runner=lambda run_plan, ports: RoundRunner(*make_private(run_plan, ports, private)),
        **options,
    )


def train_orders(lab: Lab, number: int) -> list[tuple[str, Order]]:
    return [(name, order) for name, order in lab.orders if order.round_number == number]


def folded_by_hand(lab: Lab, number: int, plan: PrivacyPlan = PLAN) -> np.ndarray[Any, Any]:
    """What round `number` adds to the head, from the formula, in float64."""
    size = lab.plan.manifest.params_size
    radius = SIGMA / plan.noise_multiplier
    step = plan.clipping_norm / (radius - math.sqrt(size) / 2 - 1)
    total = np.zeros(size)
    for name, order in train_orders(lab, number):
        update = lab.devices[name].update(order)
        vector = decode(update.payload, update.codec, update.params_size).astype(np.float64)
        total += np.rint(vector * min(1.0, plan.clipping_norm / np.linalg.norm(vector)) / step)
    total += discrete_gaussian(WordStream(secret_of(number), b"central noise"), SIGMA, size)
    return total * step / (plan.sampling_rate * len(lab.devices))


def forge(lab: Lab, statement: sa.Executable) -> None:
    with open_transaction(lab.database) as connection:
        connection.execute(statement)


# ---- a good round ------------------------------------------------------------------------------------------


def test_head_moves_by_the_clipped_sum_with_noise_over_the_expected_cohort() -> None:
    lab = private_lab(rounds=1)
    head = lab.run()
    np.testing.assert_allclose(head.params - lab.initial.params, folded_by_hand(lab, 1), rtol=0, atol=2e-6)


def test_noise_is_as_large_as_it_was_charged() -> None:
    """With nobody asked, what is left is the noise alone: its size is sigma = z C / (q N)."""
    plan = replace(PLAN, sampling_rate=1e-6, noise_multiplier=3.0, clipping_norm=0.5)
    moved = []
    for number in range(15):
        lab = private_lab(
            4, plan=plan, rounds=1, draw_secret=lambda _, n=number: hashlib.sha256(str(n).encode()).digest()
        )
        moved.append(lab.run().params - lab.initial.params)
    noise = np.concatenate(moved) / 1.5
    assert abs(noise.std() - 1) < 5 / math.sqrt(2 * noise.size)
    assert abs(noise.mean()) < 5 / math.sqrt(noise.size)


def test_every_round_is_charged_before_its_first_order_leaves() -> None:
    lab = private_lab(rounds=1)
    lab.runner.tick()
    (charge,) = lab.rows(schema.privacy_ledger)
    assert lab.inbox
    assert (charge.round, charge.population, charge.cohort) == (1, 12, len(lab.inbox))
    assert charge.epsilon == pytest.approx(epsilon_of([(Mechanism(1.0, 0.5), 1)], 1e-5))
    assert charge.secret_sha256 == hashlib.sha256(secret_of(1)).hexdigest()
    assert [row.secret for row in lab.rows(schema.privacy_secrets)] == [secret_of(1)]


def test_secret_ends_with_its_round() -> None:
    lab = private_lab(rounds=3)
    lab.run()
    assert lab.rows(schema.privacy_secrets) == []
    assert len(lab.rows(schema.privacy_ledger)) == 3


def test_weights_and_metrics_of_devices_are_kept_nowhere() -> None:
    lab = private_lab(rounds=2)
    lab.run()
    updates = lab.rows(schema.updates)
    assert updates
    assert {(row.num_examples, str(row.metrics), row.norm) for row in updates} == {(1, "{}", 0.0)}
    assert {key for row in lab.rows(schema.rounds) for key in row.metrics} == {"train_devices"}


def test_nobody_is_asked_how_good_the_model_is() -> None:
    lab = private_lab(rounds=2)
    lab.run()
    assert {order.kind for _, order in lab.orders} == {"train"}
    assert [dict(candidate.metrics) for candidate in lab.candidates.values()] == [{}, {}]


def test_devices_are_told_the_fixed_clip() -> None:
    lab = private_lab(rounds=1)
    lab.run()
    assert {invitation.train.clipping_norm for invitation in lab.invitations} == {1.0}


def test_long_update_counts_for_no_more_than_the_clip() -> None:
    def shout(device: Device, order: Order) -> Any:
        return device.message(device.update(order, 1e3 * device.local_update(order)), order)

    plan = replace(PLAN, sampling_rate=1.0)
    calm, loud = private_lab(3, plan=plan, rounds=1), private_lab(3, plan=plan, rounds=1)
    loud.devices["d00"].behaviour = shout
    difference = np.linalg.norm(loud.run().params.astype(np.float64) - calm.run().params)
    assert difference <= 2 * plan.clipping_norm / 3 * (1 + 1e-5)


def test_strategy_of_the_run_is_given_the_noisy_mean() -> None:
    parameters = {"server_learning_rate": 0.5, "server_momentum": 0.0}
    half, whole = private_lab(rounds=1, strategy="FedAvgM", parameters=parameters), private_lab(rounds=1)
    moved = half.run().params - half.initial.params
    np.testing.assert_allclose(moved, 0.5 * (whole.run().params - whole.initial.params), atol=1e-6)


# ---- the cohort --------------------------------------------------------------------------------------------


def test_sampling_is_poisson() -> None:
    """Sizes have the binomial's variance, and no two nodes are drawn together more often than chance has it."""
    nodes, rate, times = range(60), 0.3, 3000
    drawn = np.zeros((times, 60))
    for number in range(times):
        drawn[number, list(sample_cohort(secret_of(number), nodes, rate))] = 1
    sizes = drawn.sum(1)
    assert abs(sizes.mean() - 18) < 5 * math.sqrt(12.6 / times)
    assert abs(sizes.var() / 12.6 - 1) < 5 * math.sqrt(2 / times)
    assert np.abs(drawn.mean(0) - rate).max() < 5 * math.sqrt(0.21 / times)
    together = np.corrcoef(drawn.T) - np.eye(60)
    assert np.abs(together).max() < 5.5 / math.sqrt(times)


def test_whether_a_node_is_drawn_does_not_depend_on_the_others() -> None:
    for number in range(50):
        whole = set(sample_cohort(secret_of(number), range(100), 0.2))
        assert set(sample_cohort(secret_of(number), range(0, 100, 3), 0.2)) == whole & set(range(0, 100, 3))


@pytest.mark.parametrize(
    "parameters", [{"fraction_train": 0.1}, {"fraction_train": 0.1, "min_train_nodes": 11}]
)
def test_no_fraction_and_no_fewest_of_a_strategy_changes_who_is_drawn(parameters: dict[str, Any]) -> None:
    lab = private_lab(rounds=3, strategy="FedAvg", parameters=parameters)
    lab.run()
    for row in lab.rows(schema.rounds):
        present = lab.present().values()
        assert set(row.node_ids) == set(sample_cohort(secret_of(row.number), present, 0.5))


def test_rate_of_one_draws_everybody() -> None:
    assert sample_cohort(secret_of(1), [3, -1, 2**63 - 1], 1.0) == (-1, 3, 2**63 - 1)


def test_empty_cohort_is_charged_and_moves_the_head_by_noise() -> None:
    lab = private_lab(4, plan=replace(PLAN, sampling_rate=1e-6), rounds=2)
    head = lab.run()
    assert lab.orders == []
    assert [row.cohort for row in lab.rows(schema.privacy_ledger)] == [0, 0]
    assert head.sha256 != lab.initial.sha256
    assert [row.state for row in lab.rows(schema.rounds)] == ["done", "done"]


def test_round_without_a_reply_folds_at_its_deadline() -> None:
    lab = private_lab(4, plan=replace(PLAN, sampling_rate=1.0), rounds=1)
    for device in lab.devices.values():
        device.behaviour = lambda device, order: None
    assert lab.run().sha256 != lab.initial.sha256
    assert [row.state for row in lab.rows(schema.rounds)] == ["done"]


# ---- the budget --------------------------------------------------------------------------------------------


def budget_for(rounds: int) -> PrivacyPlan:
    """A budget that so many rounds fit into, and no more."""
    mechanism = Mechanism(PLAN.noise_multiplier, PLAN.sampling_rate)
    spent = [epsilon_of([(mechanism, count)], PLAN.delta) for count in (rounds, rounds + 1)]
    return replace(PLAN, epsilon=sum(spent) / 2)


def test_round_that_would_cross_the_budget_does_not_start() -> None:
    lab = private_lab(plan=budget_for(3), rounds=10)
    lab.run()
    assert [row.round for row in lab.rows(schema.privacy_ledger)] == [1, 2, 3]
    assert [row.state for row in lab.rows(schema.rounds)] == ["done"] * 3
    assert {order.round_number for _, order in lab.orders} == {1, 2, 3}
    assert lab.rows(schema.runs)[0].status == EXHAUSTED
    assert not lab.invitations[-1].open


def test_budget_stays_spent_after_a_restart() -> None:
    lab = private_lab(plan=budget_for(2), rounds=10)
    head = lab.run()
    lab.restart()
    assert lab.run().sha256 == head.sha256
    assert len(lab.rows(schema.privacy_ledger)) == 2
    assert lab.rows(schema.runs)[0].status == EXHAUSTED


def test_raised_budget_lets_the_run_go_on() -> None:
    lab = private_lab(plan=budget_for(2), rounds=4)
    lab.run()
    private = PrivateRun(budget_for(4), ledger_keys, secret_of)
    lab._make_runner = lambda plan, ports: RoundRunner(*make_private(plan, ports, private))
    lab.restart()
    lab.run()
    assert [row.round for row in lab.rows(schema.privacy_ledger)] == [1, 2, 3, 4]
    assert lab.rows(schema.runs)[0].status == "finished"


def test_another_run_does_not_begin_with_a_new_budget() -> None:
    lab = private_lab(plan=budget_for(2), rounds=2)
    lab.run()
    lab.plan = replace(lab.plan, run="autumn")
    lab.restart()
    lab.run()
    assert [(row.run, row.round) for row in lab.rows(schema.privacy_ledger)] == [("spring", 1), ("spring", 2)]
    assert {row.run: row.status for row in lab.rows(schema.runs)} == {
        "spring": "finished",
        "autumn": EXHAUSTED,
    }


def test_failed_round_stays_charged_and_its_retry_is_charged_anew() -> None:
    lab = private_lab(rounds=1)
    lab.plan = replace(lab.plan, max_head_change=1e-9)
    lab.restart()
    while len(lab.rows(schema.rounds)) < 3:
        lab.step()
    assert [row.state for row in lab.rows(schema.rounds)][:2] == ["failed", "failed"]
    charges = lab.rows(schema.privacy_ledger)
    assert [row.round for row in charges] == [1, 2, 3]
    assert charges[0].epsilon < charges[1].epsilon < charges[2].epsilon
    assert len({row.secret_sha256 for row in charges}) == 3
    assert len(lab.rows(schema.privacy_secrets)) <= 1


# ---- crashes -----------------------------------------------------------------------------------------------


def heads_of(lab: Lab) -> list[str]:
    return [row.sha256 for row in sorted(lab.rows(schema.checkpoints), key=lambda row: row.round)]


class Watch:
    """Every head that was put into the store, whether or not a commit followed."""

    def __init__(self, lab: Lab) -> None:
        self.put: set[str] = set()
        inner = lab.blobs.put_blob

        def put_blob(data: bytes) -> str:
            digest = inner(data)
            self.put.add(digest)
            return digest

        lab.blobs.put_blob = put_blob  # type: ignore[method-assign]


def crashed_at(at: int) -> tuple[Lab, Watch, bool]:
    """A run of two rounds with secrets from the system, which ends at step `at` and goes on in a new process."""
    lab = private_lab(6, rounds=2, draw_secret=None)
    watch = Watch(lab)
    lab.fuse.at = len(lab.fuse.steps) + at
    crashed = False
    for _ in range(200):
        try:
            if lab.runner.is_finished:
                break
            lab.step()
        except BlownFuseError:
            lab.fuse.at, crashed = -1, True
            lab.restart()
    assert lab.runner.is_finished
    return lab, watch, crashed


def steps_of_a_run() -> int:
    lab = private_lab(6, rounds=2, draw_secret=None)
    before = len(lab.fuse.steps)
    lab.run()
    return len(lab.fuse.steps) - before


@pytest.mark.slow
def test_crash_at_any_step_neither_refunds_nor_redraws() -> None:
    crashes = 0
    for at in range(steps_of_a_run() + 12):
        lab, watch, crashed = crashed_at(at)
        crashes += crashed
        charges = lab.rows(schema.privacy_ledger)
        assert [row.round for row in charges] == [1, 2], at
        with lab.database.read() as connection:
            verify_ledger(connection, [KEY.verify_key])
        # A head that was made before the crash and is not the one that was kept would be a second draw.
        assert watch.put <= set(heads_of(lab)), at
        assert lab.rows(schema.privacy_secrets) == []
    assert crashes > 25


# ---- the ledger --------------------------------------------------------------------------------------------

LEDGER = schema.privacy_ledger


@pytest.mark.parametrize(
    ("forgery", "seq"),
    [
        (sa.update(LEDGER).where(LEDGER.c.seq == 2).values(noise_multiplier=9.0), 2),
        (sa.update(LEDGER).where(LEDGER.c.seq == 2).values(epsilon=0.1), 2),
        (sa.update(LEDGER).where(LEDGER.c.seq == 3).values(signature="00" * 64), 3),
        (sa.update(LEDGER).where(LEDGER.c.seq == 1).values(hash="11" * 32), 1),
        (sa.delete(LEDGER).where(LEDGER.c.seq == 2), 2),
        (sa.delete(LEDGER).where(LEDGER.c.seq == 1), 1),
    ],
)
def test_changed_ledger_is_found_and_named_at_the_start(forgery: sa.Executable, seq: int) -> None:
    lab = private_lab(rounds=3)
    lab.run()
    forge(lab, forgery)
    with pytest.raises(TrustError) as caught:
        lab.restart()
    assert caught.value.facts["seq"] == seq


def test_charge_cut_off_the_end_is_found() -> None:
    lab = private_lab(rounds=3)
    lab.run()
    forge(lab, sa.delete(LEDGER).where(LEDGER.c.seq == 3))
    with pytest.raises(TrustError, match="charge 3 of the privacy ledger is missing"):
        lab.restart()
    # Without its audit entries the round itself still says that it was charged.
    forge(lab, sa.delete(schema.audit).where(schema.audit.c.kind == "privacy.charged"))
    with pytest.raises(TrustError, match="round 3 of run spring"):
        lab.restart()


def test_ledger_signed_by_another_key_is_refused() -> None:
    lab = private_lab(rounds=1)
    lab.run()
    other = SigningKey.generate().verify_key
    with lab.database.read() as connection, pytest.raises(TrustError, match="not signed"):
        verify_ledger(connection, [other])


def test_rounds_without_noise_are_counted() -> None:
    lab = Lab(4, rounds=2)
    lab.run()
    with lab.database.read() as connection:
        assert count_uncharged(connection) == 2
        assert load_charges(connection) == []


def test_private_round_is_not_folded_once_privacy_is_switched_off() -> None:
    lab = private_lab(4, plan=replace(PLAN, sampling_rate=1.0), rounds=1)
    lab.runner.tick()
    lab._make_runner = RoundRunner
    lab.restart()
    while lab.rows(schema.rounds)[0].state not in ("failed", "done"):
        lab.step()
    assert lab.rows(schema.rounds)[0].state == "failed"
    assert lab.runner.head.sha256 == lab.initial.sha256


def test_plain_round_is_not_folded_as_a_private_one() -> None:
    lab = Lab(4, rounds=1)
    lab.runner.tick()
    private = PrivateRun(PLAN, ledger_keys, secret_of)
    lab._make_runner = lambda plan, ports: RoundRunner(*make_private(plan, ports, private))
    lab.restart()
    while lab.rows(schema.rounds)[0].state not in ("failed", "done"):
        lab.step()
    assert lab.rows(schema.rounds)[0].state == "failed"


# ---- parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "noise"), [(1, 0.01), (57, 1.0), (100_000, 4.0), (1000, 1000.0)])
def test_rounded_update_is_never_longer_than_the_radius(size: int, noise: float) -> None:
    lattice = lattice_for(0.7, noise, size)
    rng = np.random.default_rng(size)
    for scale in (1e-9, 0.5, 1e6):
        update = (scale * rng.normal(size=size)).astype(np.float32)
        found = lattice.rounded(update, 0.7)
        assert sum(int(x) ** 2 for x in found) <= lattice.radius**2
    assert lattice.rounded(np.zeros(size, np.float32), 0.7).sum() == 0


def test_noise_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ConfigurationError):
        lattice_for(1.0, 100_000.0, 2**20)


@pytest.mark.parametrize("name", ["clipping_norm", "noise_multiplier", "sampling_rate", "epsilon", "delta"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_plan_out_of_bounds_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=name):
        PrivacyPlan(**{name: value})


GOOD: dict[str, Any] = {"buffers_size": 0, "is_folded": True, "has_holdout": True, "has_app": False}


@pytest.mark.parametrize(
    ("changes", "policy"),
    [
        ({"buffers_size": 8}, {}),
        ({"is_folded": False}, {}),
        ({"has_app": True}, {}),
        ({"has_holdout": False}, {}),
        ({}, {"goal": 5}),
        ({}, {"secure": "pairwise"}),
    ],
)
def test_what_does_not_go_with_privacy_is_refused(changes: dict[str, Any], policy: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="under differential privacy"):
        check_private(RoundPolicy(**policy), "central", **{**GOOD, **changes})


def test_what_goes_with_privacy_is_let_through() -> None:
    check_private(RoundPolicy(), "central", **GOOD)
    check_private(RoundPolicy(evaluate_every=0), "central", **{**GOOD, "has_holdout": False})
