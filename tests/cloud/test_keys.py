"""The aggregator's keys: made once, readable by their owner only, offline ones may be away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloud_server.keys import CloudKeys, init_keys
from wire.errors import ConfigurationError, StorageError


def _all_private(keys: CloudKeys) -> list[bytes]:
    online = (keys.parameters, keys.keys, keys.rings, keys.snapshot, keys.timestamp, keys.order, keys.audit)
    kem = [key.private_bytes() for key in keys.kem]
    assert keys.targets is not None
    return [key.private_bytes() for key in (*keys.root, keys.targets, *online)] + kem


def test_keys_are_read_as_they_were_made(tmp_path: Path) -> None:
    made = init_keys(tmp_path / "keys")
    assert _all_private(CloudKeys.load(tmp_path / "keys")) == _all_private(made)
    assert len(set(_all_private(made))) == 12


def test_key_files_are_for_their_owner_only(tmp_path: Path) -> None:
    init_keys(tmp_path / "keys")
    files = [path for path in (tmp_path / "keys").rglob("*") if path.is_file()]
    assert len(files) == 12
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    init_keys(tmp_path / "keys")
    with pytest.raises(ConfigurationError, match="already"):
        init_keys(tmp_path / "keys")


def test_keys_without_the_offline_ones_still_load(tmp_path: Path) -> None:
    init_keys(tmp_path / "keys")
    (tmp_path / "keys" / "offline").rename(tmp_path / "safe")
    keys = CloudKeys.load(tmp_path / "keys")
    assert keys.root == ()
    assert keys.targets is None


@pytest.mark.parametrize("name", ["order", "timestamp", "kem-1"])
def test_online_key_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    init_keys(tmp_path / "keys")
    (tmp_path / "keys" / "online" / f"{name}.key").unlink()
    with pytest.raises(StorageError, match=r"KEM key|missing"):
        CloudKeys.load(tmp_path / "keys")


def test_audit_key_that_is_lost_is_replaced_once(tmp_path: Path) -> None:
    made = init_keys(tmp_path / "keys")
    (tmp_path / "keys" / "online" / "audit.key").unlink()
    fresh = CloudKeys.load(tmp_path / "keys").audit
    assert fresh.public_bytes != made.audit.public_bytes
    assert CloudKeys.load(tmp_path / "keys").audit.public_bytes == fresh.public_bytes


@pytest.mark.parametrize(
    "content", [b"", b"ed25519", b"ed25519 zz", b"ed25519 00", b"\xff\xfe", b"rsa " + b"00" * 32]
)
def test_key_file_that_is_damaged_is_named(tmp_path: Path, content: bytes) -> None:
    init_keys(tmp_path / "keys")
    (tmp_path / "keys" / "online" / "order.key").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"order\.key"):
        CloudKeys.load(tmp_path / "keys")


def test_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    init_keys(tmp_path / "keys")
    (tmp_path / "keys" / "online" / "order.key").chmod(0o644)
    with pytest.raises(ConfigurationError, match="others"):
        CloudKeys.load(tmp_path / "keys")


def test_newest_kem_key_is_first(tmp_path: Path) -> None:
    first = init_keys(tmp_path / "keys").kem[0]
    for number in (2, 10):
        path = tmp_path / "keys" / "online" / f"kem-{number}.key"
        path.write_text(f"x25519 {number:064x}\n")
        path.chmod(0o600)
    keys = CloudKeys.load(tmp_path / "keys")
    assert [key.private_bytes()[-1] for key in keys.kem[:2]] == [10, 2]
    assert keys.kem[2].private_bytes() == first.private_bytes()


def test_keys_of_one_seed_are_the_same() -> None:
    assert _all_private(CloudKeys.from_seed(b"7")) == _all_private(CloudKeys.from_seed(b"7"))
    assert not set(_all_private(CloudKeys.from_seed(b"7"))) & set(_all_private(CloudKeys.from_seed(b"8")))


@pytest.mark.parametrize("algorithm", ["x25519", "mlkem768-x25519"])
def test_online_json_lists_public_keys_only(tmp_path: Path, algorithm: str) -> None:
    keys = init_keys(tmp_path / "keys", kem_algorithm=algorithm)
    listed = json.loads(keys.online_json(tenant="t", fleet="f"))
    assert listed["tenant"] == "t"
    assert listed["fleet"] == "f"
    assert listed["kem"] == [
        {
            "algorithm": algorithm,
            "id": keys.kem[0].key_id.hex(),
            "public": keys.kem[0].public_key.public_bytes.hex(),
        }
    ]
    assert listed["orders"] == [{"id": keys.order.key_id.hex(), "public": keys.order.public_bytes.hex()}]


def test_init_keys_with_an_unknown_algorithm_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="rot13"):
        init_keys(tmp_path / "keys", kem_algorithm="rot13")
    assert not (tmp_path / "keys").exists()
