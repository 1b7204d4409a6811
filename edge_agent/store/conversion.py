"""A database of the format before, whose rows lie in the clear, becomes one whose rows are sealed.

Laws of the file: the sealed copy is whole and on the disk before the clear one is touched, so that a power cut at any
moment leaves one of them in its place; afterwards the clear one, and its write-ahead log, are overwritten and gone.
What was damaged stays damaged: it is found, and counted, where the row is read. A flash card may keep old blocks all
the same: only a device that was erased before has none. Source: docs/architecture.md, "Data at rest".
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from edge_agent.store.at_rest import Vault
from edge_agent.store.disk import overwrite, shred, sync_folder
from edge_agent.store.salvage import lenient_text
from edge_agent.store.schema import PAGE_BYTES, PLAIN_FORMAT_VERSION, create, version_of
from edge_agent.store.sealed_rows import row_digest, sample_place, update_place, with_label
from process.logs import get_logger
from wire.errors import StorageError

_log = get_logger("edge_agent.store.storage")
_SEALED_SUFFIX: Final = ".sealed"
_PLAIN_SUFFIX: Final = ".plain"
_AS_THEY_ARE: Final = {
    "facts": "name, value, sha256",
    "outbox_totals": "state, total",
    "tombstones": "id, forgotten_at",
    "orders": "order_id, kind, run, round_number, update_id, seen_at",
    "windows": "kind, epoch, highest, bitmap",
    "sqlite_sequence": "name, seq",
}
# What a biased codec left out of an update is derived from data; the next round begins without it.
_LEFT_OUT: Final = "error_feedback"


def seal_plain_database(path: Path, vault: Vault) -> None:
    """Seals `agent.db` if it is of the format before; nothing happens to any other.

    Raises:
        StorageError: the disk is full, or cannot be written; the clear database is still there.
    """
    try:
        _finish(path)
        if not _is_plain(path):
            return
        try:
            copied = _make_sealed(path, vault)
        except sqlite3.OperationalError as error:
            # No room for two of them: samples are a cache, what is owed is not, and the device must start.
            _log.error("samples_dropped", reason=f"no room to seal them: {error}")
            _drop_partial(path)
            copied = _make_sealed(path, vault, with_samples=False)
        _put_in_place(path)
    except sqlite3.Error as error:
        raise StorageError(f"cannot seal {path}: {error}") from error
    except OSError as error:
        raise StorageError(f"cannot seal {path}: {error.strerror}") from error
    _log.info("database_sealed", **copied)


def _finish(path: Path) -> None:
    """After a power cut: a clear database that was moved away had a whole sealed one beside it."""
    sealed, plain = _beside(path, _SEALED_SUFFIX), _beside(path, _PLAIN_SUFFIX)
    if plain.exists():
        if not path.exists():
            os.replace(sealed if sealed.exists() else plain, path)
            sync_folder(path.parent)
        if plain.exists():
            shred(plain)
    _drop_partial(path)


def _drop_partial(path: Path) -> None:
    for suffix in ("", "-journal"):
        Path(f"{_beside(path, _SEALED_SUFFIX)}{suffix}").unlink(missing_ok=True)


def _is_plain(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return False
    damage = (sqlite3.Error, UnicodeDecodeError)
    with contextlib.suppress(*damage), contextlib.closing(_open(path)) as source:
        return version_of(source) == PLAIN_FORMAT_VERSION
    return False


def _make_sealed(path: Path, vault: Vault, *, with_samples: bool = True) -> dict[str, int]:
    sealed = _beside(path, _SEALED_SUFFIX)
    os.close(os.open(sealed, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with contextlib.closing(_open(path)) as source, contextlib.closing(_open(sealed)) as target:
        target.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        target.execute("PRAGMA synchronous = FULL")
        target.execute("BEGIN IMMEDIATE")
        create(target)
        copied = _copy_rows(source, target, vault)
        if with_samples:
            copied["samples"] = _copy_samples(source, target, vault)
        target.execute("COMMIT")
    return copied


def _copy_rows(source: sqlite3.Connection, target: sqlite3.Connection, vault: Vault) -> dict[str, int]:
    for table, columns in _AS_THEY_ARE.items():
        marks = ", ".join("?" for _ in columns.split(","))
        for row in _rows(source, f"SELECT {columns} FROM {table}"):
            if table != "facts" or row[0] != _LEFT_OUT:
                target.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", row)
    target.executemany(
        "INSERT INTO sealings (row, transfer, kem_key_id, sealed) VALUES (?, ?, x'', ?)",
        _rows(source, "SELECT row, transfer, sealed FROM sealings"),
    )
    return {"updates": _copy_outbox(source, target, vault)}


def _copy_outbox(source: sqlite3.Connection, target: sqlite3.Connection, vault: Vault) -> int:
    copied = 0
    names = "update_id, order_id, run, round_number, kind"
    sql = f"SELECT row, {names}, created, deadline, state, reason, ended_at, sha256, body FROM outbox"
    for number, *columns, state, reason, ended_at, digest, body in _rows(source, sql):
        key, sealed, sealed_digest = "", b"", b""
        if _was_intact_update(columns, body, digest) and body:
            place = update_place(*columns)
            key, sealed = vault.seal("outbox", place, body)
            sealed_digest = row_digest(place, key, sealed)
            copied += 1
        # One that was damaged has no digest: the outbox finds it so, and counts it.
        with contextlib.suppress(sqlite3.IntegrityError):
            target.execute(
                f"INSERT INTO outbox (row, {names}, created, deadline, state, reason, ended_at, at_rest_key_id, sha256,"
                " body) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (number, *columns, state, reason, ended_at, key, sealed_digest, sealed),
            )
    return copied


def _copy_samples(source: sqlite3.Connection, target: sqlite3.Connection, vault: Vault) -> int:
    copied = 0
    sql = "SELECT id, split, label, created, dtype, shape, consent, sha256, window FROM samples"
    for number, split, label, created, dtype, shape, consent, digest, window in _rows(source, sql):
        if not _was_intact_sample(window, dtype, shape, label, split, digest):
            continue
        columns = (number, split, int(label is not None), created, dtype, shape, consent)
        place = sample_place(*columns)
        key, sealed = vault.seal("samples", place, with_label(window, label))
        target.execute(
            "INSERT INTO samples (id, split, labelled, created, dtype, shape, consent, at_rest_key_id, sha256, window)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*columns, key, row_digest(place, key, sealed), sealed),
        )
        copied += 1
    return copied


def _was_intact_update(columns: list[Any], body: Any, digest: Any) -> bool:
    """By the digest of the format before."""
    if tuple(map(type, columns)) != (bytes, bytes, str, int, str, float, float) or type(body) is not bytes:
        return False
    update_id, order_id, run, round_number, kind = columns[:5]
    named = (update_id, order_id, run.encode(), struct.pack("<q", round_number), kind.encode())
    state = hashlib.sha256(b"".join(struct.pack("<I", len(part)) + part for part in named))
    state.update(body)
    return bool(state.digest() == digest)


def _was_intact_sample(window: Any, dtype: Any, shape: Any, label: Any, split: Any, digest: Any) -> bool:
    """By the digest of the format before."""
    if type(window) is not bytes:
        return False
    state = hashlib.sha256(f"{dtype}\0{shape}\0{label}\0{split}\0".encode())
    state.update(window)
    return bool(state.digest() == digest)


def _put_in_place(path: Path) -> None:
    """The order in which the files move is what `_finish` counts on."""
    _settle_log(path)
    os.replace(path, _beside(path, _PLAIN_SUFFIX))
    os.replace(_beside(path, _SEALED_SUFFIX), path)
    sync_folder(path.parent)
    shred(_beside(path, _PLAIN_SUFFIX))


def _settle_log(path: Path) -> None:
    """Nothing may be left of the write-ahead log, which would be taken for the new database's."""
    with contextlib.closing(_open(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(RESTART)")
        overwrite(_beside(path, "-wal"))
    for suffix in ("-wal", "-shm"):
        shred(_beside(path, suffix))


def _rows(source: sqlite3.Connection, sql: str) -> Iterator[tuple[Any, ...]]:
    """Up to the first page that cannot be read."""
    with contextlib.suppress(sqlite3.DatabaseError, UnicodeDecodeError):
        yield from source.execute(sql)


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.text_factory = lenient_text
    return connection


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
