"""Signs heads of the audit chain: every so many entries, every so many minutes, and at each release.

Laws of the file: a head is signed over what is committed, in a transaction that keeps other writers out; the
same chain is not signed twice; a witness that is away costs nothing but its own delay, and is told later what it
missed, in order. The key is online like the others that the service signs with: who has it *and* the database
can write a new chain, but not one that agrees with the heads that TUF's metadata and the witness keep.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any, Protocol

import msgspec

from cloud_server.audit.check import ListedKey, head_to_plain, sign_head
from cloud_server.db import audit as chain
from cloud_server.db.audit import HeadRow
from cloud_server.db.engine import Database
from cloud_server.db.privacy import last_charge
from cloud_server.privacy.ledger import CHARGED, anchor_of
from process.clock import Clock
from process.logs import get_logger
from wire.errors import ReleaseError, ShoalError, TrustError
from wire.primitives import SigningKey, VerifyKey

_log = get_logger("cloud.audit")

LOOK_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NotaryPolicy:
    """When a head is due: so many unsigned entries, or the oldest of them so old; and after each charge of privacy."""

    entries: int = 256
    seconds: float = 600.0


class Witness(Protocol):
    """Somebody else who keeps heads."""

    def tell(self, row: HeadRow) -> None:
        """Hands a head over.

        Raises:
            ShoalError: it was not taken; it will be told again.
        """


class KeyList(Protocol):
    """Where devices and auditors find public keys, signed; the TUF repository is one."""

    def audit_keys(self) -> bytes | None: ...

    def set_audit_keys(self, data: bytes) -> None: ...


class Notary:
    """Signs the heads of one database. From any thread.

    Args:
        key: gives the audit key of now, since a command may replace it while the service runs.
    """

    def __init__(
        self,
        database: Database,
        key: Callable[[], SigningKey],
        clock: Clock,
        *,
        policy: NotaryPolicy | None = None,
        witness: Witness | None = None,
    ) -> None:
        self._database = database
        self._key = key
        self._clock = clock
        self._policy = policy or NotaryPolicy()
        self._witness = witness

    def sign(self) -> HeadRow | None:
        """The head of the chain as it is now, signed; None for an empty chain."""
        with self._database.transaction(fence=self._database.claimed) as connection:
            incarnation = chain.hold_chain(connection)
            last, head = chain.newest_entry(connection), chain.newest_head(connection)
            if last is None:
                return None
            if head is not None and head.seq >= last.seq:
                return head
            made = sign_head(
                self._key(), seq=last.seq, hash=last.hash, at=self._clock.now(), incarnation=incarnation
            )
            chain.insert_head(connection, made)
        return made

    def anchor(self) -> Mapping[str, Any] | None:
        """A fresh head, as release metadata carries it beside a statement: text, since TUF's JSON has no fractions; and
        how long the privacy ledger is, for a database that comes from a backup."""
        head = self.sign()
        if head is None:
            return None
        found = {"audit": json.dumps(head_to_plain(head), sort_keys=True)}
        with self._database.read() as connection:
            charge = last_charge(connection)
        return found if charge is None else {**found, **anchor_of(*charge)}

    def tick(self) -> None:
        """Signs if it is due, and tells the witness what it does not know yet."""
        if self._is_due():
            self.sign()
        if self._witness is None:
            return
        with self._database.read() as connection:
            untold = chain.load_heads(connection, is_unwitnessed=True)
        for head in untold:
            self._witness.tell(head)
            with self._database.transaction(fence=self._database.claimed) as connection:
                chain.note_witnessed(connection, head.seq, self._clock.now())

    def _is_due(self) -> bool:
        with self._database.read() as connection:
            head = chain.newest_head(connection)
            signed = 0 if head is None else head.seq
            last = chain.newest_entry(connection)
            oldest = next(chain.load_audit(connection, after=signed, limit=1), None)
            charged = next(chain.load_audit(connection, after=signed, kind=CHARGED, limit=1), None)
        if last is None or oldest is None:
            return False
        age = self._clock.now() - oldest.at
        # A charge that nobody has signed for could be cut off unseen.
        is_many = last.seq - signed >= self._policy.entries
        return is_many or charged is not None or age >= self._policy.seconds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Ticks on a thread of its own while the block runs: a slow witness must not hold up the service."""
        ended = Event()
        thread = Thread(target=self._watch, args=(ended,), name="notary", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _watch(self, ended: Event) -> None:
        told_at = 0.0
        while not ended.wait(LOOK_SECONDS):
            try:
                self.tick()
            except ShoalError as error:
                # Each minute at most: a witness may be away for days.
                if time.monotonic() - told_at > 60.0:
                    told_at = time.monotonic()
                    _log.error("audit_head_not_kept", error=str(error), hint=error.hint)


# ---- the keys that may sign heads --------------------------------------------------------------------------


class _Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One audit key. `last`: the longest chain that it may have signed; 0 for any."""

    id: str
    public: str
    last: int = 0


class _Listed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`keys/audit.json`; the newest key first."""

    audit: tuple[_Key, ...]


def list_key(repository: KeyList, key: SigningKey, *, retired_at: int = 0) -> None:
    """Makes sure that the release metadata lists the audit key; keys that were listed stay, since their heads do.

    Args:
        retired_at: keys before this one count for chains up to so long, and no longer; 0 leaves them as they are.
    """
    found = repository.audit_keys()
    listed = () if found is None else _read(found).audit
    mine = _Key(id=key.key_id.hex(), public=key.public_bytes.hex())
    if mine.id in {each.id for each in listed}:
        return
    if retired_at:
        listed = tuple(
            msgspec.structs.replace(each, last=min(each.last or retired_at, retired_at)) for each in listed
        )
    plain = {"audit": [msgspec.to_builtins(each) for each in (mine, *listed)]}
    repository.set_audit_keys(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


def listed_keys(data: bytes | None) -> dict[str, ListedKey]:
    """Key id (hex) → key, of `keys/audit.json`; none where there is no such file.

    Raises:
        ReleaseError: (us) the file is not what it should be.
    """
    found: dict[str, ListedKey] = {}
    for each in () if data is None else _read(data).audit:
        try:
            key = VerifyKey(bytes.fromhex(each.public))
        except (TrustError, ValueError) as error:
            raise ReleaseError("keys/audit.json lists what is no key") from error
        found[key.key_id.hex()] = ListedKey(key, each.last)
    return found


def _read(data: bytes) -> _Listed:
    try:
        return msgspec.json.decode(data, type=_Listed, strict=True)
    except msgspec.MsgspecError as error:
        raise ReleaseError(f"keys/audit.json is not what it should be: {error}") from error
