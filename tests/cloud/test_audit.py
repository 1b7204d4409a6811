"""The audit chain: what is changed, missing, cut off or written anew is found and named; what rounds write into it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cloud_server.artefacts import Artefacts
from cloud_server.audit.check import Anchor, Checked, ListedKey, check_chain
from cloud_server.audit.export import check_export, write_export
from cloud_server.audit.lineage import trace_lineage
from cloud_server.audit.notary import Notary, NotaryPolicy, list_key, listed_keys
from cloud_server.audit.witness import FileWitness, open_witness, read_witness
from cloud_server.db.audit import HeadRow, append_audit, load_audit, load_heads
from cloud_server.db.engine import Connection, Database, open_database
from cloud_server.db.releases import ReleaseRow, insert_release
from cloud_server.keys import CloudKeys
from cloud_server.release.tuf_repository import TufRepository
from tests.cloud.deployment import Deployment, Newcomer, SteppedClock
from tests.cloud.round_lab import RUN, Lab
from wire.errors import ConfigurationError, StorageError, TrustError
from wire.primitives import SigningKey

KEY = SigningKey.generate()
KEYS = {KEY.key_id.hex(): ListedKey(KEY.verify_key)}


class Books:
    """A chain in memory and its notary."""

    def __init__(self, witness: FileWitness | None = None) -> None:
        self.clock = SteppedClock()
        self.database = open_database("sqlite://")
        self.database.migrate()
        policy = NotaryPolicy(entries=4, seconds=600.0)
        self.notary = Notary(self.database, lambda: KEY, self.clock, policy=policy, witness=witness)

    def add(self, count: int) -> None:
        for number in range(count):
            with self.database.transaction() as connection:
                append_audit(connection, "test", self.clock.now(), {"number": number})

    def forge(self, statement: str) -> None:
        with self.database.transaction() as connection:
            connection.exec_driver_sql(statement)

    def check(self, *anchors: Anchor) -> Checked:
        with self.database.read() as connection:
            return check_chain(load_audit(connection), load_heads(connection), KEYS, anchors)

    def findings(self, *anchors: Anchor) -> list[str]:
        return [finding.what for finding in self.check(*anchors).findings]


@pytest.fixture
def books() -> Books:
    return Books()


def signed(books: Books) -> HeadRow:
    head = books.notary.sign()
    assert head is not None
    return head


def test_chain_that_is_whole_has_no_findings(books: Books) -> None:
    books.add(6)
    signed(books)
    books.add(2)
    checked = books.check()
    assert (checked.entries, checked.heads, checked.signed, checked.findings) == (8, 1, 6, [])


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE audit SET body = '{\"number\":9}' WHERE seq = 3", "audit entry 3 was changed"),
        ("UPDATE audit SET at = at + 1 WHERE seq = 3", "audit entry 3 was changed"),
        ("UPDATE audit SET kind = 'tesu' WHERE seq = 3", "audit entry 3 was changed"),
        ("DELETE FROM audit WHERE seq = 3", "audit entry 3 is missing"),
        ("DELETE FROM audit WHERE seq IN (2, 3, 4)", "audit entries 2 to 4 are missing"),
        ("DELETE FROM audit WHERE seq = 1", "audit entry 1 is missing"),
        ("DELETE FROM audit WHERE seq > 4", "audit entries 5 to 6 are missing (a signed head)"),
        ("UPDATE audit_heads SET seq = 5", "a signed head at entry 5 is not signed"),
        ("UPDATE audit_heads SET key_id = '0011223344556677'", "which is not listed"),
    ],
)
def test_chain_that_was_touched_names_the_place(books: Books, statement: str, said: str) -> None:
    books.add(6)
    signed(books)
    books.forge(statement)
    found = books.findings()
    assert any(said in what for what in found), found


def test_every_flipped_byte_of_an_entry_is_found(books: Books) -> None:
    books.add(3)
    with books.database.read() as connection:
        entries = list(load_audit(connection))
    body = entries[1].body
    for place in range(len(body)):
        flipped = body[:place] + chr(ord(body[place]) ^ 1) + body[place + 1 :]
        touched = type(entries[1])(2, entries[1].prev, entries[1].hash, entries[1].at, "test", flipped)
        findings = check_chain([entries[0], touched, entries[2]], [], KEYS).findings
        assert [finding.what for finding in findings] == ["audit entry 2 was changed"]


def rewrite(books: Books) -> None:
    """What somebody does who has the database: another chain, and no heads."""
    books.forge("DELETE FROM audit")
    books.forge("DELETE FROM audit_heads")
    books.add(8)


def test_chain_that_was_written_anew_disagrees_with_the_witness(tmp_path: Path) -> None:
    witness = FileWitness(tmp_path / "witness.jsonl")
    books = Books(witness)
    books.add(5)
    books.notary.tick()
    books.clock.seconds += 1
    rewrite(books)
    signed(books)
    assert books.findings() == [], "alone, the database looks whole"
    found = books.findings(*read_witness(tmp_path / "witness.jsonl"))
    assert found == ["audit entry 5, or one before it, was written anew (the witness)"]


def test_notary_signs_when_it_is_due_and_not_twice(books: Books) -> None:
    books.notary.tick()
    books.add(3)
    books.notary.tick()
    assert books.check().heads == 0
    books.add(1)
    books.notary.tick()
    books.notary.tick()
    assert (books.check().heads, books.check().signed) == (1, 4)
    books.add(1)
    books.notary.tick()
    assert books.check().heads == 1
    books.clock.seconds += 600
    books.notary.tick()
    assert (books.check().heads, books.check().signed) == (2, 5)


def test_witness_that_was_away_is_told_what_it_missed(tmp_path: Path) -> None:
    place = tmp_path / "away" / "witness.jsonl"
    books = Books(FileWitness(place))
    for _ in range(2):
        books.add(4)
        with pytest.raises(StorageError, match="witness"):
            books.notary.tick()
    place.parent.mkdir()
    books.notary.tick()
    assert [anchor.head.seq for anchor in read_witness(place)] == [4, 8]
    assert books.findings(*read_witness(place)) == []


@pytest.mark.parametrize("address", ["http://x/", "ftp://x/", "s3://x"])
def test_witness_at_another_kind_of_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError, match="witness"):
        open_witness(address)


def test_witness_file_with_a_line_that_is_no_head_names_it(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("{}\n")
    with pytest.raises(TrustError, match="line 1"):
        read_witness(tmp_path / "w")


def exported(books: Books, path: Path) -> None:
    with path.open("w") as out, books.database.read() as connection:
        heads, entries = load_heads(connection), load_audit(connection)
        write_export(out, about={"tenant": "t"}, keys=KEYS, entries=entries, heads=heads)


def _drop_last_entry(lines: list[str]) -> None:
    del lines[5]


def _flip(lines: list[str]) -> None:
    lines[2] = lines[2].replace('\\"number\\":1', '\\"number\\":2')


@pytest.mark.parametrize(
    ("touch", "said"),
    [
        (_drop_last_entry, ["audit entry 5 is missing (a signed head)"]),
        (_flip, ["audit entry 2 was changed"]),
    ],
)
def test_export_is_checked_without_the_database(
    books: Books, tmp_path: Path, touch: Callable[[list[str]], None], said: list[str]
) -> None:
    books.add(5)
    signed(books)
    exported(books, tmp_path / "export")
    assert check_export(tmp_path / "export").findings == []
    lines = (tmp_path / "export").read_text().splitlines()
    touch(lines)
    (tmp_path / "export").write_text("\n".join(lines))
    assert [finding.what for finding in check_export(tmp_path / "export").findings] == said


def test_export_of_somebody_else_is_not_believed_with_our_key(books: Books, tmp_path: Path) -> None:
    books.add(1)
    signed(books)
    exported(books, tmp_path / "export")
    other = SigningKey.generate()
    checked = check_export(tmp_path / "export", {other.key_id.hex(): ListedKey(other.verify_key)})
    assert ["not listed" in finding.what for finding in checked.findings] == [True]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "{",
        '{"entry":{}}',
        '{"head":{}}',
        '{"keys":{"a":["zz",0]}}',
        '{"keys":{"a":"00"}}',
        "[" * 10_000,
    ],
)
def test_export_with_a_line_that_is_none_names_it(tmp_path: Path, line: str) -> None:
    (tmp_path / "export").write_text(line + "\n")
    with pytest.raises(TrustError, match="line 1"):
        check_export(tmp_path / "export")


def test_keys_that_were_listed_stay_listed() -> None:
    keys = CloudKeys.from_seed(b"audit")
    repository = TufRepository(Artefacts.in_memory(), keys, SteppedClock())
    repository.init(online_keys=keys.online_json(tenant="t", fleet="f"))
    assert listed_keys(repository.audit_keys()) == {}
    for key in (KEY, keys.audit, KEY):
        list_key(repository, key)
    assert set(listed_keys(repository.audit_keys())) == {KEY.key_id.hex(), keys.audit.key_id.hex()}


def test_key_that_ended_signs_nothing_longer(books: Books) -> None:
    books.add(3)
    signed(books)
    books.add(2)
    signed(books)
    ended = {KEY.key_id.hex(): ListedKey(KEY.verify_key, 3)}
    with books.database.read() as connection:
        checked = check_chain(load_audit(connection), load_heads(connection), ended)
    assert checked.signed == 3
    assert ["which ended at 3" in finding.what for finding in checked.findings] == [True]


# ---- what is written into it -------------------------------------------------------------------------------


def entries_of(database: Database, kind: str) -> list[dict[str, object]]:
    with database.read() as connection:
        return [dict(entry.facts) for entry in load_audit(connection, kind=kind)]


def test_round_leaves_who_contributed_which_bytes() -> None:
    lab = Lab(3, rounds=2)
    lab.run()
    first, second = entries_of(lab.database, "round.folded")
    assert (first["run"], first["round"], second["round"]) == (RUN, 1, 2)
    assert first["head"] == second["base"]
    replies = first["replies"]
    assert isinstance(replies, list)
    assert sorted(reply["device"] for reply in replies) == ["d00", "d01", "d02"]
    assert all(len(reply["body"]) == 64 and reply["examples"] > 0 for reply in replies)


def release(connection: Connection, lab: Lab, version: int, number: int, head: str) -> None:
    row = ReleaseRow(
        version=version,
        graphs_sha256=lab.plan.manifest.graphs_sha256,
        checkpoint_sha256=head,
        int8_sha256="0" * 64,
        float32_sha256="0" * 64,
        run=RUN if number else "",
        round=number,
        created=lab.clock.now(),
    )
    insert_release(connection, row)


def test_lineage_names_rounds_devices_and_where_the_run_began() -> None:
    lab = Lab(3, rounds=3)
    lab.run()
    heads = [str(entry["head"]) for entry in entries_of(lab.database, "round.folded")]
    with lab.database.transaction() as connection:
        release(connection, lab, 1, 0, lab.initial.sha256.hex())
        release(connection, lab, 2, 2, heads[1])
    with lab.database.read() as connection:
        found = trace_lineage(connection, 2)
        origin = trace_lineage(connection, 1)
    (generation,) = found["generations"]
    assert [row["round"] for row in generation["rounds"]] == [1, 2], "the third came later"
    assert generation["began_with"]["release"] == 1
    assert [facts["device"] for facts in found["devices"]] == ["d00", "d01", "d02"]
    assert {facts["rounds"] for facts in found["devices"]} == {2}
    assert all(facts["since"] <= facts["first"] <= facts["until"] for facts in found["devices"])
    assert origin["generations"] == []
    with lab.database.read() as connection, pytest.raises(ConfigurationError, match="no release 9"):
        trace_lineage(connection, 9)


def test_enrolment_and_revocation_are_in_the_chain(deployment: Deployment) -> None:
    newcomer = Newcomer("watch")
    deployment.enrolment.enrol(newcomer.request(deployment.mint("watch")))
    deployment.registry.revoke("watch")
    with deployment.database.read() as connection:
        kinds = [entry.kind for entry in load_audit(connection)]
        text = json.dumps([entry.body for entry in load_audit(connection)])
    assert "device.enrolled" in kinds
    assert "device.revoked" in kinds
    assert "watch" not in text
