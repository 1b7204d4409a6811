"""Minting and checking enrolment tokens.

Laws of the file: the secret exists only in the token that is printed, the database holds its hash; secrets
are compared in constant time; an unknown token and a wrong secret are one and the same refusal.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import math
import secrets
from dataclasses import dataclass

from cloud_server.db.engine import Connection
from cloud_server.db.tokens import TokenRow, delete_expired_tokens, insert_token, load_token
from wire.enrolment import EnrolmentToken
from wire.errors import ConfigurationError, EnrolmentError
from wire.topics import ID

DEFAULT_LIFE_SECONDS = 24 * 3600.0
MAX_LIFE_SECONDS = 366 * 24 * 3600.0
MAX_USES = 100_000
# Long enough that a device with an old token hears "expired" and not "unknown".
KEPT_AFTER_EXPIRY_SECONDS = 90 * 24 * 3600.0
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class Door:
    """Where a device enrols: what a token says besides its secret."""

    url: str
    tls_name: str
    ca_sha256: str


def mint_token(
    connection: Connection,
    door: Door,
    *,
    now: float,
    device: str = "",
    uses: int = 1,
    approves: bool | None = None,
    life_seconds: float = DEFAULT_LIFE_SECONDS,
) -> EnrolmentToken:
    """Makes a token and keeps its hash, in the caller's transaction.

    Args:
        device: the only name that it enrols, or empty for any free name.
        uses: how many devices it lets in.
        approves: whether they take part at once; by default only the device of a one-use token does.

    Raises:
        ConfigurationError: (operator) a name, number or life out of bounds.
    """
    if device and not ID.fullmatch(device):
        raise ConfigurationError(
            f"{device[:80]!r} cannot be a device's name", hint="use A-Z a-z 0-9 _ - (1 to 64)"
        )
    if not 1 <= uses <= MAX_USES:
        raise ConfigurationError(f"a token cannot have {uses} uses", hint=f"1 to {MAX_USES}")
    if device and uses != 1:
        raise ConfigurationError(
            "a token for one name is for one use", hint="leave the name or the uses away"
        )
    if not 0 < life_seconds <= MAX_LIFE_SECONDS:
        raise ConfigurationError("a token lives more than 0 and at most 366 days")
    secret = secrets.token_bytes(_SECRET_BYTES)
    row = TokenRow(
        id=secrets.token_hex(8),
        secret_hash=hashlib.sha256(secret).hexdigest(),
        name=device,
        uses_left=uses,
        approves=uses == 1 if approves is None else approves,
        expires=math.floor(now + life_seconds),
        created=now,
    )
    delete_expired_tokens(connection, now - KEPT_AFTER_EXPIRY_SECONDS)
    insert_token(connection, row)
    return EnrolmentToken(
        url=door.url,
        tls_name=door.tls_name,
        ca_sha256=door.ca_sha256,
        token_id=row.id,
        secret=base64.urlsafe_b64encode(secret).rstrip(b"=").decode("ascii"),
        device=device,
        expires=int(row.expires),
    )


def check_token(connection: Connection, token_id: str, secret: str, *, device: str, now: float) -> TokenRow:
    """The token, held until the transaction ends. Whether a use is left is the caller's to ask.

    Raises:
        EnrolmentError: (peer) `code` is `token` (unknown or wrong secret), `token_expired` or `name`.
    """
    row = load_token(connection, token_id)
    is_right = hmac.compare_digest(_hash(secret), row.secret_hash if row is not None else "0" * 64)
    if row is None or not is_right:
        raise EnrolmentError("the token is not one of ours", code="token", hint="ask for a new token")
    if row.expires < now:
        raise EnrolmentError("the token has expired", code="token_expired", hint="ask for a new token")
    if row.name and row.name != device:
        raise EnrolmentError(
            "the token is for another name", code="name", hint="enrol under the token's name"
        )
    return row


def _hash(secret: str) -> str:
    """SHA-256 (hex) of the secret's bytes; of nothing that a token could have, for text that is no secret."""
    try:
        raw = base64.b64decode(secret + "=" * (-len(secret) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return "f" * 64
    return hashlib.sha256(raw).hexdigest()
