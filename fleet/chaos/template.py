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
from edge_agent.enrolment.identity import Identity
from fleet.simulated_device import FLEET, TENANT, device_key, make_identity
from fleet.virtual import START, VirtualTime
from models.bundle import Bundle
from models.data.federation import Split
from models.thirds import draw

BEGIN = START + 30 * 86_400.0
"""When histories begin: so late that a clock which is an hour behind is not behind the program itself."""
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


def make_template(bundle: Bundle, folder: Path, devices: int, begin: float = START) -> Template:
    """Enrols the devices, imports the model and publishes its first release.

    Args:
        folder: for the database, for a moment.
        begin: when that is, in unix seconds.
    """
    keys, time = CloudKeys.from_seed(KEYS_SEED), VirtualTime(begin)
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
    return Split(*draw(rng, 12), *draw(rng, 4), *draw(rng, 4))
