"""The artefact store, over memory, a folder and S3: whole writes, names checked, damage found."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloud_server.artefacts import Artefacts, blob_key
from tests.cloud.s3_server import BUCKET, S3Server
from wire.errors import ConfigurationError, StorageError

DATA = b"parameters" * 100


@pytest.fixture(scope="module")
def bucket() -> Iterator[S3Server]:
    pytest.importorskip("moto", reason="needs moto: pip install 'shoal[dev]'")
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture(params=["memory", "folder", "s3"])
def artefacts(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artefacts:
    if request.param == "memory":
        return Artefacts.in_memory()
    if request.param == "folder":
        return Artefacts.open(f"file://{tmp_path}/artefacts")
    request.getfixturevalue("bucket").credentials.put_into(monkeypatch)
    return Artefacts.open(f"s3://{BUCKET}/{tmp_path.name}")


def test_blob_comes_back_under_its_hash(artefacts: Artefacts) -> None:
    digest = artefacts.put_blob(DATA)
    assert digest == hashlib.sha256(DATA).hexdigest()
    assert artefacts.put_blob(DATA) == digest
    assert artefacts.get_blob(digest) == DATA
    assert artefacts.size(blob_key(digest)) == len(DATA)
    assert artefacts.read_range(blob_key(digest), 5, 12) == DATA[5:12]


def test_blob_that_is_damaged_is_found(artefacts: Artefacts) -> None:
    digest = artefacts.put_blob(DATA)
    artefacts.write(blob_key(digest), DATA[:-1] + b"S")
    with pytest.raises(StorageError, match="damaged"):
        artefacts.get_blob(digest)


def test_blob_that_is_missing_says_so(artefacts: Artefacts) -> None:
    digest = artefacts.put_blob(DATA)
    artefacts.delete_blob(digest)
    artefacts.delete_blob(digest)
    with pytest.raises(StorageError) as caught:
        artefacts.get_blob(digest)
    assert caught.value.facts["is_missing"]
    assert artefacts.size(blob_key(digest)) is None


def test_file_written_new_never_changes(artefacts: Artefacts) -> None:
    artefacts.write_new("tuf/metadata/1.root.json", b"one")
    artefacts.write_new("tuf/metadata/1.root.json", b"one")
    with pytest.raises(StorageError, match="other bytes"):
        artefacts.write_new("tuf/metadata/1.root.json", b"two")
    assert artefacts.read("tuf/metadata/1.root.json") == b"one"


def test_file_is_replaced_and_listed(artefacts: Artefacts) -> None:
    artefacts.write("tuf/timestamp.json", b"one")
    artefacts.write("tuf/timestamp.json", b"two")
    artefacts.write("other/x", b"")
    assert artefacts.read("tuf/timestamp.json") == b"two"
    assert list(artefacts.keys("tuf")) == ["tuf/timestamp.json"]
    artefacts.delete("tuf/timestamp.json")
    assert artefacts.read("tuf/timestamp.json") is None


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".hidden", "a b", "a\0b", "x" * 600]
)
def test_file_with_a_bad_name_is_refused(artefacts: Artefacts, key: str) -> None:
    for call in (artefacts.read, artefacts.size, artefacts.delete, lambda k: artefacts.write(k, b"")):
        with pytest.raises(StorageError):
            call(key)


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "AB" * 32, "ab" * 31])
def test_blob_with_a_bad_name_is_refused(artefacts: Artefacts, sha256: str) -> None:
    with pytest.raises(StorageError):
        artefacts.get_blob(sha256)


def test_folder_survives_its_process(tmp_path: Path) -> None:
    digest = Artefacts.in_folder(tmp_path / "a").put_blob(DATA)
    assert Artefacts.in_folder(tmp_path / "a").get_blob(digest) == DATA
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


def test_folder_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digest = Artefacts.in_folder(Path("a")).put_blob(DATA)
    assert Artefacts.in_folder(tmp_path / "a").get_blob(digest) == DATA


def test_folder_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(StorageError):
        Artefacts.in_folder(tmp_path / "a")


def test_url_that_names_no_store_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Artefacts.open("nosuch://x")
