"""Where the aggregator keeps bytes: blobs by their hash, and named files. The one door to obstore.

Laws of the file: a blob's key is the hash of its bytes and what is read is compared with it; a write is seen
whole or not at all; in a folder a write is on the disk when it returns (obstore renames but does not fsync,
and a receipt may depend on these bytes). Keys are ours, never a peer's: `[A-Za-z0-9._-]` and `/`, no empty
and no dot level.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, MemoryStore, from_url

from wire.errors import ConfigurationError, StorageError

_KEY = re.compile(r"(?!\.)[A-Za-z0-9._-]+(?:/(?!\.)[A-Za-z0-9._-]+)*")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_KEY_CHARS = 512
_ENDPOINT_VARIABLE = "AWS_ENDPOINT_URL"
_PLAIN_VARIABLE = "AWS_ALLOW_HTTP"
# A device or a round waits for the answer; a store that is away longer is an error that both try again.
_RETRIES: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=20)}
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_DENIED = re.compile(r"status code: 40[13]\b")
_SYSTEM_MESSAGE = re.compile(r'message: "([^"\n]{1,200})"')


class Artefacts:
    """One store: a folder, S3, or memory. Safe to use from many threads."""

    def __init__(self, store: Any, folder: Path | None = None) -> None:
        self._store = store
        self._folder = folder

    @classmethod
    def in_memory(cls) -> Artefacts:
        """A store that ends with the process (simulations)."""
        return cls(MemoryStore())

    @classmethod
    def in_folder(cls, folder: Path) -> Artefacts:
        """A store in a folder, which is made (0700) where it is missing.

        Raises:
            StorageError: (disk) the folder cannot be made or used.
        """
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return cls(LocalStore(folder), folder)
        except (OSError, BaseError) as error:
            raise StorageError(f"the artefact folder {folder} cannot be used", path=str(folder)) from error

    @classmethod
    def open(cls, url: str) -> Artefacts:
        """A store by URL: `memory:`, `file:///folder`, `s3://bucket/prefix` (endpoint, region and credentials from
        AWS's variables in the environment). A bucket is asked once, so that what is wrong is said here.

        Raises:
            ConfigurationError: (operator) not a URL that names a store, no such bucket, or we may not use it.
            StorageError: (network) the store does not answer.
        """
        if url == "memory:":
            return cls.in_memory()
        if url.startswith("file://"):
            return cls.in_folder(Path(url.removeprefix("file://")))
        endpoint = os.environ.get(_ENDPOINT_VARIABLE, "")
        if endpoint.startswith("http:") and not os.environ.get(_PLAIN_VARIABLE):
            raise ConfigurationError(
                f"{_ENDPOINT_VARIABLE} is {endpoint}, which is not encrypted",
                hint=f"use https, or set {_PLAIN_VARIABLE}=true for a network that you trust",
            )
        try:
            store = from_url(url, retry_config=_RETRIES)
        except (BaseError, ValueError) as error:
            raise ConfigurationError(
                f"the artefact URL {url!r} cannot be used",
                hint="use memory:, file:///folder or s3://bucket/prefix",
            ) from error
        _ask(store, url)
        return cls(store)

    # ---- blobs, by hash ----

    def put_blob(self, data: bytes) -> str:
        """Keeps bytes and returns their SHA-256 (hex). Bytes that are there already are not written again."""
        digest = hashlib.sha256(data).hexdigest()
        self._put(blob_key(digest), data, is_new=True)
        return digest

    def get_blob(self, sha256: str) -> bytes:
        """The bytes of a blob.

        Raises:
            StorageError: (disk) not there (`is_missing`), or not the bytes that were kept.
        """
        data = self._get(blob_key(sha256))
        if data is None:
            raise StorageError("an artefact is missing", sha256=sha256, is_missing=True)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StorageError(
                "an artefact is damaged", hint="restore it from a backup", sha256=sha256, is_missing=False
            )
        return data

    def delete_blob(self, sha256: str) -> None:
        """Forgets a blob; nothing happens when it is not there."""
        self._delete(blob_key(sha256))

    # ---- named files ----

    def write(self, key: str, data: bytes) -> None:
        """Writes or replaces a file."""
        self._put(_checked(key), data, is_new=False)

    def write_new(self, key: str, data: bytes) -> None:
        """Writes a file that must not change afterwards; the same bytes again are fine.

        Raises:
            StorageError: (us) other bytes are there under this key.
        """
        if not self._put(_checked(key), data, is_new=True) and self._get(key) != data:
            raise StorageError(f"the artefact {key} exists with other bytes", key=key)

    def read(self, key: str) -> bytes | None:
        """The bytes of a file, or None where there is none."""
        return self._get(_checked(key))

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes `start` up to (not with) `end`, which lie within the file.

        Raises:
            StorageError: (disk) the file is missing or shorter.
        """
        with _translated(key):
            return bytes(obstore.get_range(self._store, _checked(key), start=start, end=end))

    def size(self, key: str) -> int | None:
        """Length of a file in bytes, or None where there is none."""
        try:
            with _translated(key):
                return int(obstore.head(self._store, _checked(key))["size"])
        except StorageError as error:
            if error.facts.get("is_missing"):
                return None
            raise

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys of all files under `prefix/`, sorted."""
        with _translated(prefix):
            found = [
                str(meta["path"]) for page in obstore.list(self._store, _checked(prefix)) for meta in page
            ]
        yield from sorted(found)

    def delete(self, key: str) -> None:
        """Removes a file; nothing happens when it is not there."""
        self._delete(_checked(key))

    # ---- the store ----

    def _put(self, key: str, data: bytes, *, is_new: bool) -> bool:
        """Writes; False when `is_new` and the key was taken."""
        with _translated(key):
            try:
                obstore.put(self._store, key, data, mode="create" if is_new else "overwrite")
            except AlreadyExistsError:
                return False
        if self._folder is not None:
            _sync(self._folder, key)
        return True

    def _get(self, key: str) -> bytes | None:
        try:
            with _translated(key):
                return bytes(obstore.get(self._store, key).bytes())
        except StorageError as error:
            if error.facts.get("is_missing"):
                return None
            raise

    def _delete(self, key: str) -> None:
        with _translated(key), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, key)


def _ask(store: Any, url: str) -> None:
    """Lists a page of the store, which needs the bucket, the credentials and the network."""
    try:
        next(iter(obstore.list(store)), None)
    except (BaseError, OSError) as error:
        reason = _reason(error)
        if "NoSuchBucket" in reason:
            raise ConfigurationError(
                f"there is no bucket for the artefacts at {url}",
                hint="make it, or correct storage.artefacts",
            ) from error
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or _DENIED.search(str(error)):
            raise ConfigurationError(
                f"the artefact store does not let us use {url}: {reason}",
                hint="check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, and that they may list the bucket",
            ) from error
        raise StorageError(
            f"the artefact store does not answer at {url}: {reason}",
            hint=f"is it running, and is {_ENDPOINT_VARIABLE} right?",
            is_missing=False,
        ) from error


def _reason(error: Exception) -> str:
    """One line of obstore's page: the store's own code, or what the network said."""
    text = str(error)
    code, message = _CODE.search(text), _SYSTEM_MESSAGE.search(text)
    if code is not None:
        return code[1]
    if message is not None:
        return message[1]
    return text.partition("\n")[0].rpartition(" - ")[2][:200]


def blob_key(sha256: str) -> str:
    """The key of a blob; two levels, so that no folder grows without bound.

    Raises:
        StorageError: (us) not the hex of a SHA-256.
    """
    if not _DIGEST.fullmatch(sha256):
        raise StorageError("not the name of a blob", sha256=sha256[:80], is_missing=True)
    return f"blobs/{sha256[:2]}/{sha256}"


def is_key(text: str) -> bool:
    """Whether this can name a file of a store (a path that a peer asks for may not)."""
    return len(text) <= _MAX_KEY_CHARS and _KEY.fullmatch(text) is not None


def _checked(key: str) -> str:
    if not is_key(key):
        raise StorageError(f"not the name of an artefact: {key[:80]!r}", key=key[:80], is_missing=False)
    return key


def _sync(folder: Path, key: str) -> None:
    """Makes a renamed file durable: its bytes, then every folder that may have been made for it."""
    try:
        for place in (Path(key), *Path(key).parents):
            descriptor = os.open(folder / place, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise StorageError(f"the artefact {key} did not reach the disk", key=key, is_missing=False) from error


@contextlib.contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:  # obstore's own "not found" is this built-in one
        if "NoSuchBucket" in str(error):
            raise StorageError(
                "the bucket of the artefacts is gone", hint="restore it", key=key, is_missing=False
            ) from error
        raise StorageError(f"the artefact {key} is missing", key=key, is_missing=True) from error
    except (BaseError, OSError) as error:
        raise StorageError(
            f"the artefact store failed at {key}: {_reason(error)}",
            hint="check the disk or the network, the rights and the URL",
            key=key,
            is_missing=False,
        ) from error
