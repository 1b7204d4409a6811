"""The signed repository, read by tuf's own client: what is published verifies, and nothing ever goes back."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tuf.api.exceptions import DownloadHTTPError, ExpiredMetadataError
from tuf.api.metadata import Metadata, Snapshot
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface

from cloud_server.artefacts import Artefacts
from cloud_server.keys import CloudKeys
from cloud_server.release.tuf_repository import TufRepository
from cloud_server.release.tuf_signing import TufExpiry
from tests.cloud.deployment import SteppedClock
from wire.errors import ConfigurationError, ReleaseError, StorageError
from wire.manifest import FileRef, Release

KEYS = CloudKeys.from_seed(b"tuf tests")
GRAPHS = "ab" * 32
DAY = 86_400.0


class RepositoryFetcher(FetcherInterface):
    """tuf's client reads straight from the repository's bytes."""

    def __init__(self, repository: TufRepository) -> None:
        self._repository = repository

    def _fetch(self, url: str) -> Iterator[bytes]:
        data = self._repository.read(url.removeprefix("https://x"))
        if data is None:
            raise DownloadHTTPError("not found", 404)
        return iter([data])


class Device:
    """tuf's own client with its own trusted folder."""

    def __init__(self, folder: Path, root: bytes, clock: SteppedClock) -> None:
        self._folder, self._root, self._clock = folder, root, clock
        for name in ("metadata", "targets"):
            (folder / name).mkdir(parents=True)

    def get(self, repository: TufRepository, path: str) -> bytes | None:
        updater = Updater(
            str(self._folder / "metadata"),
            "https://x/metadata/",
            str(self._folder / "targets"),
            "https://x/targets/",
            fetcher=RepositoryFetcher(repository),
            config=UpdaterConfig(prefix_targets_with_hash=True),
            bootstrap=self._root,
        )
        now = datetime.datetime.fromtimestamp(self._clock.now(), tz=datetime.UTC)
        updater._trusted_set.reference_time = now
        info = updater.get_targetinfo(path)
        return None if info is None else Path(updater.download_target(info)).read_bytes()


def release(version: int, data: bytes = b"checkpoint") -> Release:
    digest = hashlib.sha256(data).hexdigest()
    return Release(
        version=version,
        graphs_sha256=GRAPHS,
        checkpoint_sha256=digest,
        int8_sha256="cd" * 32,
        float32_sha256="ef" * 32,
        golden_inputs=FileRef.of("golden_inputs.bin", b"i"),
        golden_outputs=FileRef.of("golden_outputs.bin", b"o"),
    )


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


@pytest.fixture
def store() -> Artefacts:
    return Artefacts.in_memory()


@pytest.fixture
def repository(store: Artefacts, clock: SteppedClock) -> TufRepository:
    made = TufRepository(store, KEYS, clock)
    made.init(online_keys=b'{"kem":[]}')
    return made


@pytest.fixture
def device(tmp_path: Path, repository: TufRepository, clock: SteppedClock) -> Device:
    return Device(tmp_path / "device", repository.first_root(), clock)


def publish(repository: TufRepository, version: int, data: bytes = b"checkpoint") -> None:
    repository.add_graphs(GRAPHS, {"manifest.json": b"{}", "template.onnx": b"graph"})
    repository.add_release(release(version, data), {"checkpoint.bin": data})
    repository.set_ring("stable", version)


def ring_of(device: Device, repository: TufRepository) -> dict[str, object]:
    data = device.get(repository, "rings/stable.json")
    assert data is not None
    value = json.loads(data)
    assert isinstance(value, dict)
    return value


def test_device_reads_what_was_published(repository: TufRepository, device: Device) -> None:
    publish(repository, 1)
    assert device.get(repository, "keys/online.json") == b'{"kem":[]}'
    assert device.get(repository, f"graphs/{GRAPHS}/template.onnx") == b"graph"
    assert device.get(repository, "parameters/1/checkpoint.bin") == b"checkpoint"
    assert device.get(repository, "parameters/1/release.json") == release(1).to_bytes()
    assert ring_of(device, repository) == {
        "ring": "stable",
        "release_version": 1,
        "rollback": False,
        "serial": 1,
    }
    assert device.get(repository, "parameters/2/release.json") is None


def test_device_follows_later_releases(repository: TufRepository, device: Device) -> None:
    for version in (1, 2, 3):
        publish(repository, version, b"parameters %d" % version)
        assert ring_of(device, repository)["release_version"] == version
        assert device.get(repository, f"parameters/{version}/checkpoint.bin") == b"parameters %d" % version


def test_repository_is_its_store_alone(
    repository: TufRepository, store: Artefacts, clock: SteppedClock
) -> None:
    publish(repository, 1)
    again = TufRepository(store, KEYS, clock)
    publish(again, 2)
    assert repository.ring("stable") == (2, 2)
    assert repository.releases() == [1, 2]


def test_publication_of_the_same_changes_nothing(repository: TufRepository) -> None:
    publish(repository, 1)
    before = repository.timestamp()
    repository.add_graphs(GRAPHS, {"manifest.json": b"{}", "template.onnx": b"graph"})
    repository.add_release(release(1), {"checkpoint.bin": b"checkpoint"})
    assert repository.timestamp() == before


def test_release_with_other_bytes_is_refused(repository: TufRepository) -> None:
    publish(repository, 1)
    before = repository.timestamp()
    with pytest.raises(ReleaseError, match="other bytes"):
        repository.add_release(release(1), {"checkpoint.bin": b"other"})
    with pytest.raises(ReleaseError, match="other bytes"):
        repository.add_graphs(GRAPHS, {"template.onnx": b"another graph"})
    assert repository.timestamp() == before


def test_release_for_unsigned_graphs_is_refused(repository: TufRepository) -> None:
    with pytest.raises(ReleaseError, match="never signed"):
        repository.add_release(release(1), {"checkpoint.bin": b"x"})


def test_ring_goes_back_only_by_a_rollback(repository: TufRepository, device: Device) -> None:
    publish(repository, 1)
    publish(repository, 2, b"two")
    with pytest.raises(ReleaseError, match="newer than 1"):
        repository.set_ring("stable", 1)
    assert repository.set_ring("stable", 1, rollback=True) == 3
    assert ring_of(device, repository) == {
        "ring": "stable",
        "release_version": 1,
        "rollback": True,
        "serial": 3,
    }


def test_ring_of_an_unknown_release_is_refused(repository: TufRepository) -> None:
    with pytest.raises(ReleaseError, match="no signed release 7"):
        repository.set_ring("stable", 7)


def test_expired_timestamp_is_refused_until_it_is_refreshed(
    repository: TufRepository, device: Device, clock: SteppedClock
) -> None:
    publish(repository, 1)
    clock.seconds += 1.5 * DAY
    with pytest.raises(ExpiredMetadataError):
        device.get(repository, "rings/stable.json")
    repository.refresh()
    assert ring_of(device, repository)["release_version"] == 1


def test_refresh_signs_only_what_is_due(repository: TufRepository, clock: SteppedClock) -> None:
    before = repository.expiries()
    clock.seconds += 0.4 * DAY
    assert not repository.refresh()
    assert repository.expiries() == before
    clock.seconds += 0.2 * DAY
    assert repository.refresh()
    after = repository.expiries()
    assert {role for role in after if after[role] != before[role]} == {"timestamp"}
    clock.seconds += 31 * DAY
    assert repository.refresh()
    later = repository.expiries()
    assert {role for role in later if later[role] == before[role]} == {"root", "targets"}


def test_fleet_that_is_refreshed_daily_never_expires_but_for_offline_roles(
    repository: TufRepository, device: Device, clock: SteppedClock
) -> None:
    publish(repository, 1)
    for _ in range(120):
        clock.seconds += 0.9 * DAY
        repository.refresh()
    assert ring_of(device, repository)["release_version"] == 1


def test_set_without_offline_keys_releases_but_signs_no_graph(
    repository: TufRepository, store: Artefacts, clock: SteppedClock, device: Device
) -> None:
    publish(repository, 1)
    online = TufRepository(store, replace(KEYS, root=(), targets=None), clock)
    online.add_release(release(2, b"two"), {"checkpoint.bin": b"two"})
    online.set_ring("stable", 2)
    online.refresh()
    assert ring_of(device, online)["release_version"] == 2
    with pytest.raises(ConfigurationError, match="targets key"):
        online.add_graphs("cd" * 32, {"manifest.json": b"{}"})
    assert device.get(online, "parameters/2/checkpoint.bin") == b"two"


def test_parameters_role_cannot_sign_a_graph(
    repository: TufRepository, store: Artefacts, clock: SteppedClock, device: Device
) -> None:
    publish(repository, 1)
    thief = TufRepository(store, KEYS, clock)
    thief._change(
        lambda current: thief._add_files(current, "parameters", {f"graphs/{GRAPHS}/evil.onnx": b"evil"})
    )
    assert device.get(thief, f"graphs/{GRAPHS}/evil.onnx") is None


def test_writer_that_dies_at_any_write_leaves_a_whole_set(tmp_path: Path, clock: SteppedClock) -> None:
    """Every prefix of one publication's writes is a repository that verifies, and the next one goes on."""
    died_at = 0
    while True:
        store = Artefacts.in_memory()
        repository = TufRepository(store, KEYS, clock)
        repository.init(online_keys=b"{}")
        publish(repository, 1)
        dying = TufRepository(_DyingStore(store, died_at), KEYS, clock)  # type: ignore[arg-type]
        try:
            publish(dying, 2, b"two")
            break
        except StorageError:
            device = Device(tmp_path / str(died_at), repository.first_root(), clock)
            assert ring_of(device, repository)["release_version"] == 1
            publish(TufRepository(store, KEYS, clock), 2, b"two")
            assert ring_of(device, repository)["release_version"] == 2
            assert device.get(repository, "parameters/2/checkpoint.bin") == b"two"
        died_at += 1
    assert died_at == 9  # three target files, and role, snapshot and timestamp twice


class _DyingStore:
    """The real store until its n-th write."""

    def __init__(self, store: Artefacts, writes: int) -> None:
        self._store, self._left = store, writes

    def _count(self) -> None:
        if self._left == 0:
            raise StorageError("the machine died")
        self._left -= 1

    def write(self, key: str, data: bytes) -> None:
        self._count()
        self._store.write(key, data)

    def write_new(self, key: str, data: bytes) -> None:
        self._count()
        self._store.write_new(key, data)

    def read(self, key: str) -> bytes | None:
        return self._store.read(key)

    def size(self, key: str) -> int | None:
        return self._store.size(key)


def test_old_releases_leave_the_metadata_but_not_those_in_a_ring(
    store: Artefacts, clock: SteppedClock
) -> None:
    repository = TufRepository(store, KEYS, clock, keep_releases=3)
    repository.init(online_keys=b"{}")
    publish(repository, 1)
    repository.set_ring("canary", 1)
    for version in range(2, 8):
        publish(repository, version, b"%d" % version)
    assert repository.releases() == [1, 5, 6, 7]


def test_versions_never_repeat_in_a_snapshot(repository: TufRepository, store: Artefacts) -> None:
    for version in (1, 2):
        publish(repository, version, b"%d" % version)
    names = [key for key in store.keys("tuf/metadata") if key.endswith(".snapshot.json")]
    metas = [Metadata[Snapshot].from_bytes(store.read(name) or b"").signed for name in names]
    metas.sort(key=lambda snapshot: snapshot.version)
    for role in metas[0].meta:
        versions = [snapshot.meta[role].version for snapshot in metas]
        assert versions == sorted(versions)


def test_init_twice_is_refused(repository: TufRepository) -> None:
    with pytest.raises(ConfigurationError, match="already"):
        repository.init(online_keys=b"{}")


def test_init_with_one_root_share_is_refused(store: Artefacts, clock: SteppedClock) -> None:
    repository = TufRepository(store, replace(KEYS, root=KEYS.root[:1]), clock)
    with pytest.raises(ConfigurationError, match="root shares"):
        repository.init(online_keys=b"{}")
    assert not repository.is_initialised()


def test_use_before_init_says_what_to_do(store: Artefacts, clock: SteppedClock) -> None:
    with pytest.raises(ReleaseError) as caught:
        TufRepository(store, KEYS, clock).set_ring("stable", 1)
    assert "shoal-cloud init" in caught.value.hint


def test_one_seed_and_clock_give_the_same_bytes() -> None:
    def make() -> list[bytes | None]:
        store = Artefacts.in_memory()
        repository = TufRepository(store, CloudKeys.from_seed(b"s"), SteppedClock(5.0), expiry=TufExpiry())
        repository.init(online_keys=b"{}")
        publish(repository, 1)
        return [store.read(key) for key in store.keys("tuf")]

    assert make() == make()


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "timestamp.json",
        "/metadata/../keys",
        "metadata//x",
        "blobs/x",
        "/metadata/%2e",
        "targets/a b",
    ],
)
def test_read_of_a_path_that_is_not_tufs_finds_nothing(repository: TufRepository, path: str) -> None:
    assert repository.read(path) is None


def test_keys_are_listed_anew(repository: TufRepository, device: Device) -> None:
    repository.set_online_keys(b'{"kem":["new"]}')
    assert device.get(repository, "keys/online.json") == b'{"kem":["new"]}'
