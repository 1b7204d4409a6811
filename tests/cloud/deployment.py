"""One deployment in memory for the tests: database, CA, keys, signed repository, a clock standing still."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cloud_server.artefacts import Artefacts
from cloud_server.db.engine import Database, open_database
from cloud_server.enrolment.authorities import only
from cloud_server.enrolment.ca import CertificateAuthority
from cloud_server.enrolment.service import EnrolmentService, Welcome
from cloud_server.enrolment.tokens import Door, mint_token
from cloud_server.keys import CloudKeys
from cloud_server.registry import Registry
from cloud_server.release.tuf_repository import TufRepository
from wire.enrolment import EnrolmentToken, EnrolRequest, proof_bytes
from wire.primitives import SigningKey, generate_tls_key, make_csr

NOW = 1_800_000_000.0


class SteppedClock:
    """A clock that stands still until it is moved."""

    def __init__(self, now: float = NOW) -> None:
        self.seconds = now

    def now(self) -> float:
        return self.seconds

    def monotonic(self) -> float:
        return self.seconds


@dataclass(frozen=True)
class Deployment:
    """What one aggregator holds."""

    database: Database
    clock: SteppedClock
    keys: CloudKeys
    authority: CertificateAuthority
    artefacts: Artefacts
    repository: TufRepository
    registry: Registry
    enrolment: EnrolmentService

    def mint(
        self, device: str = "", *, url: str = "https://127.0.0.1:1", **options: object
    ) -> EnrolmentToken:
        """A token whose server is called `cloud.shoal`."""
        door = Door(url, "cloud.shoal", self.authority.fingerprint)
        with self.database.transaction() as connection:
            return mint_token(connection, door, now=self.clock.now(), device=device, **options)  # type: ignore[arg-type]


class Newcomer:
    """A device's side of enrolment, without a network."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.update_key = SigningKey.generate()
        self.csr = make_csr(generate_tls_key(), device).decode()

    def proof(self, token_id: str) -> str:
        """The proof of a request that names this token."""
        return self.update_key.sign(proof_bytes(token_id, self.device, self.csr)).hex()

    def request(self, token: EnrolmentToken, **changes: str) -> EnrolRequest:
        csr = changes.get("csr", self.csr)
        device = changes.get("device", self.device)
        values = {
            "token_id": token.token_id,
            "secret": token.secret,
            "device": device,
            "csr": csr,
            "update_key": self.update_key.public_bytes.hex(),
            "proof": self.update_key.sign(proof_bytes(token.token_id, device, csr)).hex(),
        }
        return EnrolRequest(**(values | changes))


@contextmanager
def open_deployment(folder: Path, url: str = "sqlite://") -> Iterator[Deployment]:
    """A fresh deployment; its CA lies in `folder`, all else in memory (but for a database of a URL)."""
    clock = SteppedClock()
    database = open_database(url)
    database.migrate()
    keys = CloudKeys.from_seed(b"tests")
    authority = CertificateAuthority.create(folder / "ca", name="Shoal tests", now=clock.now())
    artefacts = Artefacts.in_memory()
    repository = TufRepository(artefacts, keys, clock)
    repository.init(online_keys=keys.online_json(tenant="t", fleet="f"))
    welcome = Welcome("t", "f", "cloud.shoal", "https://127.0.0.1:2", "mqtt://127.0.0.1:3", "stable", 500)
    enrolment = EnrolmentService(
        database,
        only(authority),
        welcome,
        clock,
        tuf_root=repository.first_root,
        online_keys=keys.online_keys,
    )
    registry = Registry(database, clock)
    yield Deployment(database, clock, keys, authority, artefacts, repository, registry, enrolment)
    database.close()
