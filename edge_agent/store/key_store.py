"""Wrapping keys of a device: what its data keys are wrapped by, behind a seam that a TPM or a PKCS#11 token fits.

Laws of the file: a wrapping key is known by a name and used only through `wrap` and `unwrap`; what `make` returned is
there after a power cut, and what `destroy` was told is gone when it returns. A key in a file is only as safe as the
file: who copies it together with what it wraps reads everything. Source: docs/architecture.md, "Data at rest".
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Protocol

from edge_agent.store.disk import make_private_folder, shred
from wire.errors import EnvelopeError, StorageError
from wire.primitives import (
    CONTENT_KEY_BYTES,
    NONCE_BYTES,
    TAG_BYTES,
    Aead,
    key_id,
    random_bytes,
    read_private,
    write_private,
)

SEALED_EXTRA_BYTES: Final = NONCE_BYTES + TAG_BYTES
_SUFFIX: Final = ".key"


class KeyStore(Protocol):
    """Where wrapping keys live. They never leave it: a TPM or a token implements exactly these six.

    A hardware implementation maps `make` to generating an AES-256 key (or an object under a storage root key) that
    cannot be exported, `wrap` and `unwrap` to authenticated encryption with it, with `context` as additional data, and
    `destroy` to deleting it. Few calls are made: one for each data key at a start, some more once a day.
    """

    def make(self) -> str:
        """Makes a wrapping key, there for good when it returns; returns its name (at most 64 of `a-z0-9-`).

        Raises:
            StorageError: it could not be made or kept.
        """
        ...

    def names(self) -> frozenset[str]:
        """The wrapping keys that are there and whole.

        Raises:
            StorageError: nobody can tell now (a disk or token that does not answer): not the same as none.
        """
        ...

    def wrap(self, name: str, secret: bytes, context: bytes) -> bytes:
        """Encrypts a data key, bound to `context`.

        Raises:
            StorageError: there is no such wrapping key.
        """
        ...

    def unwrap(self, name: str, wrapped: bytes, context: bytes) -> bytes:
        """What `wrap` was given.

        Raises:
            StorageError: no such wrapping key, or not wrapped by it for this context.
        """
        ...

    def destroy(self, name: str) -> None:
        """Ends a wrapping key for ever; nothing happens when there is none.

        Raises:
            StorageError: it may still be there.
        """
        ...

    def destroy_all(self) -> None:
        """Ends every wrapping key for ever, also what is left of one that is damaged; needs no room on a disk.

        Raises:
            StorageError: one may still be there.
        """
        ...


class MemoryKeyStore:
    """Wrapping keys that end with the process: for a device without a disk."""

    def __init__(self) -> None:
        self._keys: dict[str, Aead] = {}

    def make(self) -> str:
        secret = random_bytes(CONTENT_KEY_BYTES)
        self._hold(secret)
        return _name_of(secret)

    def names(self) -> frozenset[str]:
        return frozenset(self._keys)

    def wrap(self, name: str, secret: bytes, context: bytes) -> bytes:
        return seal_once(self._key(name), secret, context)

    def unwrap(self, name: str, wrapped: bytes, context: bytes) -> bytes:
        return open_sealed(self._key(name), wrapped, context)

    def destroy(self, name: str) -> None:
        self._keys.pop(name, None)

    def destroy_all(self) -> None:
        self._keys.clear()

    def _hold(self, secret: bytes) -> None:
        self._keys[_name_of(secret)] = Aead("A256GCM", secret)

    def _key(self, name: str) -> Aead:
        found = self._keys.get(name)
        if found is None:
            raise StorageError("the wrapping key is not there", key_id=name)
        return found


class FileKeyStore(MemoryKeyStore):
    """Wrapping keys in files of a private folder (0700): `{name}.key`, 32 bytes, 0600, named by their hash.

    A file that is not what its name says is no key.

    Raises:
        StorageError: the folder cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        try:
            if not folder.is_dir():
                return
            for path in sorted(folder.glob(f"*{_SUFFIX}")):
                self._load(path)
        except OSError as error:
            raise StorageError(f"cannot read {folder}: {error.strerror}") from error

    def make(self) -> str:
        secret = random_bytes(CONTENT_KEY_BYTES)
        make_private_folder(self._folder)
        write_private(self._path(_name_of(secret)), secret)
        self._hold(secret)
        return _name_of(secret)

    def destroy(self, name: str) -> None:
        shred(self._path(name))
        super().destroy(name)

    def destroy_all(self) -> None:
        for path in self._folder.glob(f"*{_SUFFIX}"):
            shred(path)
        super().destroy_all()

    def _load(self, path: Path) -> None:
        if path.stat().st_size != CONTENT_KEY_BYTES:
            return
        # Whoever opened it to others has shown it already; refusing it here would only stop the device.
        os.chmod(path, 0o600)
        secret = read_private(path)
        if _name_of(secret) == path.name.removesuffix(_SUFFIX):
            self._hold(secret)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{_SUFFIX}"


def seal_once(key: Aead, plaintext: bytes | memoryview, context: bytes) -> bytes:
    """`nonce || ciphertext || tag` under a fresh nonce of 96 bits from the operating system.

    Never a counter: one that lies on a disk goes back with a copy of the disk. Two of n sealings under one key share
    a nonce with a chance of n² / 2⁹⁷.
    """
    sealed = bytearray(len(plaintext) + SEALED_EXTRA_BYTES)
    nonce = random_bytes(NONCE_BYTES)
    sealed[:NONCE_BYTES] = nonce
    key.seal_into(nonce, plaintext, context, memoryview(sealed)[NONCE_BYTES:])
    return bytes(sealed)


def open_sealed(key: Aead, sealed: bytes, context: bytes) -> bytes:
    """What `seal_once` was given.

    Raises:
        StorageError: damaged, or sealed with another key or for another context.
    """
    try:
        return key.open(sealed[:NONCE_BYTES], memoryview(sealed)[NONCE_BYTES:], context)
    except EnvelopeError as error:
        raise StorageError("what is stored does not open", damaged=True) from error


def _name_of(secret: bytes) -> str:
    return key_id(secret).hex()
