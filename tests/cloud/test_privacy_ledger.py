"""The privacy ledger beside the audit chain, after a change of keys, out of a backup: nothing spent is forgotten."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cloud_server.backup.backup import make_backup, restore_backup
from cloud_server.cli import main
from cloud_server.cli.audit_command import verify_books
from cloud_server.db import schema
from cloud_server.db.privacy import ChargeRow, insert_charge, load_charges, load_secret
from cloud_server.deployment import Deployment, initialise
from cloud_server.privacy.accountant import epsilon_of
from cloud_server.privacy.budget import Budget, PrivateRun, mechanism_of
from cloud_server.privacy.keys import add_ledger_key, open_ledger_keys
from cloud_server.privacy.ledger import anchored_charges, signed
from cloud_server.privacy.run import private_run
from cloud_server.settings import CloudSettings, PrivacySettings
from tests.cloud.deployment import SteppedClock
from wire.errors import ConfigurationError, TrustError

SETTINGS = CloudSettings(privacy=PrivacySettings(mode="central", noise_multiplier=1.0, epsilon=20.0))


class Cloud:
    """A private fleet's aggregator in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = SteppedClock()
        self.deployment = initialise(folder / "state", SETTINGS, clock=self.clock)

    def charge(self, *numbers: int) -> PrivateRun:
        """Opens rounds as the service does."""
        deployment = self.deployment
        plan = deployment.settings.privacy.plan()
        assert plan is not None
        private = private_run(plan, deployment.database, deployment.folder.keys)
        budget = Budget(deployment.database, "main", private, 10)
        for number in numbers:
            budget.prepare(number, 50)
            with deployment.database.transaction() as connection:
                budget.commit(connection, 5, self.clock.now())
        return private

    def charges(self) -> list[ChargeRow]:
        with self.deployment.database.read() as connection:
            return load_charges(connection)

    def insert(self, row: ChargeRow) -> None:
        with self.deployment.database.transaction() as connection:
            insert_charge(connection, row)

    def cut_off(self, table: sa.Table, seq: int) -> None:
        with self.deployment.database.transaction() as connection:
            connection.execute(sa.delete(table).where(table.c.seq == seq))

    def findings(self) -> list[str]:
        return [finding.what for finding in verify_books(self.deployment).findings]

    def restore(self, charges: int | None) -> int:
        target = self.folder / "restored"
        restored = restore_backup(self.folder / "backup", target, clock=self.clock, charges=charges)
        self.deployment.close()
        self.deployment = Deployment.open(target, clock=self.clock)
        return restored.lost_charges


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path)
    yield made
    made.deployment.close()


def following(row: ChargeRow) -> ChargeRow:
    """The charge of the next round as it would be, not signed yet."""
    values: dict[str, Any] = {name: getattr(row, name) for name in ChargeRow.__slots__}
    return ChargeRow(**{**values, "seq": row.seq + 1, "round": row.round + 1, "prev": row.hash})


# ---- beside the audit chain --------------------------------------------------------------------------------


def test_whole_ledger_agrees_with_the_audit_chain(cloud: Cloud) -> None:
    cloud.charge(1, 2, 3)
    assert cloud.findings() == []


def test_charge_cut_off_the_end_is_found_by_audit_verify(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.charge(1, 2, 3)
    cloud.cut_off(schema.privacy_ledger, 3)
    state = str(cloud.folder / "state")
    assert main(["audit", "verify", "--state", state]) == 5
    assert "charge 3 of the privacy ledger is missing" in capsys.readouterr().err
    assert main(["privacy", "verify", "--state", state]) == 5
    with pytest.raises(TrustError, match="charge 3"):
        cloud.charge(4)


def test_charge_cut_off_with_its_audit_entry_is_missed_by_the_signed_head(cloud: Cloud) -> None:
    cloud.charge(1, 2)
    cloud.deployment.notary.tick()
    with cloud.deployment.database.read() as connection:
        entry = connection.execute(sa.select(sa.func.max(schema.audit.c.seq))).scalar_one()
    cloud.cut_off(schema.privacy_ledger, 2)
    cloud.cut_off(schema.audit, entry)
    assert any(f"audit entry {entry} is missing" in what for what in cloud.findings())


def test_charge_that_the_audit_chain_was_not_told_of_is_found(cloud: Cloud) -> None:
    private = cloud.charge(1)
    cloud.insert(signed(following(cloud.charges()[-1]), private.keys().signer))
    assert cloud.findings() == ["charge 2 of the privacy ledger is not in the audit chain"]


def test_head_is_signed_after_every_charge(cloud: Cloud) -> None:
    cloud.charge(1)
    cloud.deployment.notary.tick()
    checked = verify_books(cloud.deployment)
    assert checked.signed == checked.entries


def test_release_metadata_says_how_long_the_ledger_is(cloud: Cloud) -> None:
    assert anchored_charges(cloud.deployment.notary.anchor() or {}) == 0
    cloud.charge(1, 2)
    assert anchored_charges(cloud.deployment.notary.anchor() or {}) == 2


# ---- another key -------------------------------------------------------------------------------------------


def test_charges_of_a_replaced_key_still_verify(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    private = cloud.charge(1, 2)
    state = str(cloud.folder / "state")
    capsys.readouterr()
    assert main(["privacy", "rotate", "--state", state, "--json"]) == 0
    key_id = json.loads(capsys.readouterr().out)["key_id"]
    # The run that is under way signs with the new key from its next round on.
    assert private.keys().signer.key_id.hex() == key_id
    cloud.charge(3)
    assert [row.key_id == key_id for row in cloud.charges()] == [False, False, True]
    assert cloud.findings() == []
    assert main(["privacy", "verify", "--state", state]) == 0


def test_replaced_key_signs_no_further_charge(cloud: Cloud) -> None:
    cloud.charge(1)
    keys = cloud.deployment.folder.keys
    stolen = open_ledger_keys(keys, is_new=False).signer
    add_ledger_key(keys)
    cloud.charge(2)
    cloud.insert(signed(following(cloud.charges()[-1]), stolen))
    assert any("by a key that had been replaced" in what for what in cloud.findings())


def test_key_that_is_not_there_is_not_replaced(cloud: Cloud) -> None:
    assert main(["privacy", "rotate", "--state", str(cloud.folder / "state")]) != 0


# ---- out of a backup ---------------------------------------------------------------------------------------


def test_restored_cloud_does_not_forget_what_was_spent_after_the_backup(cloud: Cloud) -> None:
    cloud.charge(1, 2)
    make_backup(cloud.deployment, cloud.folder / "backup")
    cloud.charge(3, 4, 5)
    spent = cloud.charges()[-1].epsilon
    assert cloud.restore(5) == 3
    charges = cloud.charges()
    assert [row.mode for row in charges] == ["central", "central", "restored", "restored", "restored"]
    assert cloud.findings() == []
    counted = [(mechanism_of(row.noise_multiplier, row.sampling_rate, row.mode), 1) for row in charges]
    assert charges[-1].epsilon == pytest.approx(epsilon_of(counted, SETTINGS.privacy.delta))
    assert charges[-1].epsilon >= spent
    cloud.charge(6)
    assert cloud.charges()[-1].epsilon > charges[-1].epsilon


@pytest.mark.parametrize("said", [None, 1])
def test_restore_of_a_private_fleet_demands_what_was_charged(cloud: Cloud, said: int | None) -> None:
    cloud.charge(1, 2)
    make_backup(cloud.deployment, cloud.folder / "backup")
    with pytest.raises(ConfigurationError, match="charged rounds"):
        cloud.restore(said)
    assert not (cloud.folder / "restored").exists()


def test_restore_of_a_fleet_without_a_budget_asks_nothing(tmp_path: Path) -> None:
    clock = SteppedClock()
    with initialise(tmp_path / "state", CloudSettings(), clock=clock) as deployment:
        make_backup(deployment, tmp_path / "backup")
    assert restore_backup(tmp_path / "backup", tmp_path / "restored", clock=clock).lost_charges == 0


def test_lost_rounds_are_charged_as_the_costliest_there_were(cloud: Cloud) -> None:
    cloud.charge(1)
    make_backup(cloud.deployment, cloud.folder / "backup")
    cloud.restore(2)
    first, lost = cloud.charges()
    assert lost.noise_multiplier <= first.noise_multiplier
    assert lost.sampling_rate >= first.sampling_rate


def test_noise_of_a_round_under_way_is_not_drawn_again_after_a_restore(cloud: Cloud) -> None:
    cloud.charge(1)
    with cloud.deployment.database.read() as connection:
        assert load_secret(connection, "main", 1) is not None
    make_backup(cloud.deployment, cloud.folder / "backup")
    cloud.restore(1)
    with cloud.deployment.database.read() as connection:
        assert load_secret(connection, "main", 1) is None


def test_charges_by_the_million_are_refused(cloud: Cloud) -> None:
    make_backup(cloud.deployment, cloud.folder / "backup")
    with pytest.raises(ConfigurationError, match="too many"):
        cloud.restore(1_000_000)
