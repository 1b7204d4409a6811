"""How a device gets its identity from one token, its next certificate before the old one expires, and one when it
was away for longer.

Laws of the file: nothing is sent before the server has shown a certificate of the very CA that the token
pins; private keys are made here and never leave; an identity appears whole or not at all. Source:
wire/enrolment.py.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import shutil
import ssl
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from edge_agent.enrolment import identity as identity_files
from edge_agent.enrolment.https import (
    BUSY,
    HttpsConnection,
    exchange,
    identity_context,
    unverified_context,
    verified_context,
)
from edge_agent.enrolment.identity import Identity
from edge_agent.enrolment.patience import Patience
from edge_agent.store.disk import write_durably
from process.clock import Clock
from wire.enrolment import (
    MAX_BODY_BYTES,
    Challenge,
    EnrolmentToken,
    EnrolRequest,
    EnrolResponse,
    LateRenewRequest,
    Refusal,
    RenewRequest,
    RenewResponse,
    decode_json,
    encode_json,
    late_proof_bytes,
    proof_bytes,
)
from wire.errors import EnrolmentError, MessageError, StorageError, TransportError, TrustError
from wire.primitives import (
    SigningKey,
    certificate_fingerprint,
    certificate_fingerprints,
    certificate_not_after,
    certificate_validity,
    generate_tls_key,
    make_csr,
    read_private,
    write_private,
)

CA_PATH: Final = "/v1/ca"
ENROL_PATH: Final = "/v1/enroll"
RENEW_PATH: Final = "/v1/renew"
CHALLENGE_PATH: Final = "/v1/challenge"
LATE_RENEWAL_PATH: Final = "/v1/late-renewal"
RENEW_AFTER_SHARE: Final = 2 / 3
_DEVICE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ATTEMPT: Final = ".enrolling-"
_MAX_CA_BYTES: Final = 16_384
_REFUSALS: Final = ("CERTIFICATE_EXPIRED", "UNKNOWN_CA")
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)

_HINTS: Final = {
    "token": "ask for a new token: shoal-cloud device add",
    "token_used": "ask for a new token: shoal-cloud device add",
    "token_expired": "ask for a new token: shoal-cloud device add",
    "name": "device names are 1 to 64 of A-Z a-z 0-9 _ -",
    "name_taken": "choose another name with --name, or revoke the other device first",
    "revoked": "it stays out: enrol it anew, under another name, with a new token",
    "quarantined": "ask the operator to look at it: shoal-cloud device approve NAME; then it renews by itself",
    "too_late": "ask the operator to revoke it, and enrol it anew, under another name, with a new token",
    "update_key": "the aggregator knows no such device with this key: enrol it anew with a new token",
    "busy": "try again in a minute",
}
R = TypeVar("R", EnrolResponse, RenewResponse, Challenge)


def parse_token(text: str) -> EnrolmentToken:
    """Reads a token; raises `EnrolmentError` when it is not one."""
    return EnrolmentToken.parse(text)


def enrol(
    token: str,
    folder: Path,
    *,
    name: str | None = None,
    clock: Clock,
    patience: Patience | None = None,
) -> Identity:
    """Makes this machine a device of the fleet that the token is for.

    Args:
        folder: the state folder; `identity/` appears in it.
        name: the device's name; None takes the token's.
        patience: how long an aggregator that is busy, or not there, is asked again; None asks once.

    Raises:
        EnrolmentError: the token is damaged, expired, used, or for another name; or the server is not the one
            that the token pins.
        ConfigurationError: there is an identity in the folder already.
        TransportError: the aggregator cannot be reached.
        StorageError: the folder cannot be written.
    """
    parsed = parse_token(token)
    device = _device_name(parsed, name)
    if parsed.expires and parsed.expires < clock.now():
        raise EnrolmentError("the enrolment token has expired", hint=_HINTS["token_expired"])
    identity_files.refuse_second(folder)
    if patience is None:
        return _enrol_once(parsed, device, folder)
    return patience.keep_trying(lambda: _enrol_once(parsed, device, folder))


def _enrol_once(parsed: EnrolmentToken, device: str, folder: Path) -> Identity:
    ca_pem = _fetch_ca(parsed)
    tls_key, update_key = _keys_of_attempt(folder, parsed.token_id)
    csr = make_csr(tls_key, device).decode("ascii")
    request = EnrolRequest(
        token_id=parsed.token_id,
        secret=parsed.secret,
        device=device,
        csr=csr,
        update_key=update_key.public_bytes.hex(),
        proof=update_key.sign(proof_bytes(parsed.token_id, device, csr)).hex(),
    )
    connection = HttpsConnection(parsed.url, tls_name=parsed.tls_name, context=verified_context(ca_pem))
    try:
        response = _post(connection, ENROL_PATH, encode_json(request), EnrolResponse)
    except EnrolmentError as error:
        # Refused for good: these keys were not registered, and never will be with this token.
        if error.facts.get("code", "busy") != "busy":
            _forget_attempt(folder)
        raise
    if certificate_fingerprint(response.ca.encode()).hex() != parsed.ca_sha256 or response.device != device:
        raise EnrolmentError("the aggregator answered for another device or CA")
    identity = identity_files.from_response(
        response, url_enrol=parsed.url, update_key=update_key, folder=folder / identity_files.FOLDER_NAME
    )
    identity_files.save(identity, folder, tls_key_pem=tls_key)
    _forget_attempt(folder)
    return identity


def _keys_of_attempt(folder: Path, token_id: str) -> tuple[bytes, SigningKey]:
    """TLS key (PEM) and update key of this token's attempt.

    They are kept until the answer is: when it is lost on the way, the same request is answered again, while
    new keys would find their token used.
    """
    place = folder / f"{_ATTEMPT}{token_id}"
    try:
        return read_private(place / identity_files.TLS_KEY), SigningKey(
            read_private(place / identity_files.UPDATE_KEY)
        )
    except (StorageError, TrustError):
        _forget_attempt(folder)
    tls_key, update_key = generate_tls_key(), SigningKey.generate()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # `parents` alone would leave it open to others
        place.mkdir(mode=0o700)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}") from error
    write_private(place / identity_files.TLS_KEY, tls_key)
    write_private(place / identity_files.UPDATE_KEY, update_key.private_bytes())
    return tls_key, update_key


def _forget_attempt(folder: Path) -> None:
    for place in folder.glob(f"{_ATTEMPT}*"):
        shutil.rmtree(place, ignore_errors=True)


def renewal_is_due(identity: Identity, now: float) -> bool:
    """Whether two thirds of the certificate's life are over. `now` in unix seconds."""
    begins, ends = certificate_validity(identity.certificate_pem)
    return now - begins >= RENEW_AFTER_SHARE * (ends - begins)


def renew(identity: Identity) -> Identity:
    """Gets the next certificate for the same TLS key, over mutual TLS; on disk when it returns.

    Raises:
        EnrolmentError: the aggregator refuses (a revoked device), or answers with what cannot be used.
        TransportError: the aggregator cannot be reached.
    """
    connection = HttpsConnection(
        identity.url_api, tls_name=identity.tls_name, context=identity_context(identity)
    )
    body = encode_json(RenewRequest(csr=_request_of(identity)))
    return _take(identity, _post(connection, RENEW_PATH, body, RenewResponse))


def renew_late(identity: Identity) -> Identity:
    """Gets the next certificate of a device whose own has expired: its update key says who it is.

    Raises:
        EnrolmentError: the aggregator refuses (`code` is `revoked`, `quarantined` or `too_late`, or the key is not
            one that it knows), or answers with what cannot be used.
        TransportError: the aggregator cannot be reached.
        TrustError: it is not the aggregator of this device's CA.
    """
    context = verified_context(identity.ca_pem)

    def connection() -> HttpsConnection:
        return HttpsConnection(identity.url_enrol, tls_name=identity.tls_name, context=context)

    challenge = _post(connection(), CHALLENGE_PATH, b"", Challenge).challenge
    csr = _request_of(identity)
    signed = late_proof_bytes(
        tenant=identity.tenant,
        fleet=identity.fleet,
        ca_sha256=certificate_fingerprint(identity.ca_pem).hex(),
        device=identity.device,
        challenge=challenge,
        csr=csr,
    )
    request = LateRenewRequest(
        device=identity.device, csr=csr, challenge=challenge, proof=identity.update_key.sign(signed).hex()
    )
    return _take(identity, _post(connection(), LATE_RENEWAL_PATH, encode_json(request), RenewResponse))


def is_expired(identity: Identity, now: float) -> bool:
    """Whether the certificate's life is over. `now` in unix seconds."""
    return now >= certificate_not_after(identity.certificate_pem)


def was_refused(error: TransportError) -> bool:
    """Whether a connection failed as it does when our certificate counts no more: the other side's clock saw it
    expired, or its authority was replaced.

    A server on Python's asyncio, as the aggregator's, does not say so: it closes what it just let in, so that this may
    also be a network that broke. Who renews for nothing has lost nothing.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError) and any(each in (cause.reason or "") for each in _REFUSALS):
            return True
        if isinstance(cause, ConnectionResetError | BrokenPipeError | ssl.SSLEOFError):
            return True
        cause = cause.__cause__
    return False


def _request_of(identity: Identity) -> str:
    return make_csr(read_private(identity.tls_key_path), identity.device).decode("ascii")


def _take(identity: Identity, response: RenewResponse) -> Identity:
    """Keeps a new certificate, once it is seen to be a later one of a CA that we know."""
    certificate = response.certificate.encode()
    if certificate_fingerprint(response.ca.encode()) not in certificate_fingerprints(identity.ca_pem):
        raise EnrolmentError("the aggregator answered with another CA", hint="enrol this device anew")
    if certificate_not_after(certificate) < certificate_not_after(identity.certificate_pem):
        raise EnrolmentError("the aggregator answered with a certificate that ends earlier")
    write_durably(identity.certificate_path, certificate)
    return identity_files.with_certificate(identity, certificate)


def _device_name(token: EnrolmentToken, name: str | None) -> str:
    device = name or token.device
    if not device:
        raise EnrolmentError("this token leaves the device's name open", hint="give one with --name")
    if not _DEVICE.fullmatch(device):
        raise EnrolmentError(f"{device[:80]!r} cannot be a device's name", hint=_HINTS["name"])
    if token.device and token.device != device:
        raise EnrolmentError(
            f"this token is for device {token.device}, not {device}",
            hint="leave --name away, or ask for another token",
        )
    return device


def _fetch_ca(token: EnrolmentToken) -> bytes:
    """The CA certificate, over a connection that proves nothing: only the pinned hash decides."""
    connection = HttpsConnection(token.url, tls_name=token.tls_name, context=unverified_context())
    status, data = exchange(connection, "GET", CA_PATH, limit_bytes=_MAX_CA_BYTES)
    if status in BUSY:
        raise TransportError(
            f"{token.url} is busy: {status}", hint=_HINTS["busy"], asked_seconds=connection.asked_seconds
        )
    found = _CERTIFICATE.search(data.decode("ascii", "replace")) if status == http.client.OK else None
    if found is not None:
        try:
            der = ssl.PEM_cert_to_DER_cert(found.group())
        except ValueError:
            der = b""
        if hashlib.sha256(der).hexdigest() == token.ca_sha256:
            return found.group().encode() + b"\n"
    raise EnrolmentError(
        f"{token.url} does not have the CA that the token pins",
        hint="somebody is in between, or the token is of another aggregator: nothing was sent to it",
    )


def _post(connection: HttpsConnection, path: str, body: bytes, kind: type[R]) -> R:
    status, data = exchange(connection, "POST", path, body, limit_bytes=2 * MAX_BODY_BYTES)
    if status == http.client.OK:
        try:
            return decode_json(data, kind)
        except MessageError as error:
            raise EnrolmentError(
                f"{connection.url}{path} answered with what we cannot read: {error}"
            ) from error
    try:
        refusal = msgspec.json.decode(data, type=Refusal)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        refusal = Refusal(error=str(status))
    message = refusal.message or refusal.error
    raise EnrolmentError(
        f"{connection.url}{path} refused: {message[:300]}",
        hint=_HINTS.get(refusal.error, ""),
        code=refusal.error[:64],
        status=status,
        asked_seconds=connection.asked_seconds,
    )
