"""Minting and checking enrolment tokens.

Laws of the file: the secret exists only in the token that is printed, the database holds its hash; secrets
are compared in constant time; an unknown token and a wrong secret are one and the same refusal, and nothing
else is said to whoever does not know the secret.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import itertools
import math
import re
import secrets
from dataclasses import dataclass

from cloud_server.db.devices import load_device, load_devices
from cloud_server.db.engine import Connection
from cloud_server.db.tokens import (
    TokenRow,
    delete_expired_tokens,
    insert_token,
    load_promised_names,
    load_token,
)
from cloud_server.registry import AGGREGATOR_NAME
from wire.enrolment import EnrolmentToken
from wire.errors import ConfigurationError, EnrolmentError
from wire.topics import ID

DEFAULT_LIFE_SECONDS = 24 * 3600.0
MAX_LIFE_SECONDS = 366 * 24 * 3600.0
MAX_USES = 100_000
# Long enough that a device with an old token hears "expired" and not "unknown".
KEPT_AFTER_EXPIRY_SECONDS = 90 * 24 * 3600.0
_SECRET_BYTES = 32
_PATTERN = re.compile(r"([A-Za-z0-9_-]*)\{n(?::0([1-9]))?\}([A-Za-z0-9_-]*)")
_NAME_HINT = "use A-Z a-z 0-9 _ - (1 to 64)"


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
        device: the only name that it enrols; `cam-*` for every name that begins so; empty for any free one.
        uses: how many devices it lets in.
        approves: whether they take part at once; by default only the device of a one-use token does.

    Raises:
        ConfigurationError: (operator) a name, number or life out of bounds, or a name that is taken.
    """
    _check_name(connection, device)
    if not 1 <= uses <= MAX_USES:
        raise ConfigurationError(f"a token cannot have {uses} uses", hint=f"1 to {MAX_USES}")
    if device and uses != 1 and not device.endswith("*"):
        raise ConfigurationError(
            "a token for one name is for one use",
            hint=f"for every name that begins so: {device}*; or leave the name or the uses away",
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
        uses=uses,
    )
    delete_expired_tokens(connection, now - KEPT_AFTER_EXPIRY_SECONDS)
    insert_token(connection, row)
    return EnrolmentToken(
        url=door.url,
        tls_name=door.tls_name,
        ca_sha256=door.ca_sha256,
        token_id=row.id,
        secret=base64.urlsafe_b64encode(secret).rstrip(b"=").decode("ascii"),
        device="" if device.endswith("*") else device,
        expires=int(row.expires),
    )


def free_names(connection: Connection, pattern: str, count: int, *, now: float) -> list[str]:
    """The next names of a pattern that no device has and no open token is for.

    Args:
        pattern: a name with `{n}` where its number goes, from 1; `{n:03}` writes it as 001.

    Raises:
        ConfigurationError: (operator) not a pattern, or its names would be no names.
    """
    match = _PATTERN.fullmatch(pattern)
    if match is None:
        raise ConfigurationError(
            f"{pattern[:80]!r} does not say where the number of each name goes",
            hint="for instance cam-{n:03}",
        )
    before, width, after = match.groups()
    taken = {row.device for row in load_devices(connection)} | load_promised_names(connection, now)
    names = (f"{before}{number:0{width or 1}d}{after}" for number in itertools.count(1))
    chosen = list(itertools.islice((name for name in names if name not in taken), count))
    for name in chosen:
        _check_name(connection, name)
    return chosen


def _check_name(connection: Connection, name: str) -> None:
    """Raises `ConfigurationError` for what no device can be called, or one is called already."""
    if name and not ID.fullmatch(name.removesuffix("*")):
        raise ConfigurationError(f"{name[:80]!r} cannot be a device's name", hint=_NAME_HINT)
    if name == AGGREGATOR_NAME or (name and load_device(connection, name) is not None):
        raise ConfigurationError(
            f"the name {name} is taken",
            hint="a device's name is for ever, a revoked one's too: choose another",
        )


def find_token(connection: Connection, token_id: str, secret: str, *, hold: bool = True) -> TokenRow:
    """The token that somebody knows the secret of, whether it can still be used or not.

    Args:
        hold: keep it from other transactions until this one ends.

    Raises:
        EnrolmentError: (peer) `code` is `token`: unknown, or a wrong secret.
    """
    row = load_token(connection, token_id, hold=hold)
    is_right = hmac.compare_digest(_hash(secret), row.secret_hash if row is not None else "0" * 64)
    if row is None or not is_right:
        raise EnrolmentError("the token is not one of ours", code="token", hint="ask for a new token")
    return row


def check_open(row: TokenRow, *, device: str, now: float) -> None:
    """Whether a token lets a new device of this name in.

    Raises:
        EnrolmentError: (peer) `code` is `token_used`, `token_expired` or `name`.
    """
    if row.uses_left < 1:
        raise EnrolmentError("the token was used", code="token_used", hint="ask for a new token")
    if row.expires < now:
        raise EnrolmentError("the token has expired", code="token_expired", hint="ask for a new token")
    if row.name.endswith("*") and not device.startswith(row.name[:-1]):
        raise EnrolmentError(
            f"the token is for names that begin with {row.name[:-1]}",
            code="name",
            hint="choose such a name with --name",
        )
    if row.name and not row.name.endswith("*") and row.name != device:
        raise EnrolmentError(
            "the token is for another name", code="name", hint="enrol under the token's name"
        )


def _hash(secret: str) -> str:
    """SHA-256 (hex) of the secret's bytes; of nothing that a token could have, for text that is no secret."""
    try:
        raw = base64.b64decode(secret + "=" * (-len(secret) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return "f" * 64
    return hashlib.sha256(raw).hexdigest()
