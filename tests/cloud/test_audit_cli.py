"""`shoal-cloud audit`, `device erase` and `model lineage`, on a state folder."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from cloud_server.audit.notary import Notary
from cloud_server.cli import main
from cloud_server.db.audit import append_audit
from cloud_server.deployment import Deployment
from cloud_server.enrolment.service import Welcome
from models.bundle import Bundle
from tests.cloud.deployment import Newcomer
from wire.enrolment import EnrolmentToken

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def run(
    state: Path, real_bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Runs one command on a state folder that was made, and published a release."""
    monkeypatch.setenv("SHOAL_STATE", str(state))

    def command(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    assert command("init")[0] == 0
    with Deployment.open(state) as deployment:
        deployment.publisher.import_model(real_bundle)
        deployment.publisher.publish(deployment.publisher.propose_bundle(real_bundle).version)
    return command


def forge(state: Path, *statements: str) -> None:
    database = sqlite3.connect(state / "cloud.db")
    for statement in statements:
        database.execute(statement)
    database.commit()
    database.close()


def enrol(state: Path, device: str, token: str) -> None:
    with Deployment.open(state) as deployment:
        welcome = Welcome("shoal", "fleet", "shoal-cloud", "https://x:1", "mqtt://x:1", "stable", 10)
        deployment.enrolment(welcome).enrol(Newcomer(device).request(EnrolmentToken.parse(token)))


def test_audit_verify_of_a_fresh_deployment_is_whole_and_signed(run: Run) -> None:
    code, out, _ = run("audit", "verify", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["is_whole"]
    assert facts["signed"] == facts["entries"] > 2, "a release signs what it stands on, and itself"
    assert facts["heads"] == 2


def test_audit_verify_names_a_changed_entry_and_fails(run: Run, state: Path) -> None:
    forge(state, "UPDATE audit SET body = '{}' WHERE seq = 2")
    code, out, err = run("audit", "verify", "--json")
    assert code == 5
    assert json.loads(out)["findings"] == ["audit entry 2 was changed"]
    assert "audit entry 2 was changed" in err
    assert "hint:" in err


def test_chain_that_was_cut_with_its_heads_disagrees_with_the_release_metadata(run: Run, state: Path) -> None:
    forge(state, "DELETE FROM audit WHERE seq > 1", "DELETE FROM audit_heads")
    code, _, err = run("audit", "verify")
    assert code == 5
    assert "are missing (the release metadata of rings/stable.json)" in err or (
        "is missing (the release metadata of rings/stable.json)" in err
    )


def test_audit_export_is_verified_with_the_key_of_the_metadata(run: Run, state: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "chain.jsonl")
    code, out, _ = run("audit", "export", "--output", place, "--json")
    assert code == 0
    assert json.loads(out)["entries"] > 2
    with Deployment.open(state) as deployment:
        key = deployment.keys.audit.public_bytes.hex()
    assert run("audit", "verify", "--file", place, "--key", key)[0] == 0
    assert run("audit", "verify", "--file", place, "--key", "00" * 32)[0] == 5
    assert run("audit", "verify", "--file", place, "--key", "nonsense")[0] == 2
    again = run("audit", "export", "--output", place)
    assert (again[0], "nothing is overwritten" in again[2]) == (2, True)


def test_audit_sign_tells_the_witness_of_the_settings(run: Run, state: Path, tmp_path: Path) -> None:
    settings = (state / "settings.toml").read_text()
    witness = tmp_path / "witness.jsonl"
    (state / "settings.toml").write_text(settings.replace('witness = ""', f'witness = "{witness}"'))
    assert run("device", "add", "watch")[0] == 0
    code, out, _ = run("audit", "sign", "--json")
    assert code == 0
    told = [json.loads(line) for line in witness.read_text().splitlines()]
    assert told[-1]["seq"] == json.loads(out)["entries"]
    assert run("audit", "verify")[0] == 0
    # Whoever has the database, and even the key, cannot write another history behind the witness's back.
    forge(state, "DELETE FROM audit WHERE seq > 1", "DELETE FROM audit_heads")
    assert "(the witness)" in run("audit", "verify", "--json")[1]


def test_audit_key_that_is_rotated_ends_and_its_heads_stay(run: Run, state: Path) -> None:
    with Deployment.open(state) as deployment:
        stolen = deployment.keys.audit
    assert run("audit", "rotate")[0] == 0
    assert run("audit", "verify")[0] == 0
    with Deployment.open(state) as deployment:
        assert deployment.keys.audit.public_bytes != stolen.public_bytes
        with deployment.database.transaction() as connection:
            append_audit(connection, "device.approved", 1.0, {"device": "somebody"})
        Notary(deployment.database, lambda: stolen, deployment.clock).sign()
    code, _, err = run("audit", "verify")
    assert (code, "which ended at" in err) == (5, True)


def test_audit_show_prints_the_newest_entries(run: Run) -> None:
    code, out, _ = run("audit", "show", "--last", "2", "--json")
    assert code == 0
    assert [entry["kind"] for entry in json.loads(out)][-1] == "ring.set"
    assert [
        entry["kind"] for entry in json.loads(run("audit", "show", "--kind", "ring.set", "--json")[1])
    ] == ["ring.set"]


def test_device_that_is_erased_leaves_no_name_and_a_whole_chain(run: Run, state: Path) -> None:
    enrol(state, "watch", run("device", "add", "watch")[1].strip())
    assert run("device", "rename", "watch", "Ann's watch")[0] == 0
    with Deployment.open(state) as deployment:
        before = deployment.registry.show("watch")
    assert run("device", "erase", "watch")[0] == 0
    rows = json.loads(run("device", "list", "--json")[1])
    assert [(row["device"].startswith("erased-"), row["status"], row["label"]) for row in rows] == [
        (True, "revoked", "")
    ]
    with Deployment.open(state) as deployment:
        after = deployment.registry.show(rows[0]["device"])
        key = deployment.registry.signers()
    assert after.pseudonym != before.pseudonym
    assert (after.node_id, after.update_key, key) == (before.node_id, before.update_key, {})
    dump = "\n".join(sqlite3.connect(state / "cloud.db").iterdump())
    assert "'watch'" not in dump
    assert "Ann" not in dump
    assert before.pseudonym in dump, "the chain still says what the device did"
    assert run("audit", "verify")[0] == 0
    assert run("device", "erase", "watch")[0] == 2


def test_model_lineage_of_an_imported_release_begins_with_the_bundle(run: Run) -> None:
    code, out, _ = run("model", "lineage", "1", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["release"], found["generations"], found["devices"]) == (1, [], [])
    assert run("model", "lineage", "1")[0] == 0
    assert run("model", "lineage", "7")[0] == 2
