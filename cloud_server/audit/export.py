"""The audit chain as a file that anybody can check without us: one JSON object a line.

    {"keys": {"<key id>": ["<public key>", last]}, "tenant": …, "fleet": …}   first; `last` as in ListedKey
    {"entry": {"seq", "prev", "hash", "at", "kind", "body"}}             in order; `body` is the text that was hashed
    {"head": {"seq", "hash", "at", "incarnation", "key_id", "signature"}}

Laws of the file: it is written line by line, so that a long chain needs no memory; what is read is bounded, and the
keys that it carries are believed only where nobody gives better ones (`--key`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

import msgspec

from cloud_server.audit.check import Checked, ListedKey, check_chain, head_from_plain, head_to_plain
from cloud_server.db.audit import AuditEntry, HeadRow
from wire.errors import StorageError, TrustError
from wire.primitives import VerifyKey

MAX_LINE_BYTES: Final = 256 * 2**20


def write_export(
    out: TextIO,
    *,
    about: Mapping[str, str],
    keys: Mapping[str, ListedKey],
    entries: Iterable[AuditEntry],
    heads: Iterable[HeadRow],
) -> int:
    """Writes everything; returns how many entries there were.

    Args:
        about: tenant and fleet.
    """
    listed = {name: [each.key.public_bytes.hex(), each.last] for name, each in keys.items()}
    _line(out, {**about, "keys": listed})
    count = 0
    for entry in entries:
        _line(out, {"entry": {name: getattr(entry, name) for name in AuditEntry.__slots__}})
        count += 1
    for head in heads:
        _line(out, {"head": head_to_plain(head)})
    return count


def _line(out: TextIO, plain: Mapping[str, Any]) -> None:
    out.write(json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n")


@dataclass
class _Reading:
    """What stands in an export besides its entries, as it is met."""

    keys: dict[str, ListedKey] = field(default_factory=dict)
    heads: list[HeadRow] = field(default_factory=list)


def check_export(path: Path, keys: Mapping[str, ListedKey] | None = None) -> Checked:
    """Checks an exported chain.

    Args:
        keys: that may have signed heads; None believes those of the file.

    Raises:
        StorageError: (operator) the file cannot be read.
        TrustError: (whoever wrote it) a line is none of ours.
    """
    reading = _Reading()
    entries = list(_read(path, reading))
    return check_chain(entries, reading.heads, reading.keys if keys is None else keys)


def _read(path: Path, reading: _Reading) -> Iterator[AuditEntry]:
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                try:
                    found = json.loads(line)
                    if "entry" in found:
                        yield msgspec.convert(found["entry"], AuditEntry, strict=True)
                    elif "head" in found:
                        reading.heads.append(head_from_plain(found["head"]))
                    else:
                        reading.keys.update(_keys(found["keys"]))
                except (
                    ValueError,
                    TypeError,
                    LookupError,
                    RecursionError,
                    AttributeError,
                    TrustError,
                ) as error:
                    raise TrustError(
                        f"line {number} of {path} is not of an audit chain", line=number
                    ) from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}", path=str(path)) from error


def _keys(listed: Mapping[str, tuple[str, int]]) -> dict[str, ListedKey]:
    found = (ListedKey(VerifyKey(bytes.fromhex(public)), int(last)) for public, last in listed.values())
    return {each.key.key_id.hex(): each for each in found}
