"""Who this device is: its names, keys and what it trusts, in `identity/` of the state folder.

Laws of the file: private keys are 0600 and never printed; an identity appears whole or not at all (it is
written beside its place and renamed); what cannot be read is an error that names the file and says how to enrol (with
`damaged_file` among its facts where a file is there and is not what it should be); one that a new identity replaces
goes to the quarantine with its keys.
Source: docs/architecture.md, "Keys".
"""

from __future__ import annotations

import os
import re
import shutil
import ssl
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from edge_agent.store.disk import sync_folder, write_durably
from edge_agent.store.quarantine import FOLDER_NAME as QUARANTINE_NAME
from edge_agent.store.quarantine import Quarantine
from wire.certificate_dates import validity_of
from wire.enrolment import DeviceId, EnrolResponse, OnlineKey, Url
from wire.errors import ConfigurationError, EnrolmentError, ShoalError, StorageError, TrustError
from wire.primitives import (
    KemPublicKey,
    SigningKey,
    VerifyKey,
    certificate_fingerprints,
    read_private,
    write_private,
)

FOLDER_NAME: Final = "identity"
ENROLMENT: Final = "enrolment.json"
CA: Final = "ca.pem"
CERTIFICATE: Final = "certificate.pem"
TLS_KEY: Final = "tls.key"
UPDATE_KEY: Final = "update.key"
TUF_ROOT: Final = "root.json"
NOT_ENROLLED_HINT: Final = (
    "enrol it: shoal-edge enroll --token-file FILE (a token comes from `shoal-cloud device add`)"
)
_PEM_FOOTER: Final = b"-----END CERTIFICATE-----"
_MAX_FILE_BYTES: Final = 256 * 1024
_URL = re.compile(r"[a-z]+://[^/\s@?#]+/?")


class Enrolment(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`enrolment.json`: everything about a device that is not a key or a certificate."""

    format: Annotated[int, Meta(ge=1, le=1)] = 1
    tenant: DeviceId
    fleet: DeviceId
    device: DeviceId
    url_enrol: Url
    url_api: Url
    tls_name: Annotated[str, Meta(min_length=1, max_length=253)]
    broker_url: Url
    ring: DeviceId = "stable"
    channel: DeviceId = "stable"
    kem: Annotated[tuple[OnlineKey, ...], Meta(max_length=8)] = ()
    orders: Annotated[tuple[OnlineKey, ...], Meta(max_length=8)] = ()
    max_examples: Annotated[int, Meta(ge=1, le=2**31)] = 1_000_000


@dataclass(frozen=True)
class Identity:
    """One enrolled device.

    Attributes:
        url_enrol: `https://host:port` with server certificate only.
        url_api: `https://host:port` with mutual TLS.
        tls_name: the name that the aggregator's (and the broker's) certificate carries.
        mqtt_tls: mutual TLS to the broker, with the same certificate.
        folder: where the files are, for libraries that take paths; None for a simulated device.
        kem, orders: the online keys of the day of enrolment; a verified `keys/online.json` replaces them.
        max_examples: cap of `num_examples` that the fleet accepts from this device.
        is_waiting: when it was let in, an operator still had to approve it. Not kept: an operator may have done so.
    """

    tenant: str
    fleet: str
    device: str
    url_enrol: str
    url_api: str
    tls_name: str
    mqtt_host: str
    mqtt_port: int
    mqtt_tls: bool
    ca_pem: bytes = field(repr=False)
    certificate_pem: bytes = field(repr=False)
    update_key: SigningKey
    tuf_root: bytes = field(repr=False)
    ring: str = "stable"
    channel: str = "stable"
    kem: tuple[OnlineKey, ...] = ()
    orders: tuple[OnlineKey, ...] = ()
    max_examples: int = 1_000_000
    folder: Path | None = None
    is_waiting: bool = False

    @property
    def tls_key_path(self) -> Path:
        """The TLS key (PEM, 0600).

        Raises:
            ConfigurationError: a simulated device has none.
        """
        return self._path(TLS_KEY)

    @property
    def certificate_path(self) -> Path:
        """The device's certificate (PEM); raises like `tls_key_path`."""
        return self._path(CERTIFICATE)

    @property
    def ca_path(self) -> Path:
        """The certificates of the CAs that it trusts (PEM); raises like `tls_key_path`."""
        return self._path(CA)

    def _path(self, name: str) -> Path:
        if self.folder is None:
            raise ConfigurationError("this identity has no files: it is a simulated device's")
        return self.folder / name


def from_response(
    response: EnrolResponse, *, url_enrol: str, update_key: SigningKey, folder: Path | None
) -> Identity:
    """Puts an identity together from what the aggregator answered.

    Raises:
        EnrolmentError: (peer) a URL in the answer cannot be used.
    """
    host, port, tls = parse_broker_url(response.broker_url)
    parse_https_url(response.device_url)
    return Identity(
        tenant=response.tenant,
        fleet=response.fleet,
        device=response.device,
        url_enrol=url_enrol,
        url_api=response.device_url,
        tls_name=response.tls_name,
        mqtt_host=host,
        mqtt_port=port,
        mqtt_tls=tls,
        ca_pem=response.ca.encode(),
        certificate_pem=response.certificate.encode(),
        update_key=update_key,
        tuf_root=response.tuf_root.encode(),
        ring=response.ring,
        channel=response.ring,
        kem=response.kem,
        orders=response.orders,
        max_examples=response.max_examples,
        folder=folder,
        is_waiting=response.status == "quarantined",
    )


def save(identity: Identity, folder: Path, *, tls_key_pem: bytes) -> None:
    """Writes `identity/` under the state folder: whole, or not at all. A broken one goes to the quarantine.

    Raises:
        ConfigurationError: there is a whole identity already.
        StorageError: the folder cannot be written.
    """
    refuse_second(folder)
    target = folder / FOLDER_NAME
    partial = folder / f".{FOLDER_NAME}.new"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, mode=0o700)
        write_private(partial / TLS_KEY, tls_key_pem)
        write_private(partial / UPDATE_KEY, identity.update_key.private_bytes())
        write_durably(partial / CA, identity.ca_pem)
        write_durably(partial / CERTIFICATE, identity.certificate_pem)
        write_durably(partial / TUF_ROOT, identity.tuf_root)
        write_durably(partial / ENROLMENT, _enrolment_json(identity))
        if os.path.lexists(target):
            Quarantine(folder / QUARANTINE_NAME).take(target, f"replaced by a new identity: {broken(folder)}")
        os.rename(partial, target)
        sync_folder(folder)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_second(folder: Path) -> None:
    """Raises `ConfigurationError` when the state folder is not for a new identity.

    One that is whole, or whose keys are only open to others, is never replaced, and the folder of an aggregator is
    not a device's.
    """
    if (folder / "settings.toml").exists() and (folder / "keys").is_dir():
        raise ConfigurationError(
            f"{folder} is the state folder of an aggregator", hint="give each program its own folder"
        )
    if os.path.lexists(folder / FOLDER_NAME) and not broken(folder):
        raise ConfigurationError(
            f"{folder / FOLDER_NAME} holds an identity already",
            hint="use another state folder; one that is damaged is replaced",
        )


def broken(folder: Path) -> str:
    """Why the identity of a state folder has to be replaced.

    Returns:
        Empty for one that is whole, or that its operator can mend: a key that is open to others, a file that this user
        may not read.
    """
    try:
        load(folder)
    except ShoalError as error:
        is_mendable = "mode" in error.facts or isinstance(error.__cause__, PermissionError)
        return "" if is_mendable else str(error)
    return ""


def with_authorities(identity: Identity, pem: bytes) -> Identity:
    """The same device with the authorities that it trusts from now on (PEM, one or more), on disk when it returns.

    Raises:
        TrustError: these are no certificates.
        StorageError: the folder cannot be written.
    """
    certificate_fingerprints(pem)
    write_durably(identity.ca_path, pem)
    return replace(identity, ca_pem=pem)


def with_certificate(identity: Identity, certificate_pem: bytes) -> Identity:
    """The same device with its next certificate."""
    return replace(identity, certificate_pem=certificate_pem)


def load(folder: Path) -> Identity:
    """Reads `identity/` of a state folder.

    Raises:
        ConfigurationError: not enrolled, or a key that others may read.
        EnrolmentError: a file is missing or damaged.
    """
    place = folder / FOLDER_NAME
    if not place.is_dir():
        raise ConfigurationError(
            f"{folder} holds no identity: this device is not enrolled", hint=NOT_ENROLLED_HINT
        )
    facts, (host, port, tls) = _facts(place / ENROLMENT)
    identity = Identity(
        tenant=facts.tenant,
        fleet=facts.fleet,
        device=facts.device,
        url_enrol=facts.url_enrol,
        url_api=facts.url_api,
        tls_name=facts.tls_name,
        mqtt_host=host,
        mqtt_port=port,
        mqtt_tls=tls,
        ca_pem=_certificate(place / CA),
        certificate_pem=_certificate(place / CERTIFICATE),
        update_key=_update_key(place / UPDATE_KEY),
        tuf_root=_read(place / TUF_ROOT),
        ring=facts.ring,
        channel=facts.channel,
        kem=facts.kem,
        orders=facts.orders,
        max_examples=facts.max_examples,
        folder=place,
    )
    _check_pair(identity)
    return identity


def parse_https_url(url: str) -> tuple[str, int]:
    """Host and port of `https://host:port`.

    Raises:
        EnrolmentError: another scheme, a path, or no port.
    """
    host, port = _split(url, ("https",))
    return host, port


def parse_broker_url(url: str) -> tuple[str, int, bool]:
    """Host, port and whether TLS is spoken, of `mqtt://host:port` or `mqtts://host:port`.

    Raises:
        EnrolmentError: another scheme, a path, or no port.
    """
    host, port = _split(url, ("mqtt", "mqtts"))
    return host, port, url.startswith("mqtts:")


def _split(url: str, schemes: tuple[str, ...]) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise EnrolmentError(f"{url!r} is not a URL") from error
    if not _URL.fullmatch(url) or parts.scheme not in schemes or not host or not port:
        raise EnrolmentError(f"{url!r} is not {' or '.join(schemes)}://host:port")
    return host, port


def _enrolment_json(identity: Identity) -> bytes:
    host = f"[{identity.mqtt_host}]" if ":" in identity.mqtt_host else identity.mqtt_host
    facts = Enrolment(
        tenant=identity.tenant,
        fleet=identity.fleet,
        device=identity.device,
        url_enrol=identity.url_enrol,
        url_api=identity.url_api,
        tls_name=identity.tls_name,
        broker_url=f"{'mqtts' if identity.mqtt_tls else 'mqtt'}://{host}:{identity.mqtt_port}",
        ring=identity.ring,
        channel=identity.channel,
        kem=identity.kem,
        orders=identity.orders,
        max_examples=identity.max_examples,
    )
    return msgspec.json.format(msgspec.json.encode(facts), indent=2) + b"\n"


def _facts(path: Path) -> tuple[Enrolment, tuple[str, int, bool]]:
    """What `enrolment.json` says, and the address of the broker in it."""
    data = _read(path)
    try:
        facts = msgspec.json.decode(data, type=Enrolment, strict=True)
        recipients = [KemPublicKey(key.algorithm, bytes.fromhex(key.public)) for key in facts.kem]
        signers = [VerifyKey(bytes.fromhex(key.public)) for key in facts.orders]
        if not recipients or not signers:
            raise EnrolmentError("no key to seal to, or none for orders")
        return facts, parse_broker_url(facts.broker_url)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TrustError) as error:
        raise _damaged(path, str(error)) from error


def _certificate(path: Path) -> bytes:
    """One certificate or, while an authority follows another, two."""
    pem = _read(path)
    blocks = pem.split(_PEM_FOOTER)
    try:
        for block in blocks[:-1] or blocks:
            validity_of(block + _PEM_FOOTER)
    except TrustError as error:
        raise _damaged(path, str(error)) from error
    return pem


def _update_key(path: Path) -> SigningKey:
    seed = _key(path)
    try:
        return SigningKey(seed)
    except TrustError as error:
        raise _damaged(path, str(error)) from error


def _check_pair(identity: Identity) -> None:
    """The key and the certificate for TLS; they may be two that do not belong together."""
    path = identity.tls_key_path
    _key(path)
    try:
        # A wrong password, for the key that should have none: OpenSSL must never ask a terminal for one.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(identity.certificate_path, path, password="")
    except (ssl.SSLError, ValueError) as error:
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            raise EnrolmentError(f"{path} is not the key of {CERTIFICATE}", hint=NOT_ENROLLED_HINT) from error
        raise _damaged(path, "no TLS key") from error


def _key(path: Path) -> bytes:
    try:
        data = read_private(path)
    except StorageError as error:
        raise EnrolmentError(str(error), hint=NOT_ENROLLED_HINT) from error.__cause__
    except ConfigurationError as error:
        if "mode" in error.facts:
            raise
        raise _damaged(path, str(error)) from error
    if not data:
        raise _damaged(path, "empty")
    return data


def _read(path: Path) -> bytes:
    try:
        # Without O_NONBLOCK a pipe that lies in a file's place would be waited on for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1) or b""
    except IsADirectoryError as error:
        raise _damaged(path, "a folder") from error
    except OSError as error:
        raise EnrolmentError(f"cannot read {path}: {error.strerror}", hint=NOT_ENROLLED_HINT) from error
    if not data or len(data) > _MAX_FILE_BYTES:
        raise _damaged(path, f"{len(data)} bytes" if data else "empty")
    return data


def _damaged(path: Path, reason: str) -> EnrolmentError:
    return EnrolmentError(
        f"{path} is damaged: {reason}", hint=NOT_ENROLLED_HINT, damaged_file=path.name, path=str(path)
    )
