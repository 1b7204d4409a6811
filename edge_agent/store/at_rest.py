"""What a device keeps is sealed: data keys of its stores, how a row is sealed with them, and how keys are destroyed.

Laws of the file: a row is bound to its store, its key and its place, so that none opens in the place of another; a data
key is in the ring, on disk, before anything is sealed with it; a nonce is 96 fresh random bits, never a counter, so
that neither a restart nor a copy of the disk brings one back (`key_store.seal_once`); a key that was destroyed is in
no file of ours, and what wrapped it is replaced, so that an older copy of the ring is worth nothing either. A damaged
entry of the ring costs its key and no other. Source: docs/architecture.md, "Data at rest".
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from edge_agent.store.disk import make_private_folder, replace_and_shred, shred
from edge_agent.store.key_store import FileKeyStore, KeyStore, MemoryKeyStore, open_sealed, seal_once
from process.clock import Clock
from wire.errors import StorageError
from wire.primitives import (
    CONTENT_KEY_BYTES,
    Aead,
    ContentAlgorithm,
    faster_content_algorithm,
    random_bytes,
)

Store = Literal["samples", "outbox", "quarantine", "facts"]

STORES: Final[tuple[Store, ...]] = get_args(Store)
FOLDER_NAME: Final = "at_rest"
RING_NAME: Final = "ring"
ROTATE_SECONDS: Final = 86_400.0
"""Rows of one day share a key; it goes when the last of them has gone."""
KEY_ID_CHARACTERS: Final = 8
_ROTATING: Final = ("samples", "outbox")
_MAX_RING_BYTES: Final = 4 * 1024 * 1024
_ROW: Final = b"shoal at rest 1\0"
_KEY: Final = b"shoal data key 1\0"

_Hex = Annotated[str, Meta(pattern="^[0-9a-f]*$", max_length=4096)]


class _Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the ring: a data key, wrapped. Each line stands for itself."""

    key: Annotated[str, Meta(pattern=f"^[0-9a-f]{{{KEY_ID_CHARACTERS}}}$")]
    store: Store
    made: float
    algorithm: ContentAlgorithm
    wrapped_by: Annotated[str, Meta(pattern="^[0-9a-z-]{1,64}$")]
    wrapped: _Hex

    def context(self) -> bytes:
        return _KEY + bound(self.store.encode(), self.key.encode(), self.algorithm.encode())


@dataclass(frozen=True, slots=True)
class _DataKey:
    entry: _Entry
    cipher: Aead


class Vault:
    """The data keys of one device. Safe to use from several threads.

    Attributes:
        damage: what of the ring could not be read or opened at the start, or empty.

    Args:
        keys: where wrapping keys live.
        ring: the file of wrapped data keys; None keeps them in memory only.
        clock: says when a day is over.
        algorithm: called when a key is made (None: what this machine is faster with).
        is_owner: False only looks, beside an agent that may be changing its keys.

    Raises:
        StorageError: ring or wrapping keys cannot be read now. That is not the same as damaged or gone.
    """

    def __init__(
        self,
        keys: KeyStore,
        ring: Path | None,
        clock: Clock,
        algorithm: Callable[[], ContentAlgorithm] | None = None,
        *,
        is_owner: bool = True,
    ) -> None:
        self._keys = keys
        self._ring = ring
        self._clock = clock
        self._algorithm = algorithm or content_algorithm_here
        self._lock = threading.RLock()
        self._data: dict[str, _DataKey] = {}
        self.damage = ""
        if ring is not None:
            self._load(ring)
            if is_owner and self._data and not self.damage:
                self._tidy()

    def seal(self, store: Store, place: bytes, plaintext: bytes | memoryview) -> tuple[str, bytes]:
        """Seals with the store's key of today; returns (key id, sealed bytes).

        Args:
            place: what the row is and where it stands (`bound`); `open` must be told the same.

        Raises:
            StorageError: a new key was due and could not be kept.
        """
        with self._lock:
            data = self._current(store)
        return data.entry.key, seal_once(data.cipher, plaintext, _context(data.entry, place))

    def seal_with(self, key: str, place: bytes, plaintext: bytes | memoryview) -> bytes:
        """Seals with the key that a row has already.

        Raises:
            StorageError: there is no such key.
        """
        data = self._find(key)
        return seal_once(data.cipher, plaintext, _context(data.entry, place))

    def open(self, store: Store, key: str, place: bytes, sealed: bytes) -> bytes:
        """What was sealed.

        Raises:
            StorageError: its key is lost or destroyed (`lost`), or it is damaged or from another place.
        """
        data = self._find(key)
        if data.entry.store != store:
            raise StorageError(f"a key of {data.entry.store} opens nothing of {store}", damaged=True)
        return open_sealed(data.cipher, sealed, _context(data.entry, place))

    def knows(self, key: str) -> bool:
        """Whether what was sealed with this key can be opened."""
        return key in self._data

    def key_ids(self, store: Store) -> tuple[str, ...]:
        """The keys of a store, the oldest first."""
        with self._lock:
            return tuple(key for key, data in self._data.items() if data.entry.store == store)

    def replace(self, key: str) -> str:
        """Makes a key that stands in the place of another, which stays until it is destroyed; returns its id.

        Raises:
            StorageError: there is no such key, or the new one could not be kept.
        """
        with self._lock:
            before = self._find(key).entry
            return self._make(before.store, before.made, beside=key).entry.key

    def retire(self, store: Store, is_in_use: Callable[[str], bool]) -> int:
        """Destroys the keys of past days that no row is sealed with; returns how many.

        Args:
            is_in_use: whether a row is sealed with a key; asked only for what could go.

        Raises:
            StorageError: they may still be there.
        """
        with self._lock:
            ids = self.key_ids(store)
            past = [key for key in ids if key != ids[-1] or self._is_over(key)]
            over = [key for key in past if not is_in_use(key)]
            self.destroy(over)
            return len(over)

    def destroy(self, keys: Iterable[str]) -> None:
        """Ends data keys for ever: the ring is written without them, under another wrapping key.

        Raises:
            StorageError: they may still be there; what they sealed can be opened until they are gone.
        """
        with self._lock:
            gone = set(keys) & set(self._data)
            if not gone:
                return
            kept = [data for key, data in self._data.items() if key not in gone]
            old = {data.entry.wrapped_by for data in self._data.values()}
            self._write(self._rewrapped(kept))
            for name in old:
                self._keys.destroy(name)

    def forget(self, stores: Collection[Store] = STORES) -> None:
        """Destroys all keys of some stores: nothing that they ever sealed can be read any more, in any copy.

        Raises:
            StorageError: as `destroy`.
        """
        with self._lock:
            if set(stores) == set(STORES):
                self._forget_all()
            else:
                self.destroy([key for store in stores for key in self.key_ids(store)])

    def _forget_all(self) -> None:
        """Wrapping keys first: overwriting them needs no room on a disk that is full."""
        self._keys.destroy_all()
        self._data = {}
        if self._ring is not None:
            shred(self._ring)

    def _find(self, key: str) -> _DataKey:
        data = self._data.get(key)
        if data is None:
            raise StorageError("its key is lost or was destroyed", lost=True, key_id=key)
        return data

    def _current(self, store: Store) -> _DataKey:
        ids = self.key_ids(store)
        if not ids or self._is_over(ids[-1]):
            return self._make(store, self._clock.now())
        return self._data[ids[-1]]

    def _is_over(self, key: str) -> bool:
        """A clock that was set back begins a new day, too."""
        entry = self._data[key].entry
        return entry.store in _ROTATING and not 0 <= self._clock.now() - entry.made < ROTATE_SECONDS

    def _make(self, store: Store, made: float, beside: str = "") -> _DataKey:
        """The newest key of its store, or one that stands where another does."""
        secret, key = random_bytes(CONTENT_KEY_BYTES), random_bytes(KEY_ID_CHARACTERS // 2).hex()
        while key in self._data:
            key = random_bytes(KEY_ID_CHARACTERS // 2).hex()
        wrapped_by = next((data.entry.wrapped_by for data in self._data.values()), "") or self._keys.make()
        entry = _Entry(key, store, made, self._algorithm(), wrapped_by, "")
        wrapped = self._keys.wrap(wrapped_by, secret, entry.context()).hex()
        data = _DataKey(msgspec.structs.replace(entry, wrapped=wrapped), Aead(entry.algorithm, secret))
        ring = list(self._data.values())
        ring.insert(
            next((at for at, each in enumerate(ring) if each.entry.key == beside), len(ring)) + 1, data
        )
        self._write(ring)
        return data

    def _rewrapped(self, kept: Collection[_DataKey]) -> list[_DataKey]:
        if not kept:
            return []
        name, moved = self._keys.make(), []
        for data in kept:
            entry = data.entry
            secret = self._keys.unwrap(entry.wrapped_by, bytes.fromhex(entry.wrapped), entry.context())
            wrapped = self._keys.wrap(name, secret, entry.context()).hex()
            moved.append(
                _DataKey(msgspec.structs.replace(entry, wrapped_by=name, wrapped=wrapped), data.cipher)
            )
        return moved

    def _write(self, data: Collection[_DataKey]) -> None:
        if self._ring is not None:
            make_private_folder(self._ring.parent)
            lines = [msgspec.json.encode(each.entry) + b"\n" for each in data]
            replace_and_shred(self._ring, b"".join(lines))
        self._data = {each.entry.key: each for each in data}

    def _load(self, ring: Path) -> None:
        try:
            with ring.open("rb") as file:
                lines = file.read(_MAX_RING_BYTES).splitlines()
        except FileNotFoundError:
            if self._keys.names():
                self.damage = "the key ring is gone"
            return
        except OSError as error:
            raise StorageError(f"cannot read {ring}: {error.strerror}") from error
        for line in lines:
            try:
                entry = msgspec.json.decode(line, type=_Entry, strict=True)
                secret = self._keys.unwrap(entry.wrapped_by, bytes.fromhex(entry.wrapped), entry.context())
                self._data[entry.key] = _DataKey(entry, Aead(entry.algorithm, secret))
            except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, StorageError) as error:
                self.damage = f"a key of the ring does not open: {error}"

    def _tidy(self) -> None:
        """Ends the wrapping keys that no entry names: of a destruction that was interrupted."""
        for name in self._keys.names() - {data.entry.wrapped_by for data in self._data.values()}:
            self._keys.destroy(name)


def open_vault(
    folder: Path | None, clock: Clock, keys: KeyStore | None = None, *, is_owner: bool = True
) -> Vault:
    """The vault of a state folder; of a device without a disk (None), one that ends with the process.

    Args:
        keys: where wrapping keys live; None takes files in `at_rest/`.
        is_owner: as in `Vault`.

    Raises:
        StorageError: it cannot be read now.
    """
    if folder is None:
        return Vault(keys or MemoryKeyStore(), None, clock)
    place = folder / FOLDER_NAME
    return Vault(keys or FileKeyStore(place), place / RING_NAME, clock, is_owner=is_owner)


def bound(*parts: bytes) -> bytes:
    """Parts, each after its length, so that no two lists of parts give the same bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


@cache
def content_algorithm_here() -> ContentAlgorithm:
    """The content algorithm that this machine is faster with, measured once per process."""
    return faster_content_algorithm(time.perf_counter)


def _context(entry: _Entry, place: bytes) -> bytes:
    return _ROW + bound(entry.store.encode(), entry.key.encode()) + place
