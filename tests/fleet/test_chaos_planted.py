"""The simulation finds what is broken on purpose: a bug in each of outbox, receipt, fold and swap, within 50 seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import cloud_server.aggregator
import edge_agent.slots
import edge_agent.storage
from cloud_server.aggregator import Aggregator
from cloud_server.rounds.desk import Desk
from edge_agent.release_files import INT8
from edge_agent.slots import CURRENT, Slots
from edge_agent.storage import Database
from fleet.chaos.campaign import laboratory, play
from fleet.chaos.faults import make_schedule
from fleet.chaos.template import Template
from wire.envelope import Opened
from wire.errors import StorageError
from wire.messages import Receipt, Update, decode_body

SEEDS = 50
FAULTS = 20


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    with laboratory() as made:
        yield made


def first_found(template: Template) -> tuple[int, str]:
    """The first seed that fails, and what its ledger says."""
    for seed in range(SEEDS):
        outcome = play(template, seed, make_schedule(seed, FAULTS))
        if outcome.violations:
            return seed, outcome.violations[0].what
    return SEEDS, ""


@pytest.mark.slow
def test_outbox_that_is_not_synced_is_found(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    def never_durable(self: Database, durable: bool) -> None:
        self._connection.execute("PRAGMA synchronous = NORMAL")

    monkeypatch.setattr(edge_agent.storage.Database, "_set_durable", never_durable)
    seed, what = first_found(template)
    assert seed < SEEDS
    assert "lost" in what or "epoch" in what or "was" in what, what


@pytest.mark.slow
def test_receipt_for_what_was_not_stored_is_found(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    def receipt_in_any_case(
        self: Aggregator, device: str, opened: Opened, transfer: bytes, size_bytes: int
    ) -> None:
        runner = self._runner
        if runner is None:
            return
        try:
            receipt = runner.on_update(
                device, opened.header, opened.body, transfer_sha256=transfer, size_bytes=size_bytes
            )
        except StorageError:
            body = decode_body(opened.body, Update)
            receipt = Receipt(update_id=body.update_id, transfer=transfer, verdict="stored")
        self._downlink.send_receipt(device, receipt)

    monkeypatch.setattr(cloud_server.aggregator.Aggregator, "on_update", receipt_in_any_case)
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
def test_swap_that_overwrites_what_serves_is_found(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_place(self: Slots, *, replaces_itself: bool) -> None:
        for path in sorted((self._root / ".staged").iterdir()):
            (self._root / CURRENT / path.name).write_bytes(path.read_bytes())
        assert (self._root / CURRENT / INT8).is_file()

    monkeypatch.setattr(edge_agent.slots.Slots, "_swap_in", in_place)
    seed, what = first_found(template)
    assert seed < SEEDS
    assert "serves release" in what or "answer" in what
