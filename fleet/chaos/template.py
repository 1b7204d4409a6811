"""What every history begins with, made once for a process: a tiny model, its data, a fleet that is enrolled.

Laws of the file: histories differ by their seed alone, so the model, the keys and the first release are always the
same; every history gets a copy of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cloud_server.artefacts import Artefacts
from cloud_server.assembly import open_base
from cloud_server.db.engine import open_database
from cloud_server.keys import CloudKeys
from cloud_server.registry import add_device
from edge_agent.identity import Identity
from fleet.simulated_device import FLEET, TENANT, device_key, make_identity
from fleet.virtual import VirtualTime
from models.bundle import Bundle
from models.data.federation import Floats, Labels, Split

FEATURES = 12
LABELS = ("low", "middle", "high")
KEYS_SEED = hashlib.sha256(b"shoal chaos").digest()
_PREFIXES = ("blobs", "releases", "tuf")


@dataclass(frozen=True, slots=True)
class Template:
    """The state of a fleet before its first moment.

    Attributes:
        database: bytes of the aggregator's database.
        files: its store.
        slots: files of a device's slots, with the first release installed and trusted, by their paths.
        release_sha256: of that release.
    """

    bundle: Bundle
    keys: CloudKeys
    database: bytes
    files: dict[str, bytes]
    identities: tuple[Identity, ...]
    slots: Mapping[str, bytes] = field(default_factory=dict)
    release_sha256: str = ""


def make_bundle(folder: Path) -> Bundle:
    """Two linear layers that tell which third of twelve numbers has the largest sum, by the real builder."""
    import torch
    from torch import nn

    from models.build import build_bundle
    from models.task import Task

    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, len(LABELS)))
    x, _ = _draw(np.random.default_rng(0), 64)
    task = Task.classification(len(LABELS))
    return build_bundle(module, task, (FEATURES,), x, name="thirds", labels=LABELS, out_dir=folder)


def make_template(bundle: Bundle, folder: Path, devices: int) -> Template:
    """Enrols the devices, imports the model and publishes its first release.

    Args:
        folder: for the database, for a moment.
    """
    keys, time = CloudKeys.from_seed(KEYS_SEED), VirtualTime()
    path = folder / "template.db"
    database = open_database(f"sqlite:///{path}")
    store = Artefacts.in_memory()
    base = open_base(database, store, keys, time, tenant=TENANT, fleet=FLEET)
    names = [f"device-{number}" for number in range(devices)]
    with database.transaction() as connection:
        for name in names:
            add_device(connection, name, device_key(0, name).verify_key, now=time.now())
    publisher = base.publisher
    publisher.import_model(bundle)
    publisher.publish(publisher.propose_bundle(bundle).version)
    database.close()
    files = {key: store.read(key) or b"" for prefix in _PREFIXES for key in store.keys(prefix)}
    kem, orders = keys.online_keys()
    root = base.repository.first_root()
    identities = tuple(make_identity(name, device_key(0, name), root, kem, orders) for name in names)
    data = path.read_bytes()
    path.unlink()
    return Template(bundle, keys, data, files, identities)


def make_split(seed: int, name: str) -> Split:
    """A device's data, or the operator's."""
    rng = np.random.default_rng((seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")))
    return Split(*_draw(rng, 12), *_draw(rng, 4), *_draw(rng, 4))


def _draw(rng: np.random.Generator, count: int) -> tuple[Floats, Labels]:
    """Windows float32 [count, 12] and their labels int64 [count]."""
    x = rng.standard_normal((count, FEATURES)).astype(np.float32)
    return x, x.reshape(count, len(LABELS), -1).sum(axis=2).argmax(axis=1)
