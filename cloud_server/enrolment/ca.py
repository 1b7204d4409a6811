"""The certificate authority: one Ed25519 key that signs the server's, the broker's and every device's
certificate.

Laws of the file: the second and last door to `cryptography`, for X.509 only; nothing of a device's request
enters its certificate but the public key (the name is ours, extensions are ours); a certificate of a device
proves its id and says nothing of its rights, which the registry decides at every request. Sources: RFC 5280,
RFC 8410, RFC 5758.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from wire.errors import ConfigurationError, EnrolmentError, StorageError
from wire.primitives import (
    certificate_fingerprint,
    generate_tls_key,
    make_csr,
    read_private,
    write_private,
)

CA_DAYS = 3650
SERVER_DAYS = 825
DEVICE_DAYS = 7
# Clocks of devices run behind: a certificate that is valid "from now" would be refused for an hour.
_BACKDATED = timedelta(hours=1)
_LISTS = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate as it is handed out and as the registry remembers it."""

    pem: str
    serial: str
    not_after: float


class CertificateAuthority:
    """The CA of one deployment. `now` is always an argument: unix seconds."""

    def __init__(self, key_pem: bytes, certificate_pem: bytes) -> None:
        """Takes an Ed25519 key and its self-signed certificate.

        Raises:
            ConfigurationError: (operator) not a key and certificate that belong together.
        """
        try:
            key = serialization.load_pem_private_key(key_pem, password=None)
            self._certificate = x509.load_pem_x509_certificate(certificate_pem)
        except (ValueError, TypeError) as error:
            raise ConfigurationError("the CA's key or certificate is damaged", hint="restore ca/") from error
        if not isinstance(key, Ed25519PrivateKey) or key.public_key() != self._certificate.public_key():
            raise ConfigurationError(
                "the CA's key and certificate do not belong together", hint="restore ca/"
            )
        self._key = key
        self.certificate_pem = certificate_pem.decode("ascii")
        self.since = (self._certificate.not_valid_before_utc + _BACKDATED).timestamp()
        self.fingerprint = certificate_fingerprint(certificate_pem).hex()

    @classmethod
    def create(cls, folder: Path, *, name: str, now: float, file: str = "ca") -> CertificateAuthority:
        """Makes a CA in `folder` (0700): `FILE.key` and `FILE.pem`.

        Raises:
            ConfigurationError: (operator) there is one already.
            StorageError: (disk) nothing can be written there.
        """
        if (folder / f"{file}.key").exists():
            raise ConfigurationError(f"there is a CA in {folder} already", hint="a CA is never overwritten")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"the CA folder {folder} cannot be made: {error.strerror}") from error
        key_pem = generate_tls_key()
        certificate = _self_signed(_load_key(key_pem), name, now)
        write_private(folder / f"{file}.pem", certificate)
        write_private(folder / f"{file}.key", key_pem)
        return cls(key_pem, certificate)

    @classmethod
    def load(cls, folder: Path, file: str = "ca") -> CertificateAuthority:
        """Reads the CA that `create` made.

        Raises:
            StorageError: (operator) there is none.
            ConfigurationError: (operator) its files are open to others or damaged.
        """
        return cls(read_private(folder / f"{file}.key"), read_private(folder / f"{file}.pem"))

    def issue_device(self, csr_pem: str, device: str, *, now: float, days: float = DEVICE_DAYS) -> Issued:
        """A client certificate for the key of a request.

        Raises:
            EnrolmentError: (device) not a request, not signed by its own key, another name, not Ed25519.
        """
        return self._issue(
            _requested_key(csr_pem, device), device, ExtendedKeyUsageOID.CLIENT_AUTH, (), now, days
        )

    def issue_server(
        self, key_pem: bytes, names: Sequence[str], *, now: float, days: float = SERVER_DAYS
    ) -> Issued:
        """A server certificate (HTTPS, broker) for host names and addresses; the first is its common name.

        Raises:
            ConfigurationError: (operator) no name, or one that no certificate can carry.
        """
        if not names:
            raise ConfigurationError("a server certificate needs a name", hint="give --host")
        key = _load_key(key_pem).public_key()
        # RFC 5280 ends common names at 64 characters; only the alternative names are compared anyway.
        return self._issue(key, names[0][:64], ExtendedKeyUsageOID.SERVER_AUTH, names, now, days)

    def revocation_list(self, serials: Iterable[str], *, issued: float) -> bytes:
        """A revocation list (PEM) of certificates by serial (hex).

        It holds as long as the authority: a broker lets nobody in once `nextUpdate` of its list has passed.
        """
        when = _utc(issued)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(when)
            .next_update(max(self._certificate.not_valid_after_utc, when + timedelta(days=1)))
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False)
            .add_extension(x509.CRLNumber(int(issued)), False)
        )
        for serial in sorted(serials):
            revoked = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(when)
            builder = builder.add_revoked_certificate(revoked.build())
        return builder.sign(self._key, None).public_bytes(serialization.Encoding.PEM)

    def has_signed(self, revoked: x509.CertificateRevocationList) -> bool:
        """Whether a revocation list is this authority's."""
        return revoked.is_signature_valid(self._key.public_key())

    def has_issued(self, certificate: x509.Certificate) -> bool:
        """Whether a certificate is of this authority."""
        try:
            certificate.verify_directly_issued_by(self._certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def _issue(
        self,
        public: Ed25519PublicKey,
        name: str,
        usage: x509.ObjectIdentifier,
        names: Sequence[str],
        now: float,
        days: float,
    ) -> Issued:
        not_after = min(_utc(now) + timedelta(days=days), self._certificate.not_valid_after_utc)
        builder = (
            _builder(name, self._certificate.subject, public, _utc(now) - _BACKDATED, not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(is_ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False)
        )
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(_general_names(names)), critical=False
            )
        certificate = builder.sign(self._key, None)
        pem = certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")
        return Issued(pem, f"{certificate.serial_number:x}", not_after.timestamp())


def ensure_server_files(
    authority: CertificateAuthority, folder: Path, purpose: str, names: Sequence[str], *, now: float
) -> tuple[Path, Path]:
    """The paths of `{purpose}.pem` (the server's certificate, then the CA's) and `{purpose}.key`, made where
    missing.

    Issued anew when the certificate is in the last tenth of its life, of another authority, or names have changed.
    """
    certificate_path, key_path = folder / f"{purpose}.pem", folder / f"{purpose}.key"
    if (
        certificate_path.exists()
        and key_path.exists()
        and _is_good(authority, read_private(certificate_path), names, now)
    ):
        return certificate_path, key_path
    key_pem = generate_tls_key()
    issued = authority.issue_server(key_pem, names, now=now)
    # The certificate goes last: a crash in between leaves a pair that does not match, and `_is_good` sees no
    # file.
    certificate_path.unlink(missing_ok=True)
    write_private(key_path, key_pem)
    write_private(certificate_path, (issued.pem + authority.certificate_pem).encode("ascii"))
    return certificate_path, key_path


def ensure_client_files(
    authority: CertificateAuthority, folder: Path, name: str, *, now: float, days: float = SERVER_DAYS
) -> tuple[Path, Path]:
    """The paths of `{name}.pem` and `{name}.key`: a client certificate of ours, for the broker.

    The aggregator's own is made anew at every start of the service; it outlives any time between two restarts.
    """
    certificate_path, key_path = folder / f"{name}.pem", folder / f"{name}.key"
    key_pem = generate_tls_key()
    request = make_csr(key_pem, name).decode("ascii")
    issued = authority.issue_device(request, name, now=now, days=days)
    write_private(key_path, key_pem)
    write_private(certificate_path, issued.pem.encode("ascii"))
    return certificate_path, key_path


def refresh_revocation_list(
    authorities: Sequence[CertificateAuthority], path: Path, serials: Iterable[str], *, now: float
) -> bool:
    """Writes the list that a broker reads, where there is none, it says something else, or it is a day old.

    One after the other for every authority whose certificates count, since a broker asks for the list of the one that
    signed what it is shown. A broker lets nobody in by a list from its future, and of two lists of one second it goes
    on with the older. So a list begins an hour back, as certificates do, and a second after the one before it.

    Returns:
        Whether it was written: the broker must read it again (`RunningBroker.reload`).
    """
    wanted = set(serials)
    issued = _utc(now) - _BACKDATED
    present = _read_revocation_lists(path)
    if present:
        begun = max(each.last_update_utc for each in present)
        is_good = (
            len(present) == len(authorities)
            and all(each.has_signed(listed) for each, listed in zip(authorities, present, strict=True))
            and all({f"{entry.serial_number:x}" for entry in listed} == wanted for listed in present)
        )
        if is_good and begun <= _utc(now) and issued - begun < timedelta(days=1):
            return False
        issued = min(max(issued, begun + timedelta(seconds=1)), _utc(now))
    lists = [each.revocation_list(wanted, issued=issued.timestamp()) for each in authorities]
    write_private(path, b"".join(lists))
    return True


def _read_revocation_lists(path: Path) -> list[x509.CertificateRevocationList]:
    """Those in a file; none where it cannot be read: it is written anew then."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return [x509.load_pem_x509_crl(each) for each in _LISTS.findall(path.read_bytes())]
    return []


def certificate_ends(folder: Path) -> dict[str, float]:
    """When each certificate in the authority's folder ends, unix seconds, by its file's name.

    Raises:
        ConfigurationError: (operator) one of them cannot be read.
    """
    ends = {}
    for path in sorted(folder.glob("*.pem")):
        try:
            certificate = x509.load_pem_x509_certificate(read_private(path))
        except ValueError as error:
            raise ConfigurationError(f"{path} is no certificate", hint="restore ca/") from error
        ends[path.stem] = certificate.not_valid_after_utc.timestamp()
    return ends


def _is_good(authority: CertificateAuthority, pem: bytes, names: Sequence[str], now: float) -> bool:
    certificate = x509.load_pem_x509_certificate(pem)
    if not authority.has_issued(certificate):
        return False
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    renew_at = certificate.not_valid_after_utc - timedelta(days=SERVER_DAYS / 10)
    return list(extension.value) == _general_names(names) and _utc(now) < renew_at


def _requested_key(csr_pem: str, device: str) -> Ed25519PublicKey:
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode("ascii"))
        is_signed = request.is_signature_valid
        key = request.public_key()
        names = [str(name.value) for name in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise EnrolmentError("the certificate request cannot be read", code="csr") from error
    if not is_signed:
        raise EnrolmentError("the certificate request is not signed by its own key", code="csr")
    if names != [device]:
        raise EnrolmentError("the certificate request names another device", code="csr")
    if not isinstance(key, Ed25519PublicKey):
        raise EnrolmentError("the certificate request is not for an Ed25519 key", code="csr")
    return key


def _self_signed(key: Ed25519PrivateKey, name: str, now: float) -> bytes:
    when = _utc(now)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        _builder(name, subject, key.public_key(), when - _BACKDATED, when + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_ca=True), critical=True)
        .sign(key, None)
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def _builder(
    name: str, issuer: x509.Name, public: Ed25519PublicKey, not_before: datetime, not_after: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_names(names: Sequence[str]) -> list[x509.GeneralName]:
    result: list[x509.GeneralName] = []
    for name in names:
        try:
            result.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            try:
                result.append(x509.DNSName(name))
            except ValueError as error:
                raise ConfigurationError(f"{name!r} cannot stand in a certificate", name=name) from error
    return result


def _load_key(pem: bytes) -> Ed25519PrivateKey:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError("the TLS key is not an Ed25519 key")
    return key


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, tz=UTC).replace(microsecond=0)
