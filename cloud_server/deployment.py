"""One aggregator's parts, opened from its state folder as they are asked for, and how such a folder is made.

Laws of the file: wiring only, no rule; a part that a command does not ask for is not opened (a list of
devices needs no key); nothing of torch or flwr is imported.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cloud_server.artefacts import Artefacts
from cloud_server.audit.notary import Notary, NotaryPolicy, list_key
from cloud_server.audit.witness import open_witness
from cloud_server.clock_evidence import ClockGuard, Evidence
from cloud_server.clock_witnesses import hear_witnesses
from cloud_server.db.engine import Database, open_database
from cloud_server.enrolment.authorities import Authorities, AuthorityFolder
from cloud_server.enrolment.ca import CertificateAuthority, ensure_server_files
from cloud_server.enrolment.service import EnrolmentService, Welcome
from cloud_server.enrolment.tokens import Door
from cloud_server.keys import CloudKeys, KeyFolder, copy_keys, init_keys
from cloud_server.layout import StateFolder
from cloud_server.operators.accounts import FIRST_ADMIN, Role, add_operator
from cloud_server.registry import Registry
from cloud_server.release.publish import Publisher
from cloud_server.release.tuf_repository import TufRepository
from cloud_server.release.tuf_signing import TufExpiry
from cloud_server.settings import CloudSettings, load_cloud_settings
from process.clock import Clock, SystemClock
from process.options import render_toml
from wire.agent_versions import check_least
from wire.errors import ConfigurationError, StorageError
from wire.primitives import write_private

if TYPE_CHECKING:
    from models.bundle import Bundle

_BUNDLES = "bundles"
ANY_ADDRESS = ("0.0.0.0", "::")
"""Listen everywhere, and are nowhere to connect to."""


class Deployment:
    """One aggregator. Every part is opened once, when it is first asked for; `close` closes what was opened.

    Attributes:
        devices_ahead: how far our clock is ahead of the fleet's (seconds); of a running service.

    Args:
        fence: what `Database.claim_writer` gave to the running service; None for commands.
        offline: where the offline keys are for this command, such as on a stick; `keys/offline` if None.
    """

    def __init__(
        self,
        folder: StateFolder,
        settings: CloudSettings,
        *,
        clock: Clock | None = None,
        fence: int | None = None,
        offline: Path | None = None,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.clock: Clock = clock or SystemClock()
        self.fence = fence
        self.devices_ahead: Callable[[], float | None] = lambda: None
        self.key_folder = KeyFolder(folder.keys, self.clock, offline=offline)
        self.authority_folder = AuthorityFolder(folder.authority, self.clock)

    @classmethod
    def open(
        cls,
        root: Path,
        environment: Mapping[str, str] | None = None,
        *,
        clock: Clock | None = None,
        offline: Path | None = None,
    ) -> Deployment:
        """Opens a state folder.

        Raises:
            ConfigurationError: (operator) not a state folder, or settings that cannot be used.
        """
        folder = StateFolder(root)
        folder.check()
        settings = load_cloud_settings(folder.settings, environment)
        return cls(folder, settings, clock=clock, offline=offline)

    def close(self) -> None:
        """Closes the database, if it was opened. Safe to call twice."""
        if "database" in self.__dict__:
            self.database.close()

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- parts ----

    @cached_property
    def database(self) -> Database:
        """The database, brought to this version's schema.

        Raises:
            StorageError: (disk) it cannot be opened; of a complete folder, it is not made anew where it is gone.
        """
        url = self.settings.storage.database
        file = self.folder.database.absolute()
        if not url and self.folder.is_sealed and not (file.exists() and file.stat().st_size):
            raise StorageError(
                f"the database {file} is missing or empty", hint="restore it from its backup", path=str(file)
            )
        opened = open_database(url or f"sqlite:///{file}")
        try:
            opened.migrate()
        except BaseException:
            opened.close()
            raise
        return opened

    @property
    def keys(self) -> CloudKeys:
        """The keys of now; another object whenever one was rotated."""
        return self.key_folder()

    @property
    def authorities(self) -> Authorities:
        """The authorities of now; another object whenever one came or went."""
        return self.authority_folder()

    @property
    def authority(self) -> CertificateAuthority:
        """The one that tokens pin, and that signs what servers show."""
        return self.authorities.door

    @cached_property
    def artefacts(self) -> Artefacts:
        url = self.settings.storage.artefacts
        return Artefacts.open(url) if url else Artefacts.in_folder(self.folder.artefacts)

    @cached_property
    def repository(self) -> TufRepository:
        """The signed repository; commands and the service exclude each other by a lock in the folder."""
        days = self.settings.tuf
        expiry = TufExpiry(
            root=days.root_days,
            targets=days.targets_days,
            parameters=days.online_days,
            keys=days.online_days,
            rings=days.online_days,
            snapshot=days.snapshot_days,
            timestamp=days.timestamp_days,
        )
        lock = self.folder.lock("tuf")
        return TufRepository(
            self.artefacts, self.key_folder, self.clock, expiry=expiry, lock=lock, may_sign=self._may_sign
        )

    def _may_sign(self) -> None:
        if self._is_service:
            self.database.check_claim()
        self.clock_guard.check()
        self._signed_at = [self.clock.now()]

    @property
    def _is_service(self) -> bool:
        """A command claims nothing, and need not open the database to sign."""
        return "database" in self.__dict__ and self.database.claimed is not None

    # ---- the clock ----

    @cached_property
    def clock_guard(self) -> ClockGuard:
        """Asked before anything is signed."""
        return ClockGuard(
            self.clock,
            self.settings.clock.limits(),
            lambda: self.clock_evidence(with_database=self._is_service),
        )

    def clock_evidence(self, *, with_database: bool) -> Evidence:
        """What is known about the time.

        Args:
            with_database: asks the database, too: outside of a transaction only.
        """
        return hear_witnesses(
            self.clock.now(),
            signed_at=max(self._signed_at, default=None),
            database=self.database if with_database else None,
            devices_ahead=self.devices_ahead(),
        )

    @cached_property
    def _signed_at(self) -> list[float]:
        """When something was signed last; none or one. Read once: a store that is away later ends no service."""
        found = self.repository.signed_at()
        return [] if found is None else [found]

    def check_clock(self) -> None:
        """Looks once, with the database, before a service claims it.

        Raises:
            TrustError: (operator) the clock cannot be right.
        """
        limits = self.settings.clock.limits()
        ClockGuard(self.clock, limits, lambda: self.clock_evidence(with_database=True)).check()

    @cached_property
    def registry(self) -> Registry:
        least = check_least(self.settings.enrolment.min_agent_version)
        return Registry(self.database, self.clock, min_agent_version=least)

    @cached_property
    def publisher(self) -> Publisher:
        return Publisher(
            self.database,
            self.artefacts,
            self.repository,
            self.clock,
            fence=self.fence,
            notary=self.notary,
        )

    @cached_property
    def notary(self) -> Notary:
        """Signs the audit chain; its key is one that the release metadata lists."""
        list_key(self.repository, self.keys.audit)
        audit = self.settings.audit
        witness = open_witness(audit.witness)
        policy = NotaryPolicy(entries=audit.head_entries, seconds=audit.head_seconds)
        return Notary(self.database, lambda: self.keys.audit, self.clock, policy=policy, witness=witness)

    def enrolment(self, welcome: Welcome) -> EnrolmentService:
        """Enrolment that tells devices where to go; `welcome` makes the usual answer."""
        return EnrolmentService(
            self.database,
            self.authority_folder,
            welcome,
            self.clock,
            tuf_root=self.repository.first_root,
            online_keys=lambda: self.keys.online_keys(),
            grace_seconds=self.settings.enrolment.grace_days * 86_400.0,
        )

    # ---- addresses ----

    @property
    def advertised(self) -> str:
        """The host that devices are told."""
        return self.settings.listen.advertise or self.settings.listen.host

    def door(self, public_port: int = 0) -> Door:
        """What tokens say.

        Args:
            public_port: where the service really listens; 0 for the port of the settings.

        Raises:
            ConfigurationError: (operator) the settings leave the port open, or name no host.
        """
        if self.advertised in ANY_ADDRESS:
            raise ConfigurationError(
                f"devices cannot connect to {self.advertised}",
                hint="set listen.advertise in settings.toml to the name or address that they use",
            )
        port = public_port or self.settings.listen.public_port
        if port == 0:
            raise ConfigurationError(
                "a token needs a fixed port", hint="set listen.public_port in settings.toml"
            )
        return Door(
            _url("https", self.advertised, port), self.settings.listen.tls_name, self.authority.fingerprint
        )

    def broker_url(self, host: str, port: int) -> str:
        """Where devices find the broker; one that listens everywhere has the aggregator's own name."""
        scheme = "mqtts" if self.settings.broker.tls else "mqtt"
        return _url(scheme, self.advertised if host in ANY_ADDRESS else host, port)

    def welcome(self, *, device_port: int, broker_url: str) -> Welcome:
        """What a device is told when it is let in."""
        return Welcome(
            tenant=self.settings.tenant,
            fleet=self.settings.fleet,
            tls_name=self.settings.listen.tls_name,
            device_url=_url("https", self.advertised, device_port),
            broker_url=broker_url,
            ring=self.settings.enrolment.ring,
            max_examples=self.settings.enrolment.max_examples,
        )

    def server_files(self, purpose: str = "server") -> tuple[Path, Path]:
        """Certificate chain and key of the HTTPS ports (`server`) or a broker, made where missing."""
        names = dict.fromkeys((self.settings.listen.tls_name, self.advertised, "localhost", "127.0.0.1"))
        return ensure_server_files(
            self.authority, self.folder.authority, purpose, list(names), now=self.clock.now()
        )

    @property
    def full_name(self) -> str:
        """Tenant and fleet, for people."""
        return f"{self.settings.tenant}/{self.settings.fleet}"

    @property
    def authority_name(self) -> str:
        """What the authority's certificate is called."""
        return f"Shoal CA of {self.settings.tenant} {self.settings.fleet}"[:64]

    # ---- models ----

    def keep_bundle(self, bundle: Bundle) -> Path:
        """Copies an imported bundle into the state folder, whole or not at all; returns where it lies.

        Artefacts that are elsewhere get it, too: a machine that goes on with the run has them, and not this folder.
        """
        graphs_sha256 = bundle.manifest.graphs_sha256
        target = self.folder.bundle(graphs_sha256)
        if not target.exists():
            self._stage(target, lambda staged: shutil.copytree(bundle.folder, staged))
        if self.settings.storage.artefacts:
            for file in sorted(target.iterdir()):
                self.artefacts.write(f"{_BUNDLES}/{graphs_sha256}/{file.name}", file.read_bytes())
        return target

    def bundle_folder(self, graphs_sha256: str) -> Path:
        """Where an imported model lies, which another machine may have imported; it need not be there.

        Raises:
            StorageError: (disk) it cannot be fetched from the artefacts.
        """
        target = self.folder.bundle(graphs_sha256)
        if target.exists() or not self.settings.storage.artefacts:
            return target
        prefix = f"{_BUNDLES}/{graphs_sha256}"
        files = {key.rpartition("/")[2]: self.artefacts.read(key) for key in self.artefacts.keys(prefix)}
        if files:
            self._stage(target, lambda staged: _write_all(staged, files))
        return target

    def _stage(self, target: Path, fill: Callable[[Path], object]) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix=".import-", dir=self.folder.bundles) as scratch:
                staged = Path(scratch) / "bundle"
                fill(staged)
                staged.rename(target)
        except OSError as error:
            raise StorageError(f"the bundle cannot be kept in {target}: {error.strerror}") from error


def _write_all(folder: Path, files: Mapping[str, bytes | None]) -> None:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data or b"")


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def initialise(
    root: Path, settings: CloudSettings, *, clock: Clock | None = None, keys: Path | None = None
) -> Deployment:
    """Makes a state folder: settings, keys, CA, database with the first admin, an empty signed repository; or nothing.

    Args:
        keys: a folder that `init_keys` made, whose keys are copied; new ones if None.

    Raises:
        ConfigurationError: (operator) something lies there already.
        StorageError: (disk) it cannot be written.
    """
    folder = StateFolder(root)
    folder.create()
    deployment = Deployment(folder, settings, clock=clock)
    try:
        _fill(deployment, keys)
        folder.seal()
    except BaseException:  # an interrupt too: half a folder would be in the way of the next try
        deployment.close()
        folder.discard()
        raise
    return deployment


def _fill(deployment: Deployment, made: Path | None) -> None:
    folder, settings = deployment.folder, deployment.settings
    try:
        folder.settings.write_text(render_toml(settings), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{folder.settings} cannot be written: {error.strerror}") from error
    if made is None:
        init_keys(folder.keys)
    else:
        copy_keys(made, folder.keys)
    keys = deployment.keys
    CertificateAuthority.create(folder.authority, name=deployment.authority_name, now=deployment.clock.now())
    with deployment.database.transaction() as connection:
        token = add_operator(connection, FIRST_ADMIN, Role.ADMIN, deployment.clock.now())
    write_private(folder.first_admin, f"{token}\n".encode())
    deployment.repository.init(online_keys=keys.online_json(tenant=settings.tenant, fleet=settings.fleet))
    deployment.repository.set_authorities(deployment.authorities.bundle_pem.encode("ascii"))
    list_key(deployment.repository, keys.audit)
