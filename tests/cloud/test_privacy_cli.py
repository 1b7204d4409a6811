"""`shoal-cloud privacy` and the settings of a private run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cloud_server.cli import main
from cloud_server.db.privacy import load_charges
from cloud_server.db.schema import privacy_ledger
from cloud_server.deployment import Deployment
from cloud_server.privacy.budget import Budget, PrivateRun
from cloud_server.privacy.keys import KEY_FILE, open_ledger_keys
from cloud_server.privacy.plan import PrivacyPlan
from cloud_server.privacy.run import private_run
from cloud_server.run_setup import run_config
from cloud_server.settings import PrivacySettings
from wire.errors import ConfigurationError, StorageError

PLAN = PrivacyPlan(noise_multiplier=1.0, sampling_rate=0.1, epsilon=4.0)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    assert main(["init", "--state", str(folder)]) == 0
    text = (folder / "settings.toml").read_text().replace('mode = "none"', 'mode = "central"')
    (folder / "settings.toml").write_text(text.replace("epsilon = 8.0", "epsilon = 4.0"))
    return folder


def charge(state: Path, rounds: int) -> PrivateRun:
    """Charges rounds as the service does."""
    with Deployment.open(state, {}) as deployment:
        private = private_run(PLAN, deployment.database, deployment.folder.keys)
        budget = Budget(deployment.database, "main", private, 10)
        for number in range(1, rounds + 1):
            budget.prepare(number, 50)
            with deployment.database.transaction() as connection:
                budget.commit(connection, 5, 1_800_000_000.0)
    return private


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    assert main(words) == 0
    return json.loads(capsys.readouterr().out)


def test_show_of_a_new_aggregator_says_what_the_budget_allows(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = answer(capsys, "privacy", "show", "--state", str(state), "--json")
    assert (facts["mode"], facts["spent_epsilon"], facts["charged_rounds"], facts["charges"]) == (
        "central",
        0.0,
        0,
        [],
    )
    assert facts["rounds_left"] > 10


def test_show_lists_what_rounds_were_charged(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = answer(capsys, "privacy", "show", "--state", str(state), "--json")
    charge(state, 3)
    facts = answer(capsys, "privacy", "show", "--state", str(state), "--json")
    assert [row["round"] for row in facts["charges"]] == [1, 2, 3]
    assert facts["spent_epsilon"] == facts["charges"][-1]["epsilon"] > 0
    assert facts["rounds_left"] == before["rounds_left"] - 3
    assert main(["privacy", "show", "--state", str(state)]) == 0
    assert "EPSILON" in capsys.readouterr().out


def test_verify_counts_the_charges(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "privacy", "verify", "--state", str(state), "--json")["charges"] == 0
    charge(state, 2)
    assert answer(capsys, "privacy", "verify", "--state", str(state), "--json")["charges"] == 2


def test_verify_of_a_changed_ledger_fails_and_names_the_charge(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    charge(state, 2)
    with Deployment.open(state, {}) as deployment, deployment.database.transaction() as connection:
        connection.execute(sa.update(privacy_ledger).where(privacy_ledger.c.seq == 2).values(cohort=0))
    assert main(["privacy", "verify", "--state", str(state)]) == 5
    assert "charge 2 of the privacy ledger was changed" in capsys.readouterr().err


def test_lost_key_of_the_ledger_is_not_made_anew(state: Path) -> None:
    private = charge(state, 1)
    with Deployment.open(state, {}) as deployment:
        path = deployment.folder.keys / KEY_FILE
        assert path.stat().st_mode & 0o777 == 0o600
        assert (
            open_ledger_keys(deployment.folder.keys, is_new=False).signer.key_id
            == private.keys().signer.key_id
        )
        path.unlink()
        with pytest.raises(StorageError, match="missing"):
            private_run(PLAN, deployment.database, deployment.folder.keys)
        with deployment.database.read() as connection:
            assert len(load_charges(connection)) == 1


@pytest.mark.parametrize("text", ["", "rsa 00\n", "ed25519 zz\n", "ed25519 00\n"])
def test_damaged_key_of_the_ledger_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / KEY_FILE
    path.parent.mkdir()
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="not a key file"):
        open_ledger_keys(tmp_path, is_new=True)


def test_settings_make_a_plan_only_where_privacy_is_on() -> None:
    assert PrivacySettings().plan() is None
    plan = PrivacySettings(mode="central", noise_multiplier=2.0).plan()
    assert plan == PrivacyPlan(noise_multiplier=2.0)


def test_settings_reach_the_run_of_the_service(state: Path) -> None:
    with Deployment.open(state, {}) as deployment:
        private = run_config(deployment).privacy
        assert private is not None
        assert private.plan == PrivacyPlan(epsilon=4.0)
        assert (
            private.keys().signer.key_id
            == open_ledger_keys(deployment.folder.keys, is_new=False).signer.key_id
        )
        # Nobody can tell one secret from the one before.
        assert private.draw_secret(1) != private.draw_secret(1)
