"""What a row of the outbox and one of the samples are bound to, and the digest that each carries.

Laws of the file: pure; everything in a row that is not sealed and does not change is bound to what is sealed, so that
no row opens with another's columns; the digest covers what lies on the disk (binding, key id, sealed bytes), so that
damage is told from a lost key without any key. SQLite is dynamically typed: a flipped bit in a record's header can
turn a blob into a number. Source: docs/architecture.md, "Data at rest".
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any, Final

from edge_agent.store.at_rest import bound

NO_LABEL: Final = -1
LABEL_BYTES: Final = 4
_LABEL: Final = struct.Struct("<i")


def update_place(
    update_id: bytes,
    order_id: bytes,
    run: str,
    round_number: int,
    kind: str,
    created: float,
    deadline: float,
) -> bytes:
    """What an outbox row is bound to."""
    numbers = struct.pack("<qdd", round_number, created, deadline)
    return bound(update_id, order_id, run.encode(), kind.encode(), numbers)


def sample_place(
    sample_id: int, split: str, labelled: int, created: float, dtype: str, shape: str, consent: str
) -> bytes:
    """What a sample is bound to."""
    numbers = struct.pack("<qqd", sample_id, labelled, created)
    return bound(numbers, split.encode(), dtype.encode(), shape.encode(), consent.encode())


def place_of_update(columns: tuple[Any, ...]) -> bytes | None:
    """As `update_place`, of columns as they were read; None when they are not what they should be."""
    if tuple(map(type, columns)) != (bytes, bytes, str, int, str, float, float):
        return None
    return update_place(*columns)


def place_of_sample(columns: tuple[Any, ...]) -> bytes | None:
    """As `sample_place`, of columns as they were read; None when they are not what they should be."""
    if tuple(map(type, columns)) != (int, str, int, float, str, str, str):
        return None
    return sample_place(*columns)


def row_digest(place: bytes, key: str, sealed: bytes) -> bytes:
    """SHA-256 over a row as it lies on the disk."""
    state = hashlib.sha256(bound(place, key.encode()))
    state.update(sealed)
    return state.digest()


def is_intact(place: bytes | None, key: Any, sealed: Any, digest: Any) -> bool:
    """Whether a row is as it was written."""
    if place is None or not isinstance(key, str) or not isinstance(sealed, bytes):
        return False
    return isinstance(digest, bytes) and row_digest(place, key, sealed) == digest


def with_label(window: bytes, label: int | None) -> bytes:
    """What is sealed of a sample: its window, then its label."""
    return window + _LABEL.pack(NO_LABEL if label is None else label)


def split_label(opened: bytes) -> tuple[bytes, int | None]:
    """The window and the label of an opened sample."""
    label = int(_LABEL.unpack_from(opened, len(opened) - LABEL_BYTES)[0])
    return opened[:-LABEL_BYTES], None if label == NO_LABEL else label
