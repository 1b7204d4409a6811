"""Whether an audit chain is whole: every entry in its place, and as long as its signed heads say. Pure.

Laws of the file: it reads what anybody can be given (an export, public keys) and needs no database; it does not
stop at the first fault: each is named by the number of its entry. An entry that was changed is found by its
hash; one that is missing in the middle by its number; entries that are missing at the end, or a whole chain
that was written anew, by a signed head. A head counts only when its key is one that the release metadata lists.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cloud_server.db.audit import FIRST_PREV, AuditEntry, HeadRow, entry_hash
from wire.errors import EnvelopeError, TrustError
from wire.primitives import SigningKey, VerifyKey

_CONTEXT = b"shoal audit head\0"


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault, at an entry."""

    seq: int
    what: str


@dataclass(frozen=True, slots=True)
class ListedKey:
    """A key that may have signed heads, of chains of at most `last` entries; 0 for any."""

    key: VerifyKey
    last: int = 0


@dataclass(frozen=True, slots=True)
class Anchor:
    """A head as somebody else than the database has it: release metadata, a witness."""

    where: str
    head: HeadRow


@dataclass(slots=True)
class Checked:
    """What a check found.

    Attributes:
        entries, heads: how many there are.
        signed: how many entries the newest good head covers; what was added since, nobody has signed.
    """

    entries: int = 0
    heads: int = 0
    signed: int = 0
    findings: list[Finding] = field(default_factory=list)


def statement(row: HeadRow) -> bytes:
    """What a head's signature is over."""
    plain = {"at": row.at, "hash": row.hash, "incarnation": row.incarnation, "seq": row.seq}
    return _CONTEXT + json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sign_head(key: SigningKey, *, seq: int, hash: str, at: float, incarnation: int) -> HeadRow:
    """The head of a chain of `seq` entries, the last of which has `hash`."""
    row = HeadRow(seq, hash, at, incarnation, key.key_id.hex(), "")
    return HeadRow(seq, hash, at, incarnation, row.key_id, key.sign(statement(row)).hex())


def head_to_plain(row: HeadRow) -> dict[str, Any]:
    """A head as JSON has it, for metadata, witnesses and exports."""
    return {name: getattr(row, name) for name in HeadRow.__slots__}


def head_from_plain(plain: object) -> HeadRow:
    """Reads what `head_to_plain` made.

    Raises:
        TrustError: (whoever kept it) it is no head.
    """
    try:
        return msgspec.convert(plain, HeadRow, strict=True)
    except msgspec.ValidationError as error:
        raise TrustError(f"this is no head of an audit chain: {error}") from error


def check_chain(
    entries: Iterable[AuditEntry],
    heads: Iterable[HeadRow],
    keys: Mapping[str, ListedKey],
    anchors: Iterable[Anchor] = (),
) -> Checked:
    """Looks at everything.

    Args:
        entries: in the order in which they are kept.
        keys: key id (hex) → key, of every key that may have signed a head.
    """
    result = Checked()
    claims = [Anchor("a signed head", head) for head in heads]
    result.heads = len(claims)
    claims += anchors
    wanted = {claim.head.seq for claim in claims}
    last, hashes = _walk(entries, wanted, result)
    for claim in claims:
        _check_claim(claim, last, hashes, keys, result)
    result.findings.sort(key=lambda finding: finding.seq)
    return result


def _walk(entries: Iterable[AuditEntry], wanted: set[int], result: Checked) -> tuple[int, dict[int, str]]:
    """Follows the chain; returns how far it goes, and the hashes of the entries that heads name."""
    hashes: dict[int, str] = {}
    seq, prev = 0, FIRST_PREV
    for entry in entries:
        result.entries += 1
        if entry.seq <= seq:
            result.findings.append(Finding(entry.seq, f"audit entry {entry.seq} stands behind {seq}"))
            continue
        if entry.seq > seq + 1:
            result.findings.append(Finding(seq + 1, _missing(seq + 1, entry.seq - 1)))
        elif entry.prev != prev:
            result.findings.append(Finding(entry.seq, f"audit entry {entry.seq} does not follow {seq}"))
        if entry.hash != entry_hash(entry.seq, entry.prev, entry.at, entry.kind, entry.body):
            result.findings.append(Finding(entry.seq, f"audit entry {entry.seq} was changed"))
        seq, prev = entry.seq, entry.hash
        if seq in wanted:
            hashes[seq] = prev
    return seq, hashes


def _check_claim(
    claim: Anchor, last: int, hashes: Mapping[int, str], keys: Mapping[str, ListedKey], result: Checked
) -> None:
    head = claim.head
    listed = keys.get(head.key_id)
    if listed is None:
        what = f"{claim.where} at entry {head.seq} is of the key {head.key_id[:16]}, which is not listed"
        result.findings.append(Finding(head.seq, what))
        return
    if 0 < listed.last < head.seq:
        what = f"{claim.where} at entry {head.seq} is of the key {head.key_id[:16]}, which ended at {listed.last}"
        result.findings.append(Finding(head.seq, what))
        return
    try:
        listed.key.verify(bytes.fromhex(head.signature), statement(head))
    except (EnvelopeError, ValueError):
        result.findings.append(Finding(head.seq, f"{claim.where} at entry {head.seq} is not signed"))
        return
    if head.seq > last:
        what = f"{_missing(last + 1, head.seq)} ({claim.where})"
        result.findings.append(Finding(last + 1, what))
    elif head.seq in hashes and hashes[head.seq] != head.hash:
        what = f"audit entry {head.seq}, or one before it, was written anew ({claim.where})"
        result.findings.append(Finding(head.seq, what))
    else:
        result.signed = max(result.signed, head.seq)


def _missing(first: int, last: int) -> str:
    return (
        f"audit entry {first} is missing" if first == last else f"audit entries {first} to {last} are missing"
    )
