"""A helper's own folder, on a machine of another party than the aggregator's.

    FORMAT           "shoal-helper 1"
    settings.toml    fleet, address, fewest devices of a sum
    kem.key          what devices seal their seeds to, 0600
    token.sha256     of the token that the aggregator shows
    helper.db        the roster, and which questions were answered
    ca/              the authority of the HTTPS port, and the server's certificate
    for-aggregator/  helper.json, ca.pem and token: what the aggregator's operator is given

Laws of the file: nothing is ever overwritten; the folder has its FORMAT last.
"""

from __future__ import annotations

import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct, field

from cloud_server.enrolment.ca import CertificateAuthority, ensure_server_files
from cloud_server.helper.helper import Helper
from cloud_server.helper.store import HelperStore
from cloud_server.layout import FileLock
from process.clock import Clock
from process.options import render_toml
from process.settings import load_settings
from wire.errors import ConfigurationError, ShoalError, StorageError
from wire.helper import helper_json
from wire.mask_terms import MAX_HELPED_MEMBERS
from wire.primitives import KemPrivateKey, read_private, sha256, write_private

FORMAT: Final = "shoal-helper 1"
HANDED_OUT: Final = "for-aggregator"
HELPER_FILE: Final = "helper.json"
AUTHORITY_FILE: Final = "ca.pem"
TOKEN_FILE: Final = "token"
TLS_NAME: Final = "shoal-helper"
"""In every helper's certificate: its authority certifies nothing else."""
_ID: Final = r"^[A-Za-z0-9_-]{1,64}\Z"
_TOKEN_BYTES: Final = 32


def _option(sentence: str, **bounds: Any) -> Meta:
    return Meta(description=sentence, **bounds)


class HelperLog(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[log]`"""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], _option("The least severe line that is written.")
    ] = "info"
    json: Annotated[bool, _option("Write one JSON object a line instead of text.")] = False


class HelperSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of one helper."""

    tenant: Annotated[str, _option("Id of who runs the fleet.", pattern=_ID)] = "shoal"
    fleet: Annotated[str, _option("Id of the fleet.", pattern=_ID)] = "fleet"
    host: Annotated[str, _option("Address to listen on.", min_length=1, max_length=253)] = "127.0.0.1"
    port: Annotated[int, _option("Port; 0 takes a free one.", ge=0, le=65_535)] = 8446
    min_devices: Annotated[
        int, _option("Fewest devices of the roster in a sum that is told.", ge=3, le=MAX_HELPED_MEMBERS)
    ] = 10
    log: HelperLog = field(default_factory=HelperLog)


@dataclass(frozen=True)
class HelperFolder:
    """The paths of one helper's folder, and how it is made and opened."""

    root: Path

    @property
    def handed_out(self) -> Path:
        return self.root / HANDED_OUT

    def settings(self) -> HelperSettings:
        """Its settings.

        Raises:
            ConfigurationError: (operator) it is no helper's folder, or a setting cannot be used.
        """
        try:
            found = (self.root / "FORMAT").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"{self.root} is not the folder of a helper",
                hint=f"make one: shoal-cloud helper init --state {self.root}",
            ) from error
        if found != FORMAT:
            raise ConfigurationError(f"{self.root} has format {found[:40]!r}, this version reads {FORMAT!r}")
        return load_settings(HelperSettings, self.root / "settings.toml", None)

    def create(self, settings: HelperSettings, *, algorithm: str, now: float) -> None:
        """Makes the folder (0700), which must not exist or be empty, with fresh keys and a fresh token.

        Raises:
            ConfigurationError: (operator) something lies there, or no such algorithm.
            StorageError: (disk) it cannot be made.
        """
        try:
            was_there = self.root.exists()
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(self.root.iterdir()):
                raise ConfigurationError(f"{self.root} is not empty", hint="name another folder")
            try:
                self._fill(settings, algorithm, now)
            except (OSError, ShoalError):
                self._discard(keep=was_there)
                raise
        except OSError as error:
            raise StorageError(
                f"{self.root} cannot be made: {error.strerror}", path=str(self.root)
            ) from error

    def _fill(self, settings: HelperSettings, algorithm: str, now: float) -> None:
        key, token = KemPrivateKey.generate(algorithm), secrets.token_urlsafe(_TOKEN_BYTES)
        self.handed_out.mkdir(mode=0o700)
        (self.root / "settings.toml").write_text(render_toml(settings), encoding="utf-8")
        authority = CertificateAuthority.create(self.root / "ca", name=TLS_NAME, now=now)
        write_private(self.root / "kem.key", f"{algorithm} {key.private_bytes().hex()}\n".encode())
        write_private(self.root / "token.sha256", sha256(token.encode()).hex().encode())
        named = helper_json(settings.tenant, settings.fleet, key.public_key)
        (self.handed_out / HELPER_FILE).write_bytes(named)
        (self.handed_out / AUTHORITY_FILE).write_text(authority.certificate_pem, encoding="ascii")
        write_private(self.handed_out / TOKEN_FILE, token.encode())
        self.open_store().close()
        (self.root / "FORMAT").write_text(FORMAT + "\n", encoding="utf-8")

    def _discard(self, *, keep: bool) -> None:
        """Takes back what `create` made."""
        for entry in self.root.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        if not keep:
            self.root.rmdir()

    def key(self) -> KemPrivateKey:
        """What devices seal to.

        Raises:
            StorageError: (operator, disk) it is missing.
            ConfigurationError: (operator) it is open to others, or is not a key.
        """
        path = self.root / "kem.key"
        try:
            algorithm, seed = read_private(path).decode("ascii").split()
            return KemPrivateKey.from_bytes(algorithm, bytes.fromhex(seed))
        except ValueError as error:
            raise ConfigurationError(
                f"{path} is not a key file", hint="restore it from its backup", path=str(path)
            ) from error

    def token_sha256(self) -> bytes:
        """Of the token that the aggregator shows; raises as `key`."""
        return bytes.fromhex(read_private(self.root / "token.sha256").decode("ascii").strip())

    def server_files(self, settings: HelperSettings, *, now: float) -> tuple[Path, Path]:
        """Certificate and key of the HTTPS port, issued anew when they are near their end."""
        place = self.root / "ca"
        names = (TLS_NAME, settings.host)
        return ensure_server_files(CertificateAuthority.load(place), place, "helper", names, now=now)

    def open_store(self) -> HelperStore:
        """Roster and answers."""
        return HelperStore(self.root / "helper.db")

    def open_helper(self, store: HelperStore, settings: HelperSettings, clock: Clock) -> Helper:
        """What answers questions."""
        return Helper(
            store,
            self.key(),
            tenant=settings.tenant,
            fleet=settings.fleet,
            min_devices=settings.min_devices,
            clock=clock,
        )

    def lock(self) -> FileLock:
        """Held by the one process that answers."""
        return FileLock(self.root / "service.lock")
