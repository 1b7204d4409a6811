"""What the literature's attackers do to a repository, one test each: the device's client refuses, and goes on after it.

Sources: TUF specification 1.0.33, clause 1.5.2 (attacks); the device runs `tuf_client` against the repository that the
aggregator writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Root, TargetFile, Targets

from cloud_server.artefacts import Artefacts
from cloud_server.keys import CloudKeys
from cloud_server.release.tuf_repository import TufRepository
from cloud_server.release.tuf_signing import FileSigner, public_key
from edge_agent.release.fetcher import MemoryFetcher
from edge_agent.release.tuf_client import check, download
from tests.edge.tiny_release import SteppedClock, graph_files, tiny_release
from wire.errors import ReleaseError, ShoalError
from wire.manifest import CHECKPOINT, RELEASE, TEMPLATE
from wire.primitives import SigningKey

DAY = 86_400.0
ONLINE = ("timestamp", "snapshot", "parameters", "rings", "keys")
Served = Callable[[str], bytes | None]


class Attacked:
    """A repository with release 1, a device that runs what its ring says, and somebody in between."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = SteppedClock()
        self.keys = CloudKeys.from_seed(b"attacked")
        self.store = Artefacts.in_memory()
        self.repository = TufRepository(self.store, lambda: self.keys, self.clock)
        self.repository.init(online_keys=self.keys.online_json(tenant="t", fleet="f"))
        self.root = self.repository.first_root()
        self.release(1)

    def release(self, version: int, *, rollback: bool = False) -> None:
        manifest, graphs = graph_files()
        release, files = tiny_release(version)
        self.repository.add_graphs(manifest.graphs_sha256, graphs)
        parameters = {name: data for name, data in files.items() if name not in graphs and name != RELEASE}
        self.repository.add_release(release, parameters)
        self.repository.set_ring("stable", version, rollback=rollback)

    def served(self) -> dict[str, bytes]:
        """Everything that is published now, by the path that a device asks for."""
        return _served(self.store)

    def update(self, served: Served | None = None, *, device: str = "device") -> int:
        """One check of a device with all its downloads; the release that it would run."""
        fetcher = MemoryFetcher(served or self.repository.read)
        info = check(self.folder / device, self.root, fetcher, "stable", self.clock)
        download(info, held=lambda graphs: frozenset())
        return info.release_version

    def refused(self, served: Served, *, device: str = "device", says: str = "does not verify") -> None:
        """The attack fails with our error, and the honest repository still works for the same device."""
        with pytest.raises(ShoalError, match=says):
            self.update(served, device=device)
        assert self.update(device=device) == self.repository.ring("stable")[0]


@pytest.fixture
def attacked(tmp_path: Path) -> Attacked:
    return Attacked(tmp_path)


def test_rollback_attack_a_replay_of_yesterdays_whole_repository(attacked: Attacked) -> None:
    assert attacked.update() == 1
    yesterday = attacked.served()
    attacked.release(2)
    assert attacked.update() == 2
    attacked.refused(yesterday.get)


def test_rollback_attack_a_replay_of_yesterdays_ring_statement(attacked: Attacked) -> None:
    """Whoever serves files may not choose among statements that were signed at different times."""
    attacked.update()
    yesterday = attacked.served()
    attacked.release(2)
    old = {path: data for path, data in yesterday.items() if "rings" in path}
    assert old
    today = attacked.served()
    newest = max((path for path in today if path.endswith(".rings.json")), key=lambda path: int(path[10:-11]))
    old[newest] = max((path, data) for path, data in old.items() if path.endswith(".rings.json"))[1]
    attacked.refused({**today, **old}.get)


def test_freeze_attack_the_same_repository_for_ever(attacked: Attacked) -> None:
    attacked.update()
    frozen = attacked.served()
    attacked.release(2)
    attacked.clock.seconds += 2 * DAY
    attacked.repository.refresh()
    attacked.refused(frozen.get, says="expired")


def test_mix_and_match_attack_an_old_timestamp_with_the_new_rest(attacked: Attacked) -> None:
    old = attacked.served()["/metadata/timestamp.json"]
    attacked.release(2)
    attacked.update()
    attacked.refused({**attacked.served(), "/metadata/timestamp.json": old}.get)


def test_mix_and_match_attack_a_new_timestamp_with_an_old_snapshot(attacked: Attacked) -> None:
    attacked.update()
    before = attacked.served()
    attacked.release(2)
    snapshots = {path: data for path, data in before.items() if path.endswith(".snapshot.json")}
    oldest = snapshots[min(snapshots)]
    mixed = {
        path: oldest if path.endswith(".snapshot.json") else data for path, data in attacked.served().items()
    }
    attacked.refused(mixed.get)


def test_wrong_software_attack_other_bytes_of_the_same_length(attacked: Attacked) -> None:
    served = attacked.served()
    path = next(path for path in served if path.endswith(f".{TEMPLATE}"))
    attacked.refused({**served, path: bytes(len(served[path]))}.get)


def test_endless_data_attack_on_a_target(attacked: Attacked) -> None:
    served = attacked.served()
    path = next(path for path in served if path.endswith(f".{CHECKPOINT}"))
    attacked.refused({**served, path: served[path] + b"A" * 10_000_000}.get, says="longer than allowed")


def test_endless_data_attack_on_metadata(attacked: Attacked) -> None:
    flood = b"{" * 10_000_000
    for name in ("timestamp.json", "2.root.json"):
        attacked.refused({**attacked.served(), f"/metadata/{name}": flood}.get, says="longer than allowed")


def test_fast_forward_attack_by_whoever_has_no_key(attacked: Attacked) -> None:
    """Versions that were never signed: a device must not remember them, or it would refuse the honest ones."""
    served = attacked.served()
    forged = served["/metadata/timestamp.json"].replace(b'"version":', b'"version":9', 1)
    attacked.refused({**served, "/metadata/timestamp.json": forged}.get)


def test_fast_forward_attack_by_a_stolen_key_ends_with_the_keys_rotation(attacked: Attacked) -> None:
    payload = attacked.repository._load().timestamp
    payload.version = 2**40
    forged = Metadata(payload)
    forged.sign(FileSigner(attacked.keys.timestamp))
    assert attacked.update({**attacked.served(), "/metadata/timestamp.json": forged.to_bytes()}.get) == 1
    with pytest.raises(ReleaseError):
        attacked.update()
    _rotate(attacked, "timestamp")
    attacked.release(2)
    assert attacked.update() == 2


def test_extraneous_dependencies_attack_a_graph_in_a_delegated_role(attacked: Attacked) -> None:
    """Whoever holds every online key cannot have a device load a graph that the offline key did not sign."""
    manifest, graphs = graph_files("evil")
    _, files = tiny_release(2, model="evil")
    repository = attacked.repository
    stolen = repository._load()
    named = {f"graphs/{manifest.graphs_sha256}/{name}": data for name, data in graphs.items()}
    parameters = {f"parameters/2/{name}": data for name, data in files.items() if name not in graphs}
    for path, data in named.items():
        stolen.targets["parameters"].targets[path] = TargetFile.from_data(path, data, ["sha256"])
    repository._add_files(stolen, "parameters", parameters)
    repository._publish(stolen, {"parameters"})
    repository.set_ring("stable", 2)
    with pytest.raises(ReleaseError, match="names no graphs/"):
        attacked.update()
    repository.set_ring("stable", 1, rollback=True)
    assert attacked.update() == 1


def test_stolen_online_keys_cannot_sign_top_level_targets(attacked: Attacked) -> None:
    """Timestamp and snapshot are the attacker's, and so is a targets role with a model of his own."""
    evil = b"evil graph"
    his = replace(attacked.keys, targets=SigningKey.generate())
    store = Artefacts.in_memory()
    repository = TufRepository(store, his, attacked.clock)
    repository.init(online_keys=b"{}")
    repository.add_graphs("ab" * 32, {"manifest.json": evil})
    served = {path: data for path, data in _served(store).items() if not path.endswith("root.json")}
    attacked.refused({**served, "/metadata/1.root.json": attacked.root}.get)
    attacked.refused({**served, "/metadata/1.root.json": attacked.root}.get, device="fresh")


@pytest.mark.parametrize("role", ["root", "targets"])
def test_one_stolen_root_share_of_three_makes_no_root(attacked: Attacked, role: str) -> None:
    root = Metadata[Root].from_bytes(attacked.root).signed
    root.version = 2
    root.add_key(public_key(SigningKey.generate()), role)
    forged = Metadata(root)
    forged.sign(FileSigner(attacked.keys.root[0]))
    attacked.refused({**attacked.served(), "/metadata/2.root.json": forged.to_bytes()}.get)


@pytest.mark.parametrize("role", ["targets", *ONLINE])
def test_key_that_was_rotated_away_is_worthless(attacked: Attacked, role: str) -> None:
    """The device follows the rotation from its first root; the old key signs nothing that it believes."""
    assert attacked.update() == 1
    old = getattr(attacked.keys, role)
    _rotate(attacked, role)
    attacked.release(2)
    assert attacked.update() == 2
    current = attacked.repository._load()
    payload = current.files[role].signed
    payload.version += 1
    forged = Metadata(payload)
    forged.sign(FileSigner(old))
    names = {path for path in attacked.served() if path.endswith((f"/{role}.json", f".{role}.json"))}
    spoiled = {**attacked.served(), **dict.fromkeys(names, forged.to_bytes())}
    attacked.refused(spoiled.get, device="fresh")


@pytest.mark.parametrize("share", [0, 1, 2])
def test_root_share_is_rotated_by_old_and_new_shares(attacked: Attacked, share: int) -> None:
    assert attacked.update() == 1
    gone = attacked.keys.root[share]
    new = SigningKey.generate()
    shares = list(attacked.keys.root)
    shares[share] = new
    attacked.keys = replace(attacked.keys, root=tuple(shares), spare=(gone,))
    attacked.repository.rotate("root", public_key(new), replaced=public_key(gone).keyid)
    attacked.keys = replace(attacked.keys, spare=())
    assert attacked.update() == 1
    attacked.repository.sign_again("root")
    assert attacked.update() == attacked.update(device="fresh") == 1


def test_every_root_share_is_rotated_one_after_the_other(attacked: Attacked) -> None:
    """A device that was away the whole time follows the chain of roots from its first one."""
    for share in range(3):
        gone, new = attacked.keys.root[share], SigningKey.generate()
        shares = [new if number == share else key for number, key in enumerate(attacked.keys.root)]
        attacked.keys = replace(attacked.keys, root=tuple(shares))
        attacked.repository.rotate("root", public_key(new), replaced=public_key(gone).keyid)
    attacked.release(2)
    assert attacked.update() == 2


def test_ring_of_one_device_cannot_be_served_as_anothers(attacked: Attacked) -> None:
    attacked.release(2)
    attacked.repository.set_ring("canary", 1)
    served = attacked.served()
    canary = next(data for path, data in served.items() if path.endswith(".canary.json"))
    swapped = {path: canary if path.endswith(".stable.json") else data for path, data in served.items()}
    attacked.refused(swapped.get, says="verify|longer")


def test_online_role_lists_nothing_outside_of_its_paths(attacked: Attacked) -> None:
    """The rings' key cannot sign online keys: no role has a path of another's."""
    repository = attacked.repository
    stolen = repository._load()
    repository._add_files(stolen, "rings", {"keys/online.json": b"{}"})
    assert isinstance(stolen.targets["rings"], Targets)
    repository._publish(stolen, {"rings"})
    info = check(
        attacked.folder / "d", attacked.root, MemoryFetcher(repository.read), "stable", attacked.clock
    )
    assert info.keys.orders[0][0] == attacked.keys.order.key_id


def _rotate(attacked: Attacked, role: str) -> None:
    """The role's next key, in the aggregator's hands too."""
    new = SigningKey.generate()
    attacked.keys = replace(attacked.keys, spare=(*attacked.keys.spare, getattr(attacked.keys, role)))
    attacked.keys = replace(attacked.keys, **{role: new})
    attacked.repository.rotate(role, public_key(new))


def _served(store: Artefacts) -> dict[str, bytes]:
    found = {}
    for key in store.keys("tuf"):
        data = store.read(key)
        assert data is not None
        found["/" + key.removeprefix("tuf/")] = data
    return found
