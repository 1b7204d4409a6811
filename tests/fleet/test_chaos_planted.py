"""The simulation finds what is broken on purpose: a bug in each of outbox, receipt, fold and swap, within 50 seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cloud_server.aggregator import Aggregator
from cloud_server.rounds.desk import Desk
from edge_agent.release_files import StagedRelease
from edge_agent.slots import Slots
from edge_agent.storage import Database
from fleet.chaos.campaign import laboratory, play
from fleet.chaos.plays import schedule_of
from fleet.chaos.template import Template
from wire.envelope import Opened
from wire.messages import Evaluation, Receipt, Update, decode_body

SEEDS = 50
FAULTS = 15


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    with laboratory() as made:
        yield made


def first_found(template: Template) -> tuple[int, str]:
    """The first seed that fails, and what its ledger says."""
    for seed in range(SEEDS):
        outcome = play(template, seed, schedule_of(seed, FAULTS))
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
        body = decode_body(opened.body, Update if opened.header.type == "up" else Evaluation)
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
