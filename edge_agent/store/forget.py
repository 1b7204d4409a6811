"""Forgetting on demand: keys first, then what they sealed.

Laws of the file: the keys are gone before anything is deleted, so that an interruption leaves bytes that nobody can
read, and never a key without its rows; what was owed to the cloud is counted as `destroyed`, not lost from the books.
Source: docs/architecture.md, "Data at rest"; law 7.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from edge_agent.lock import lock_state
from edge_agent.store.at_rest import STORES, Store
from edge_agent.store.outbox import Outbox
from edge_agent.store.samples import SampleStore
from edge_agent.store.storage import DATABASE_NAME, Database, open_database
from process.clock import Clock
from wire.errors import ConfigurationError

What = Literal["samples", "everything"]

WHAT: Final[tuple[What, ...]] = get_args(What)
_STORES: Final[dict[What, tuple[Store, ...]]] = {
    "samples": ("samples", "quarantine", "facts"),
    "everything": STORES,
}


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was there to forget: samples, and updates that no receipt had ended."""

    samples: int
    updates: int


def forget_stores(
    database: Database, samples: SampleStore, outbox: Outbox, what: What, now: float
) -> Forgotten:
    """Destroys the keys of stores that are open, and what they sealed; raises like `forget`."""
    with database.transaction():
        forgotten = Forgotten(samples.counts()["samples"], outbox.depth() if what == "everything" else 0)
        database.vault.forget(_STORES[what])
        samples.forget_all(now)
        if what == "everything":
            outbox.destroy_all("forgotten on demand", now)
    database.quarantine.empty()
    database.erase_leftovers()
    return forgotten


def forget(folder: Path, what: What, clock: Clock) -> Forgotten:
    """Destroys a device's at-rest keys and what they sealed. Its identity and its models stay.

    Args:
        what: `samples` (with the quarantine, and what codecs left out of updates), or `everything` (the outbox, too).

    Raises:
        ConfigurationError: (operator) an agent runs on this folder, or it is no device's.
        StorageError: (disk) something may still be readable.
    """
    if not (folder / DATABASE_NAME).exists():
        raise ConfigurationError(f"{folder} holds nothing to forget", hint="name the device's --state")
    lock = lock_state(folder)
    try:
        with contextlib.closing(open_database(folder, clock=clock)) as database:
            return forget_stores(database, SampleStore(database), Outbox(database), what, clock.now())
    finally:
        os.close(lock)
