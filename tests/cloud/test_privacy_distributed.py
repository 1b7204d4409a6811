"""Noise that devices add under masks: enough of it, counted for what it is, in a ring that does not wrap, charged."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cloud_server.db import schema
from cloud_server.privacy.accountant import Mechanism, epsilon_of
from cloud_server.privacy.budget import DISTRIBUTED, EXHAUSTED, PrivateRun, mechanism_for
from cloud_server.privacy.distributed import WRAP, accounted_multiplier, noise_terms
from cloud_server.privacy.keys import LedgerKeys
from cloud_server.privacy.plan import PrivacyPlan
from cloud_server.privacy.run import check_private, make_private
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.runner import RoundRunner
from cloud_server.rounds.state import RoundPolicy
from tests.cloud.helper_lab import HelperLab
from tests.cloud.round_lab import BlownFuseError, Fuse
from tests.cloud.test_helped_round import HelpedRun
from tests.cloud.test_masked_round import MaskedRun, Sent
from tests.cloud.test_privacy_accountant import DELTA, gaussian_epsilon
from wire.errors import ConfigurationError, QuorumError
from wire.helper import HelperAnswer
from wire.lattice import Lattice, add_noise, noisy_mean
from wire.mask_terms import NoiseTerms
from wire.messages import MaskInbox, MaskQuestion, Order
from wire.primitives import SigningKey

KEYS = LedgerKeys((SigningKey.from_bytes(bytes(range(32))),))
PLAN = PrivacyPlan(
    mode="distributed", clipping_norm=2.0, noise_multiplier=1.0, sampling_rate=1.0, epsilon=1e4, delta=DELTA
)


def seed_of(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


class NoisyRun(MaskedRun):
    """Masked rounds whose devices add noise; what each drew follows from its name and the order."""

    def __init__(self, plan: PrivacyPlan = PLAN, **options: Any) -> None:
        self.private = PrivateRun(plan, lambda: KEYS, lambda number: seed_of("round", number))
        super().__init__(**options)

    def _masked_runner(self, plan: RunPlan, ports: RunPorts) -> RoundRunner:
        return super()._masked_runner(*make_private(plan, ports, self.private))

    def values(self, name: str, order: Order) -> NDArray[Any]:
        noise = order.ring_terms and order.ring_terms.noise
        assert noise is not None
        update = self.masked[name].device.local_update(order)
        return add_noise(update, noise, seed_of(name, order.order_id))

    def run_until(self, state: str) -> None:
        for _ in range(80):
            self.step()
            if state in self.states():
                return
        raise AssertionError(f"no round was {state}")


# ---- how much noise ----------------------------------------------------------------------------------------


def terms(members: int = 100, **changes: Any) -> NoiseTerms:
    asked: dict[str, Any] = {
        "dropout": 0.3,
        "colluding": 0.1,
        "clipping_norm": 1.0,
        "noise_multiplier": 1.0,
        "size": 24_000,
    }
    return noise_terms(members=members, **{**asked, **changes})


def test_noise_is_calibrated_to_the_fewest_honest_devices_that_may_deliver() -> None:
    found = terms(100)
    assert found.quorum == 70
    honest = 60
    assert 1.0 <= found.sigma * math.sqrt(honest) / found.radius < 1.001


@pytest.mark.parametrize("members", [3, 30, 1000, 16_384])
@pytest.mark.parametrize("noise", [0.1, 1.0, 8.0])
def test_sum_wraps_with_the_stated_probability_at_most(members: int, noise: float) -> None:
    size = 1_000_000
    found = terms(members, colluding=0.0, noise_multiplier=noise, size=size)
    # All that is not noise, in one parameter; then the sub-Gaussian tail of everybody's noise, in every parameter.
    room = 2**31 - 1 - members * found.radius
    tail = 2 * size * math.exp(-((room / (found.sigma * math.sqrt(members))) ** 2) / 2)
    assert room > 0
    assert tail <= WRAP


@pytest.mark.parametrize(
    ("changes", "error"), [({"colluding": 0.7}, QuorumError), ({"noise_multiplier": 1e7}, ConfigurationError)]
)
def test_noise_that_nobody_could_add_is_refused(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        terms(**changes)


def test_noise_of_a_sum_has_the_stated_variance() -> None:
    """A chi-squared bound: 40 devices, 5,000 parameters, of which every sum must be as wide as 40 times one."""
    found = terms(40, dropout=0.0, colluding=0.0, size=5000)
    nothing = np.zeros(5000, np.float32)
    total = np.zeros(5000, "<u4")
    for device in range(40):
        total += add_noise(nothing, found, seed_of(device))
    lattice = Lattice.of(found.clipping_norm, Fraction(found.radius), 5000)
    noise = noisy_mean(total, found, 1).astype(np.float64) / lattice.step
    ratio = noise.var() / (40 * float(found.sigma) ** 2)
    assert abs(ratio - 1) < 5 * math.sqrt(2 / 5000)
    assert abs(noise.mean()) < 5 * found.sigma * math.sqrt(40 / 5000)
    # That is z C, in the unit of the update.
    assert np.std(noise * lattice.step) == pytest.approx(1.0, rel=0.08)


def test_noise_of_devices_is_independent_and_never_the_same_twice() -> None:
    found, nothing = terms(10, size=2000), np.zeros(2000, np.float32)
    drawn = np.stack([add_noise(nothing, found, seed_of(number)).view("<i4") for number in range(6)]).astype(
        float
    )
    assert np.abs(np.corrcoef(drawn) - np.eye(6)).max() < 5.5 / math.sqrt(2000)


def test_mean_of_noisy_updates_is_the_mean_of_the_updates_within_the_noise() -> None:
    found = terms(50, noise_multiplier=0.1, dropout=0.0, colluding=0.0, size=100)
    updates = np.random.default_rng(1).normal(size=(50, 100)).astype(np.float32) / 20
    total = np.zeros(100, "<u4")
    for number, update in enumerate(updates):
        total += add_noise(update, found, seed_of(number))
    off = noisy_mean(total, found, 50) - updates.mean(0)
    assert np.abs(off).max() < 6 * 0.1 / 50


def test_long_update_counts_for_no_more_than_the_clip() -> None:
    found = terms(10, size=100)
    loud = np.full(100, 1e6, np.float32)
    drawn = [add_noise(vector, found, seed_of(1)).view("<i4").astype(np.int64) for vector in (loud, 0 * loud)]
    assert np.linalg.norm(drawn[0] - drawn[1]) <= found.radius


# ---- what it is worth --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (4.0, 1), (2.0, 10), (8.0, 100), (20.0, 100)])
def test_distributed_rounds_cost_what_the_central_closed_form_says_and_little_more(
    noise: float, rounds: int
) -> None:
    mechanism = mechanism_for(replace(PLAN, noise_multiplier=noise, sampling_rate=0.1), 24_000)
    assert mechanism == Mechanism(mechanism.noise_multiplier, 1.0, is_coarse=True)
    exact = gaussian_epsilon(noise, rounds)
    assert exact <= epsilon_of([(mechanism, rounds)], DELTA) <= 1.15 * exact + 0.01


def test_a_fine_lattice_costs_nothing_and_a_coarse_one_is_counted() -> None:
    assert accounted_multiplier(1.0, 10**6) == pytest.approx(1.0, abs=1e-12)
    coarse = [accounted_multiplier(1.0, 10**4, sigma=sigma, members=20) for sigma in (2.0, 1.0, 0.8)]
    assert 1.0 > coarse[0] > coarse[1] > coarse[2] > 0


@pytest.mark.parametrize("sigma", [0.6, 0.8, 1.0])
def test_sum_of_discrete_gaussians_is_worth_what_is_counted(sigma: float) -> None:
    """Rényi divergences of the exact distribution of a sum of three, moved by one, computed by convolution."""
    whole = np.arange(-14, 15)
    one = np.exp(-(whole**2) / (2 * sigma**2))
    one /= one.sum()
    total = np.convolve(np.convolve(one, one), one)
    noise = sigma * math.sqrt(3)
    counted = accounted_multiplier(noise, 1, sigma=sigma, members=3)
    # Beyond 14 there is nothing that could matter: exp(-14² / 6).
    inside = total[28:-28]
    for order in (1.5, 2.0, 4.0, 8.0):
        p, q = inside[1:], inside[:-1]
        divergence = math.log(float((p**order * q ** (1 - order)).sum())) / (order - 1)
        assert divergence <= order / (2 * counted**2) * (1 + 1e-9)


# ---- rounds ------------------------------------------------------------------------------------------------


def test_head_moves_by_the_sum_of_what_devices_masked() -> None:
    lab = NoisyRun(rounds=1)
    head = lab.run()
    order = lab.first_order()
    noise = order.ring_terms and order.ring_terms.noise
    assert noise is not None
    total = np.zeros(lab.plan.manifest.params_size, "<u4")
    for name in lab.devices:
        total += lab.values(name, lab.order_of(name))
    wanted = lab.initial.params + noisy_mean(total, noise, len(lab.devices))
    assert np.array_equal(head.params, wanted)


def test_round_is_charged_before_its_first_order_leaves_and_without_amplification() -> None:
    lab = NoisyRun(replace(PLAN, noise_multiplier=3.0), rounds=1)
    lab.runner.tick()
    (charge,) = lab.rows(schema.privacy_ledger)
    assert lab.messages
    assert (charge.mode, charge.sampling_rate) == (DISTRIBUTED, 1.0)
    assert charge.noise_multiplier == pytest.approx(3.0)
    assert charge.epsilon >= gaussian_epsilon(3.0, 1)
    assert [row.config["privacy"] for row in lab.rows(schema.rounds)] == [DISTRIBUTED]


def test_devices_are_told_a_fixed_clip_and_their_part_of_the_noise() -> None:
    lab = NoisyRun(rounds=1, dropout=0.34)
    lab.run()
    assert {invitation.train.clipping_norm for invitation in lab.invitations} == {2.0}
    noise = lab.first_order().ring_terms.noise  # type: ignore[union-attr]
    assert noise is not None
    assert (noise.clipping_norm, noise.quorum) == (2.0, 4)
    assert noise.sigma * math.sqrt(4) >= noise.radius


def test_nobody_is_asked_how_good_the_model_is() -> None:
    lab = NoisyRun(rounds=2)
    lab.run()
    assert {body.kind for _, body in lab.log if isinstance(body, Order)} == {"train"}


@pytest.mark.parametrize(("silent", "state"), [(2, "done"), (3, "failed")])
def test_sum_of_fewer_than_the_noise_was_made_for_is_never_asked_about(silent: int, state: str) -> None:
    lab = NoisyRun(rounds=1, mask_seconds=20.0, dropout=0.34, quorum=1)
    kind: type[Sent] = MaskInbox
    lab.mute = dict.fromkeys(sorted(lab.devices)[:silent], kind)
    lab.run_until(state)
    questions = [body for _, body in lab.log if isinstance(body, MaskQuestion)]
    assert bool(questions) == (state == "done")
    assert (lab.runner.head.sha256 == lab.initial.sha256) == (state == "failed")
    assert len(lab.rows(schema.privacy_ledger)) >= 1


def test_lost_round_stays_charged_and_its_retry_is_charged_anew() -> None:
    lab = NoisyRun(rounds=1, mask_seconds=20.0, dropout=0.34, quorum=1)
    kind: type[Sent] = MaskInbox
    lab.mute = dict.fromkeys(sorted(lab.devices)[:4], kind)
    lab.run_until("failed")
    lab.mute = {}
    lab.run()
    assert lab.states()[-1] == "done"
    charges = lab.rows(schema.privacy_ledger)
    assert [row.round for row in charges] == list(range(1, len(lab.states()) + 1))
    assert len({row.secret_sha256 for row in charges}) == len(charges)
    assert lab.rows(schema.privacy_secrets) == []


def test_round_that_would_cross_the_budget_does_not_start() -> None:
    mechanism = mechanism_for(PLAN, 57)
    budget = epsilon_of([(mechanism, 2)], DELTA) * 1.0001
    lab = NoisyRun(replace(PLAN, epsilon=budget), rounds=5)
    lab.run()
    assert [row.round for row in lab.rows(schema.privacy_ledger)] == [1, 2]
    assert lab.states() == ["done", "done"]
    assert lab.rows(schema.runs)[0].status == EXHAUSTED


@pytest.mark.slow
def test_noisy_round_comes_out_the_same_and_is_charged_once_wherever_the_process_ends() -> None:
    straight = NoisyRun(rounds=1)
    straight.fuse = straight.database.fuse = Fuse()
    wanted = straight.run()
    steps = len(straight.fuse.steps)
    for at in range(0, steps, 6):
        lab = NoisyRun(rounds=1)
        lab.fuse = lab.database.fuse = Fuse(at)
        with pytest.raises(BlownFuseError):
            lab.run()
        lab.fuse = lab.database.fuse = Fuse()
        lab.restart()
        assert lab.run().sha256 == wanted.sha256, straight.fuse.steps[at]
        assert [row.round for row in lab.rows(schema.privacy_ledger)] == [1]
        assert lab.rows(schema.privacy_secrets) == []


# ---- with a helper -----------------------------------------------------------------------------------------


class HelpedNoisyRun(HelpedRun):
    """The same with a helper in the place of neighbours."""

    def __init__(self, path: Path, plan: PrivacyPlan = PLAN, **options: Any) -> None:
        self.private = PrivateRun(plan, lambda: KEYS, lambda number: seed_of("round", number))
        super().__init__(path, **options)

    def _helped_runner(self, plan: RunPlan, ports: RunPorts) -> RoundRunner:
        return super()._helped_runner(*make_private(plan, ports, self.private))

    def encoded(self, name: str, order: Order) -> NDArray[Any]:
        assert order.helped is not None
        assert order.helped.noise is not None
        return add_noise(
            self.devices[name].local_update(order), order.helped.noise, seed_of(name, order.order_id)
        )


def test_head_moves_by_the_noisy_sum_that_a_helper_unmasked(tmp_path: Path) -> None:
    lab = HelpedNoisyRun(tmp_path / "helper.db", rounds=1)
    head = lab.run()
    order = lab.train_order()
    assert order.helped is not None
    assert order.helped.noise is not None
    total = np.zeros(lab.plan.manifest.params_size, "<u4")
    for name, each in lab.orders:
        total += lab.encoded(name, each)
    wanted = lab.initial.params + noisy_mean(total, order.helped.noise, len(lab.devices))
    assert np.array_equal(head.params, wanted)
    assert [row.mode for row in lab.rows(schema.privacy_ledger)] == [DISTRIBUTED]


@pytest.mark.parametrize(("delivered", "is_told"), [(4, True), (3, False)])
def test_helper_tells_no_sum_of_fewer_than_the_noise_was_made_for(delivered: int, is_told: bool) -> None:
    noise = NoiseTerms(clipping_norm=1.0, radius=1000, sigma=1000, quorum=4)
    lab = HelperLab(6, min_devices=3, ring="ring32", noise=noise)
    told = lab.ask(lab.seeds(lab.names[:delivered]))
    assert isinstance(told, HelperAnswer) == is_told


# ---- what does not go with it ------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"buffers_size": 0, "is_folded": True, "has_holdout": True, "has_app": False}


@pytest.mark.parametrize(
    ("changes", "policy"),
    [
        ({}, {}),
        ({"buffers_size": 8}, {"secure": "pairwise"}),
        ({"is_folded": False}, {"secure": "pairwise"}),
        ({"has_app": True}, {"secure": "two_server"}),
        ({"has_holdout": False}, {"secure": "pairwise"}),
        ({}, {"secure": "pairwise", "goal": 5}),
    ],
)
def test_what_breaks_the_accounting_is_refused_with_a_hint(
    changes: dict[str, Any], policy: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match="under differential privacy") as caught:
        check_private(RoundPolicy(**policy), "distributed", **{**GOOD, **changes})
    assert caught.value.hint


@pytest.mark.parametrize("secure", ["pairwise", "two_server"])
def test_what_goes_with_it_is_let_through(secure: Any) -> None:
    check_private(RoundPolicy(secure=secure), "distributed", **GOOD)
