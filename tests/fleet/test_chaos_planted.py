"""The simulation finds what is broken on purpose, within 50 seeds: a bug in each of outbox, receipt, fold, swap, floor,
masks, noise, staleness, clock, playback and rollback; and one that takes several faults is shrunk to these."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloud_server.aggregator import Aggregator
from cloud_server.clock_evidence import ClockGuard
from cloud_server.flower.exchange_desk import ExchangeDesk
from cloud_server.privacy.budget import Budget, Charged
from cloud_server.release.tuf_repository import TufRepository
from cloud_server.rounds.buffered import BufferedPerformer
from cloud_server.rounds.chronicle import Origin
from cloud_server.rounds.desk import Desk
from cloud_server.secure.book import MaskBook
from edge_agent.release.files import StagedRelease
from edge_agent.release.slots import LAST_GOOD, Slots
from edge_agent.store.storage import Database
from fleet.chaos.campaign import laboratory, play, shrunk_schedule
from fleet.chaos.faults import Fault
from fleet.chaos.plays import play_of, schedule_of
from fleet.chaos.record import keep_regression
from fleet.chaos.template import Template
from wire.envelope import Opened
from wire.messages import Evaluation, Receipt, Update, decode_body

SEEDS = 50
FAULTS = 15
FEW_FAULTS = 8
MANY_FAULTS = 50
"""So many that every point is struck about once."""
THIRD_LIFE = 4
"""The fencing token of the aggregator's third life; the template was made under the first token."""


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    with laboratory() as made:
        yield made


def first_found(template: Template, *names: str, faults: int = FAULTS) -> tuple[int, str]:
    """The first seed that fails, and what its ledger says.

    Args:
        names: of plays that a bug can show in; none for all.
    """
    for seed in range(SEEDS):
        if names and play_of(seed).name not in names:
            continue
        outcome = play(template, seed, schedule_of(seed, faults))
        if outcome.violations:
            return seed, outcome.violations[0].what
    return SEEDS, ""


@pytest.mark.slow
def test_outbox_that_is_not_synced_is_found(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    def never_durable(self: Database, durable: bool) -> None:
        self._connection.execute("PRAGMA synchronous = NORMAL")

    monkeypatch.setattr(Database, "_set_durable", never_durable)
    seed, what = first_found(template)
    assert seed < SEEDS
    assert "lost" in what or "epoch" in what or "was" in what, what


@pytest.mark.slow
def test_receipt_before_the_commit_is_found(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_and_receipt = Aggregator.on_update

    def receipt_first(
        self: Aggregator, device: str, opened: Opened, transfer: bytes, size_bytes: int
    ) -> None:
        is_update = opened.header.type == "up"
        body: Update | Evaluation = (
            decode_body(opened.body, Update) if is_update else decode_body(opened.body, Evaluation)
        )
        receipt = Receipt(update_id=body.update_id, transfer=transfer, verdict="stored")
        self._downlink.send_receipt(device, receipt)
        commit_and_receipt(self, device, opened, transfer, size_bytes)

    monkeypatch.setattr(Aggregator, "on_update", receipt_first)
    seed, what = first_found(template)
    assert seed < SEEDS
    assert "before it is" in what


@pytest.mark.slow
def test_fold_that_forgets_what_it_owes_is_found(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    restore = Desk._restore_head

    def without_residual(self: Desk, row: Any) -> None:
        restore(self, row)
        if self._taken is not None:
            self._taken = type(self._taken)(self._taken.head, self._taken.base_sha256, self._taken.patch)

    monkeypatch.setattr(Desk, "_restore_head", without_residual)
    seed, what = first_found(template)
    assert seed < SEEDS
    assert "is not the fold of its updates" in what


@pytest.mark.slow
def test_swap_before_the_self_test_is_found(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, promote = Slots.stage, Slots.promote

    def stage_and_promote(self: Slots, *arguments: Any, **options: Any) -> StagedRelease:
        staged = stage(self, *arguments, **options)
        promote(self, staged)
        return staged

    monkeypatch.setattr(Slots, "stage", stage_and_promote)
    monkeypatch.setattr(Slots, "promote", lambda self, staged: staged.contents)
    seed, what = first_found(template)
    assert seed < SEEDS
    assert "did not pass its self-test" in what


@pytest.mark.slow
def test_device_that_serves_below_its_persisted_floor_is_found(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = Slots._settle

    def settle_for_the_last_good(self: Slots) -> None:
        settle(self)
        if not self.standing.probation and (self._root / LAST_GOOD).is_dir():
            self._go_back(LAST_GOOD)

    monkeypatch.setattr(Slots, "_settle", settle_for_the_last_good)
    seed, what = first_found(template)
    assert seed < SEEDS
    assert "below its floor" in what


@pytest.mark.slow
def test_drop_out_whose_masks_stay_in_the_sum_is_found(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MaskBook, "lost", property(lambda self: frozenset()))
    seed, what = first_found(template, "masked", "noised")
    assert seed < SEEDS
    assert "is not the fold of its updates" in what


@pytest.mark.slow
def test_charge_that_follows_the_noise_is_found(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, end = Budget.commit, Budget.end
    owed: dict[int, tuple[Any, ...]] = {}

    def later(self: Budget, connection: Any, cohort: int, now: float) -> None:
        owed[self.opening.round_number] = (self.opening, cohort, now)

    def charged(self: Budget, round_number: int) -> Charged:
        opening = owed[round_number][0]
        plan = self.plan
        charge: Any = SimpleNamespace(
            clipping_norm=plan.clipping_norm,
            noise_multiplier=plan.noise_multiplier,
            sampling_rate=plan.sampling_rate,
            population=opening.population,
        )
        return Charged(charge, opening.secret)

    def charge_and_end(self: Budget, connection: Any, round_number: int) -> None:
        self._opening, cohort, now = owed[round_number]
        commit(self, connection, cohort, now)
        end(self, connection, round_number)

    monkeypatch.setattr(Budget, "commit", later)
    monkeypatch.setattr(Budget, "charged", charged)
    monkeypatch.setattr(Budget, "end", charge_and_end)
    seed, what = first_found(template, "private")
    assert seed < SEEDS
    assert "was not charged for its noise" in what


@pytest.mark.slow
def test_noise_that_is_drawn_anew_after_a_restart_is_found(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged = Budget.charged

    def from_memory(self: Budget, round_number: int) -> Charged:
        found, opening = charged(self, round_number), self._opening
        if opening is None or opening.round_number != round_number:
            return Charged(found.charge, self._private.draw_secret(round_number))
        return found

    monkeypatch.setattr(Budget, "charged", from_memory)
    seed, what = first_found(template, "private")
    assert seed < SEEDS
    assert "is not the fold of its updates" in what


@pytest.mark.slow
def test_stale_update_that_counts_in_full_is_found(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Origin, "factor", lambda self, exponent: 1.0)
    seed, what = first_found(template, "buffered")
    assert seed < SEEDS
    assert "is not the fold of its updates" in what


@pytest.mark.slow
def test_update_that_is_too_stale_and_counts_is_found(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BufferedPerformer, "_expire_old", lambda self, connection, number, now: None)
    seed, what = first_found(template, "buffered")
    assert seed < SEEDS
    assert "heads old and counts" in what


@pytest.mark.slow
def test_app_that_is_played_back_without_one_of_its_replies_is_found(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver = ExchangeDesk._deliver

    def all_but_one(self: ExchangeDesk, request: Any, row: Any, rows: list[Any]) -> None:
        deliver(self, request, row, rows[: max(1, len(rows) - 1)])

    monkeypatch.setattr(ExchangeDesk, "_deliver", all_but_one)
    seed, what = first_found(template, "app")
    assert seed < SEEDS
    assert "the app has ended" in what or "is not the fold" in what


@pytest.mark.slow
def test_clock_in_another_year_that_is_believed_is_found(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClockGuard, "check", lambda self: None)
    seed, what = first_found(template, faults=MANY_FAULTS)
    assert seed < SEEDS
    assert "by a clock that is in another year" in what


@pytest.mark.slow
def test_rollback_that_is_not_newer_is_found(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    state_ring = TufRepository._state_ring

    def with_old_serial(self: TufRepository, current: Any, statement: Any, custom: Any) -> set[str]:
        lowered = {**statement, "serial": statement["serial"] - int(statement["rollback"])}
        return state_ring(self, current, lowered, custom)

    monkeypatch.setattr(TufRepository, "_state_ring", with_old_serial)
    seed, what = first_found(template, "averaged", "clipped")
    assert seed < SEEDS
    assert "have the serial" in what


@pytest.mark.slow
def test_bug_that_takes_two_faults_is_shrunk_to_them_and_kept(
    template: Template, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    restore = Desk._restore_head

    def forgetful_from_the_third_life_on(self: Desk, row: Any) -> None:
        restore(self, row)
        if (self._ports.fence or 0) >= THIRD_LIFE and self._taken is not None:
            self._taken = type(self._taken)(self._taken.head, self._taken.base_sha256, self._taken.patch)

    path = tmp_path / "regressions.json"
    with monkeypatch.context() as bug:
        bug.setattr(Desk, "_restore_head", forgetful_from_the_third_life_on)
        seed, what = first_found(template, "averaged", faults=FEW_FAULTS)
        shrunk = shrunk_schedule(template, seed, FEW_FAULTS)
        assert len(shrunk) == 2
        assert {fault.point.partition(".")[0] for fault in shrunk} == {"cloud"}, "each of them ends a life"
        for fault in shrunk:
            assert not play(template, seed, (fault,)).violations
        keep_regression(path, "a head that forgets", what, "averaged", seed, shrunk)
        (kept,) = json.loads(path.read_text())
        again = play(template, seed, tuple(Fault(**fault) for fault in kept["faults"]))
        assert ["is not the fold" in violation.what for violation in again.violations] == [True]
    assert not play(template, seed, shrunk).violations
