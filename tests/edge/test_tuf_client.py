"""The device's TUF client against the repository that the aggregator really writes, honest and attacked."""

from __future__ import annotations

import datetime
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root, TargetFile
from tuf.ngclient import Updater

from cloud_server.artefacts import Artefacts
from cloud_server.keys import CloudKeys
from cloud_server.release.tuf_repository import TufRepository
from edge_agent.release.fetcher import Fetcher, MemoryFetcher
from edge_agent.release.tuf_client import ReleaseInfo, check, clear_staging, download
from tests.edge.tiny_release import SteppedClock, graph_files, tiny_release
from wire.errors import ReleaseError, ShoalError, TransportError
from wire.manifest import CHECKPOINT, GRAPH_FILES, MANIFEST, RELEASE

KEYS = CloudKeys.from_seed(b"edge tuf tests")
ONLINE = KEYS.online_json(tenant="tenant", fleet="fleet")
DAY = 86_400.0


def hold_nothing(graphs_sha256: str) -> frozenset[str]:
    return frozenset()


@dataclass
class World:
    """A repository with one model, and a device that reads it through what a test may tamper with."""

    folder: Path
    clock: SteppedClock = field(default_factory=SteppedClock)
    repository: TufRepository = field(init=False)
    tamper: Callable[[str, bytes | None], bytes | None] = field(default=lambda path, data: data)
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.repository = TufRepository(Artefacts.in_memory(), KEYS, self.clock)
        self.repository.init(online_keys=ONLINE)
        self.publish(1)

    def publish(self, version: int, *, rollback: bool = False, model: str = "tiny") -> None:
        manifest, graphs = graph_files(model)
        self.repository.add_graphs(manifest.graphs_sha256, graphs)
        release, files = tiny_release(version, model=model)
        parameters = {k: v for k, v in files.items() if k not in graphs and k != RELEASE}
        self.repository.add_release(release, parameters)
        self.repository.set_ring("stable", version, rollback=rollback)

    def read(self, path: str) -> bytes | None:
        self.asked.append(path)
        return self.tamper(path, self.repository.read(path))

    def check(self, ring: str = "stable", folder: str = "tuf") -> ReleaseInfo:
        root = self.repository.first_root()
        return check(self.folder / folder, root, MemoryFetcher(self.read), ring, self.clock)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_check_reads_ring_and_online_keys(world: World) -> None:
    info = world.check()
    assert (info.release_version, info.rollback, info.serial) == (1, False, 1)
    assert (info.keys.tenant, info.keys.fleet) == ("tenant", "fleet")
    assert info.keys.orders == ((KEYS.order.key_id, KEYS.order.public_bytes),)
    kem = KEYS.kem[0]
    assert info.keys.kem == ((kem.key_id, kem.algorithm, kem.public_key.public_bytes),)


def test_check_of_a_ring_that_was_never_set_still_brings_keys(world: World) -> None:
    info = world.check(ring="canary")
    assert info.release_version == 0
    assert info.keys.kem


def test_download_brings_every_file_of_the_release(world: World) -> None:
    files = download(world.check(), held=hold_nothing)
    _, expected = tiny_release(1)
    assert {name: path.read_bytes() for name, path in files.items()} == expected


def test_download_leaves_out_what_is_held(world: World) -> None:
    manifest, _ = graph_files()
    asked_for: list[str] = []

    def held(graphs_sha256: str) -> frozenset[str]:
        asked_for.append(graphs_sha256)
        return frozenset(GRAPH_FILES)

    files = download(world.check(), held=held)
    assert asked_for == [manifest.graphs_sha256]
    assert not set(files) & set(GRAPH_FILES)
    assert MANIFEST in files


def test_next_release_costs_no_graph_download(world: World) -> None:
    download(world.check(), held=hold_nothing)
    world.publish(2)
    world.asked.clear()
    info = world.check()
    assert info.release_version == 2
    files = download(info, held=lambda sha: frozenset(GRAPH_FILES))
    assert files[CHECKPOINT].read_bytes() == tiny_release(2)[1][CHECKPOINT]
    assert not [path for path in world.asked if path.endswith(".onnx")]


def test_check_without_news_asks_for_two_files(world: World) -> None:
    world.check()
    world.asked.clear()
    world.check()
    metadata = [path for path in world.asked if path.startswith("/metadata/")]
    assert metadata == ["/metadata/2.root.json", "/metadata/timestamp.json"]


def test_broken_download_goes_on_where_it_stopped(world: World) -> None:
    info = world.check()
    ranges: list[tuple[str, int]] = []
    inner = info.session.fetcher

    class BreaksOnce:
        is_broken = False

        def fetch(self, path: str, *, offset: int = 0, limit_bytes: int) -> Iterator[bytes]:
            ranges.append((path, offset))
            data = b"".join(inner.fetch(path, offset=offset, limit_bytes=limit_bytes))
            if path.endswith("train_sgd.onnx") and not self.is_broken:
                self.is_broken = True
                yield data[:100]
                raise TransportError("the connection broke")
            yield data

    info.session.fetcher = BreaksOnce()
    with pytest.raises(TransportError):
        download(info, held=hold_nothing)
    files = download(info, held=hold_nothing)
    assert files["train_sgd.onnx"].read_bytes() == tiny_release(1)[1]["train_sgd.onnx"]
    assert [offset for path, offset in ranges if path.endswith("train_sgd.onnx")] == [0, 100]


@pytest.mark.parametrize("step", [1, 977])
def test_download_that_is_cut_at_any_byte_goes_on_there_in_the_next_process(world: World, step: int) -> None:
    """Each attempt is a session of its own, as each check is a process; all that it has is the folder."""
    expected = tiny_release(1)[1]
    whole = sum(map(len, expected.values()))
    first = [100, 101, whole // 2] if step == 1 else range(step, whole, step)
    fetched = attempts = 0
    cuts = iter(first)

    class DiesError(Exception):
        """As a process that is killed: nothing behind it runs."""

    class Cut:
        fetched_bytes_total = 0

        def __init__(self, inner: Fetcher, cut: int) -> None:
            self._inner = inner
            self._left = cut

        def fetch(self, path: str, *, offset: int = 0, limit_bytes: int) -> Iterator[bytes]:
            nonlocal fetched
            for piece in self._inner.fetch(path, offset=offset, limit_bytes=limit_bytes):
                given = piece[: self._left] if path.startswith("/targets/") else piece
                if path.startswith("/targets/"):
                    self._left -= len(given)
                    fetched += len(given)
                yield given
                if len(given) < len(piece):
                    raise DiesError

    while True:
        attempts += 1
        info = world.check()
        info.session.fetcher = Cut(info.session.fetcher, next(cuts, 10 * whole))
        try:
            files = download(info, held=hold_nothing)
            break
        except DiesError:
            continue
    assert {name: path.read_bytes() for name, path in files.items()} == expected
    assert attempts > 2
    assert fetched == whole, "no byte came twice"


def test_parts_of_a_release_that_was_never_finished_are_dropped_for_the_next(world: World) -> None:
    download(world.check(), held=hold_nothing)
    stale = {path.name for path in (world.folder / "tuf" / "targets").iterdir()}
    world.publish(2)
    files = download(world.check(), held=hold_nothing)
    left = {path.name for path in (world.folder / "tuf" / "targets").iterdir()}
    assert left == {path.name for path in files.values()}
    assert stale - left, "something of the first release is not part of the second"


def test_damaged_part_of_an_earlier_run_is_fetched_anew(world: World) -> None:
    info = world.check()
    expected = tiny_release(1)[1][CHECKPOINT]
    place = world.folder / "tuf" / "targets" / hashlib.sha256(expected).hexdigest()
    place.parent.mkdir(parents=True)
    place.write_bytes(b"\0" * 10)
    assert download(info, held=hold_nothing)[CHECKPOINT].read_bytes() == expected


def test_staging_is_cleared_but_the_metadata_stays(world: World) -> None:
    download(world.check(), held=hold_nothing)
    clear_staging(world.folder / "tuf")
    assert not (world.folder / "tuf" / "targets").exists()
    world.asked.clear()
    world.check()
    assert not [path for path in world.asked if "snapshot" in path]


def test_expiry_is_judged_by_our_clock(world: World) -> None:
    world.clock.seconds += 2 * DAY
    with pytest.raises(ReleaseError, match="expired"):
        world.check()
    world.repository.refresh()
    assert world.check().release_version == 1


def test_machine_clock_is_never_asked(world: World) -> None:
    """The repository's signatures all end in 2027; a device whose own clock stands there accepts them."""
    far = World(
        world.folder / "far", SteppedClock(datetime.datetime(2071, 1, 1, tzinfo=datetime.UTC).timestamp())
    )
    assert far.check().release_version == 1


def test_private_name_of_tuf_that_we_rely_on_is_there(world: World) -> None:
    updater = Updater(str(world.folder), "x://m/", bootstrap=world.repository.first_root(), fetcher=None)
    assert isinstance(updater._trusted_set.reference_time, datetime.datetime)


def replayed(world: World) -> Callable[[str, bytes | None], bytes | None]:
    """Serves everything as it is now, whatever is published later."""
    old = world.repository
    kept = {path: old.read(path) for path in ("/metadata/timestamp.json",)}
    return lambda path, data: kept.get(path, data)


def test_rollback_of_the_whole_repository_is_refused(world: World) -> None:
    old = replayed(world)
    world.publish(2)
    assert world.check().release_version == 2
    world.tamper = old
    with pytest.raises(ReleaseError):
        world.check()


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "parameters", "rings", "keys"])
def test_flipped_bit_in_metadata_is_refused(world: World, role: str) -> None:
    def flip(path: str, data: bytes | None) -> bytes | None:
        if data is None or not path.endswith(f"{role}.json") or "/metadata/" not in path:
            return data
        middle = data.index(b'"version":') + 10
        return data[:middle] + b"9" + data[middle + 1 :]

    world.tamper = flip
    with pytest.raises(ReleaseError):
        download(world.check(), held=hold_nothing)


@pytest.mark.parametrize(
    "name", [RELEASE, CHECKPOINT, MANIFEST, "template.onnx", "online.json", "stable.json"]
)
@pytest.mark.parametrize("change", ["same length", "longer", "shorter", "missing"])
def test_other_bytes_in_a_target_are_refused(world: World, name: str, change: str) -> None:
    def tamper(path: str, data: bytes | None) -> bytes | None:
        if data is None or not path.startswith("/targets/") or not path.endswith(name):
            return data
        changed = {"same length": b"x" * len(data), "longer": data + b"x" * 10_000, "shorter": data[:-1]}
        return changed.get(change)

    world.tamper = tamper
    with pytest.raises(ShoalError):
        download(world.check(), held=hold_nothing)
    world.tamper = lambda path, data: data
    files = download(world.check(), held=hold_nothing)
    assert {key: path.read_bytes() for key, path in files.items()} == tiny_release(1)[1]


def test_endless_metadata_is_refused(world: World) -> None:
    world.tamper = lambda path, data: b"{" * 5_000_000 if path.endswith("timestamp.json") else data
    with pytest.raises(ShoalError):
        world.check()


def test_online_keys_cannot_ship_a_graph(world: World) -> None:
    """Whoever holds every online key lists a new graph in a delegated role: no device looks for it there."""
    manifest, graphs = graph_files("evil")
    _, files = tiny_release(2, model="evil")
    repository = world.repository
    stolen = repository._load()  # the attacker holds the keys: it may write what it wants
    for path, data in {f"graphs/{manifest.graphs_sha256}/{k}": v for k, v in graphs.items()}.items():
        stolen.targets["parameters"].targets[path] = TargetFile.from_data(path, data, ["sha256"])
    repository._add_files(
        stolen, "parameters", {f"parameters/2/{k}": v for k, v in files.items() if k not in graphs}
    )
    repository._publish(stolen, {"parameters"})
    repository.set_ring("stable", 2)
    with pytest.raises(ReleaseError, match="names no graphs/"):
        download(world.check(), held=hold_nothing)


def test_ring_file_of_another_ring_is_refused(world: World) -> None:
    repository = world.repository
    repository._change(
        lambda current: repository._add_files(
            current,
            "rings",
            {"rings/stable.json": b'{"release_version":1,"ring":"canary","rollback":false,"serial":9}'},
            is_replacing=True,
        )
    )
    with pytest.raises(ReleaseError, match="ring canary"):
        world.check()


def test_release_under_another_version_is_refused(world: World) -> None:
    repository = world.repository
    _, files = tiny_release(1)
    moved = {f"parameters/7/{name}": files[name] for name in files}
    repository._change(lambda current: repository._add_files(current, "parameters", moved))
    repository.set_ring("stable", 7)
    with pytest.raises(ReleaseError, match="holds release 1"):
        download(world.check(), held=hold_nothing)


def test_online_key_under_a_foreign_id_is_refused(world: World) -> None:
    data = ONLINE.replace(KEYS.order.key_id.hex().encode(), b"00" * 8)
    world.repository.set_online_keys(data)
    with pytest.raises(ReleaseError, match="another key's id"):
        world.check()


def test_rotated_online_keys_are_read(world: World) -> None:
    world.check()
    newer = replace(KEYS, order=CloudKeys.from_seed(b"other").order)
    world.repository.set_online_keys(newer.online_json(tenant="tenant", fleet="fleet"))
    assert world.check().keys.orders == ((newer.order.key_id, newer.order.public_bytes),)


def test_new_root_with_one_share_of_two_is_refused(world: World) -> None:
    root = Metadata[Root].from_bytes(world.repository.first_root()).signed
    root.version = 2
    intruder = CryptoSigner.generate_ed25519()
    root.add_key(intruder.public_key, "targets")
    forged = Metadata(root)
    forged.sign(intruder)
    world.tamper = lambda path, data: forged.to_bytes() if path == "/metadata/2.root.json" else data
    with pytest.raises(ReleaseError):
        world.check()


def test_signed_rollback_is_told(world: World) -> None:
    world.publish(2)
    world.check()
    world.repository.set_ring("stable", 1, rollback=True)
    info = world.check()
    assert (info.release_version, info.rollback, info.serial) == (1, True, 3)


def test_no_connection_is_a_transport_error(world: World) -> None:
    class Dead:
        def fetch(self, path: str, *, offset: int = 0, limit_bytes: int) -> Iterator[bytes]:
            raise TransportError("no route")

    with pytest.raises(TransportError):
        check(world.folder / "tuf", world.repository.first_root(), Dead(), "stable", world.clock)


def test_root_that_is_not_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError):
        check(tmp_path, b"{}", MemoryFetcher({}), "stable", SteppedClock())


def test_import_of_the_client_does_not_load_tuf() -> None:
    code = "import sys, edge_agent.release.tuf_client; sys.exit(any(n.split('.')[0] == 'tuf' for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
