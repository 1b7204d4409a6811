"""What a device and the aggregator say over HTTPS: the enrolment token, enrolment and renewal of a
certificate.

Laws of the file: types and their bounds only, no I/O, no keys; any bytes in give a value or one of our
errors. Bodies are JSON (`application/json`, at most 64 KiB), binary values in lower-case hex, certificates
and requests in PEM.

    POST /v1/enroll   EnrolRequest  -> EnrolResponse | Refusal     (server certificate pinned by the token)
    GET  /v1/ca       -> the CA certificate in PEM, to be checked against the pin before anything is sent
    POST /v1/renew    RenewRequest  -> RenewResponse | Refusal     (mutual TLS)

A device whose certificate has expired renews over the port that asks for none, and proves itself by its update
key instead, over a challenge that is a minute or two old at most:

    POST /v1/challenge     (empty)           -> Challenge
    POST /v1/late-renewal  LateRenewRequest  -> RenewResponse | Refusal
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from wire.errors import EnrolmentError, MessageError

TOKEN_PREFIX = "shoal1."
MAX_TOKEN_CHARS = 2048
MAX_BODY_BYTES = 65_536
_PROOF_CONTEXT = b"shoal enrolment 1\0"
_LATE_CONTEXT = b"shoal late renewal 1\0"

DeviceId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
Hex32 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Hex = Annotated[str, Meta(pattern=r"^(?:[0-9a-f]{2})*\Z", max_length=8192)]
Pem = Annotated[str, Meta(max_length=16_384)]
Url = Annotated[str, Meta(max_length=512)]

RefusalCode = Literal[
    "bad_request",
    "token",
    "token_used",
    "token_expired",
    "name",
    "name_taken",
    "csr",
    "update_key",
    "revoked",
    "quarantined",
    "too_late",
    "challenge",
    "busy",
]


class EnrolmentToken(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line that lets a device in: where to go, whom to trust there, and a secret that works once (or N
    times).

    Attributes:
        url: `https://host:port` of the aggregator's public port.
        tls_name: the name that the server's certificate carries.
        ca_sha256: SHA-256 (hex) of the CA certificate in DER.
        secret: base64url without padding.
        device: the only name that it enrols, or empty for any free name.
        expires: unix seconds.
    """

    url: Url = msgspec.field(name="u")
    tls_name: Annotated[str, Meta(min_length=1, max_length=253)] = msgspec.field(name="n")
    ca_sha256: Hex32 = msgspec.field(name="p")
    token_id: Annotated[str, Meta(pattern=r"^[0-9a-f]{16,32}\Z")] = msgspec.field(name="i")
    secret: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{22,86}\Z")] = msgspec.field(name="s")
    device: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{0,64}\Z")] = msgspec.field(name="d")
    expires: Annotated[int, Meta(ge=0, le=2**53)] = msgspec.field(name="e")

    def __str__(self) -> str:
        """`shoal1.` and the base64url of the canonical JSON."""
        return TOKEN_PREFIX + base64.urlsafe_b64encode(_to_json(self)).rstrip(b"=").decode("ascii")

    def __repr__(self) -> str:
        return f"EnrolmentToken({self.token_id})"

    @classmethod
    def parse(cls, text: str) -> EnrolmentToken:
        """Reads a token as a person pasted it (white space around it is ignored).

        Raises:
            EnrolmentError: (operator) not a token of ours.
        """
        hint = "copy the whole line that `shoal-cloud device add` printed"
        stripped = text.strip()
        if not stripped.startswith(TOKEN_PREFIX) or len(stripped) > MAX_TOKEN_CHARS:
            raise EnrolmentError("this is not an enrolment token", hint=hint)
        body = stripped.removeprefix(TOKEN_PREFIX)
        try:
            plain = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            return msgspec.json.decode(plain, type=cls, strict=True)
        except (binascii.Error, ValueError, msgspec.MsgspecError, RecursionError) as error:
            raise EnrolmentError("the enrolment token is damaged", hint=hint) from error


class OnlineKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A public key of the aggregator, as `keys/online.json` lists it; an order key has no `algorithm`."""

    id: Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
    public: Hex
    algorithm: Annotated[str, Meta(max_length=32)] = ""


class EnrolRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device asks to be let in. Its private keys never leave it.

    Attributes:
        csr: PKCS#10 request (PEM) of the TLS key, its common name the device id.
        update_key: raw Ed25519 public key that will sign the device's messages.
        proof: signature by that key over `proof_bytes(...)`: nobody registers a key that is not theirs.
    """

    token_id: Annotated[str, Meta(max_length=64)]
    secret: Annotated[str, Meta(max_length=128)]
    device: Annotated[str, Meta(max_length=256)]
    csr: Pem
    update_key: Annotated[str, Meta(max_length=256)]
    proof: Annotated[str, Meta(max_length=256)]


class EnrolResponse(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device needs from now on.

    Attributes:
        certificate: the device's TLS certificate, PEM; 7 days.
        ca: the CA certificate, PEM (its hash is the token's pin).
        tuf_root: the first `root.json`, as text.
        device_url: `https://host:port` of the port with mutual TLS (metadata, targets, blobs, renewal).
        broker_url: `mqtt://host:port`, or `mqtts://…` with mutual TLS.
        ring: the ring that the device follows.
        status: `approved`, or `quarantined` while an operator has to approve it.
    """

    tenant: DeviceId
    fleet: DeviceId
    device: DeviceId
    certificate: Pem
    ca: Pem
    tuf_root: Annotated[str, Meta(max_length=65_536)]
    kem: Annotated[tuple[OnlineKey, ...], Meta(max_length=8)]
    orders: Annotated[tuple[OnlineKey, ...], Meta(max_length=8)]
    tls_name: Annotated[str, Meta(min_length=1, max_length=253)]
    device_url: Url
    broker_url: Url
    ring: DeviceId = "stable"
    status: Literal["approved", "quarantined"] = "approved"
    max_examples: Annotated[int, Meta(ge=1, le=2**31)] = 1_000_000


class RenewRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device asks for its next certificate; the name is that of the certificate it connects with."""

    csr: Pem


class RenewResponse(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The next certificate and the CA, PEM."""

    certificate: Pem
    ca: Pem


class Challenge(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device signs within two minutes, once. Opaque to it, and worth nothing without its key."""

    challenge: Annotated[str, Meta(pattern=r"^[0-9a-f]{2,128}\Z")]


class LateRenewRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device that was away longer than its certificate asks for the next one.

    Attributes:
        csr: as in `EnrolRequest`.
        challenge: as the aggregator gave it.
        proof: signature of the update key over `late_proof_bytes(...)`.
    """

    device: Annotated[str, Meta(max_length=256)]
    csr: Pem
    challenge: Annotated[str, Meta(max_length=128)]
    proof: Annotated[str, Meta(max_length=256)]


class Refusal(Struct, frozen=True, kw_only=True):
    """Body of every answer that is not 2xx: a word for the program, a sentence for the person."""

    error: str
    message: str = ""


S = TypeVar("S", bound=Struct)


def proof_bytes(token_id: str, device: str, csr: str) -> bytes:
    """What the update key signs at enrolment: this token, this name, this request."""
    return _signed(_PROOF_CONTEXT, token_id.encode(), device.encode(), hashlib.sha256(csr.encode()).digest())


def late_proof_bytes(
    *, tenant: str, fleet: str, ca_sha256: str, device: str, challenge: str, csr: str
) -> bytes:
    """What the update key signs at a late renewal: this deployment, this device, this challenge, this request.

    Args:
        ca_sha256: SHA-256 (hex) of the deployment's CA certificate in DER, so that no other one can pass it on.
    """
    names = (tenant, fleet, ca_sha256, device, challenge)
    return _signed(_LATE_CONTEXT, *(name.encode() for name in names), hashlib.sha256(csr.encode()).digest())


def _signed(context: bytes, *parts: bytes) -> bytes:
    return context + b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def encode_json(value: Struct) -> bytes:
    """Canonical JSON of a body."""
    return _to_json(value)


def decode_json(data: bytes, kind: type[S], *, limit_bytes: int = MAX_BODY_BYTES * 2) -> S:
    """Reads a body.

    Raises:
        MessageError: (peer) too long, not JSON, an unknown or missing key, a wrong type, out of bounds.
    """
    if len(data) > limit_bytes:
        raise MessageError("body is longer than allowed", size_bytes=len(data), limit_bytes=limit_bytes)
    try:
        return msgspec.json.decode(data, type=kind, strict=True)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"body is not a valid {kind.__name__}") from error


def _to_json(value: Struct) -> bytes:
    plain = msgspec.to_builtins(value)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
