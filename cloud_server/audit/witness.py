"""Who else keeps the heads of the audit chain: a file (of another machine, or write-once), or an address by HTTPS.

Laws of the file: a witness only ever gets heads (numbers, hashes and signatures: no name, no content); one line
of JSON each; what it did not confirm is told again, so it may have a head twice. A witness's word counts when it
is compared with the chain: `shoal-cloud audit verify --witness FILE`.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

from cloud_server.audit.check import Anchor, head_from_plain, head_to_plain
from cloud_server.audit.notary import Witness
from cloud_server.db.audit import HeadRow
from wire.errors import ConfigurationError, StorageError, TransportError, TrustError

POST_SECONDS: Final = 10.0
MAX_LINE_BYTES: Final = 4096
MAX_FILE_BYTES: Final = 256 * 2**20


def open_witness(address: str) -> Witness | None:
    """The witness of a setting: `https://…` or the path of a file; None for an empty one.

    Raises:
        ConfigurationError: (operator) another kind of address.
    """
    if not address:
        return None
    if address.startswith("https://"):
        return HttpsWitness(address)
    if "://" in address:
        raise ConfigurationError(
            f"audit.witness: {address!r} cannot be a witness", hint="use https://… or the path of a file"
        )
    return FileWitness(Path(address))


class FileWitness:
    """Lines at the end of a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def tell(self, row: HeadRow) -> None:
        """See `Witness`."""
        line = (json.dumps(head_to_plain(row), sort_keys=True) + "\n").encode()
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.write(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageError(
                f"the witness {self._path} cannot be written: {error.strerror}",
                hint="audit.witness names a file that can be appended to",
            ) from error


class HttpsWitness:
    """A POST of one head; any 2xx confirms it. Redirects are not followed: they would lead away from who was named."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._opener = urllib.request.build_opener(_NoRedirect)

    def tell(self, row: HeadRow) -> None:
        """See `Witness`."""
        body = json.dumps(head_to_plain(row), sort_keys=True).encode()
        request = urllib.request.Request(
            self._url, body, {"Content-Type": "application/json", "User-Agent": "shoal"}, method="POST"
        )
        try:
            with self._opener.open(request, timeout=POST_SECONDS):
                return
        except (urllib.error.URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise TransportError(
                f"the witness {self._url} did not take a head: {reason}", hint="see audit.witness"
            ) from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object, **__: object) -> None:
        return None


def read_witness(path: Path) -> list[Anchor]:
    """The heads that a witness has, from its file.

    Raises:
        StorageError: (operator) it cannot be read.
        TrustError: (whoever kept it) a line is no head; says which.
    """
    anchors = []
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise StorageError(f"{path} is too long to be a witness's file", limit_bytes=MAX_FILE_BYTES)
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}", path=str(path)) from error
    for number, line in enumerate(lines, start=1):
        try:
            anchors.append(Anchor("the witness", head_from_plain(json.loads(line[:MAX_LINE_BYTES]))))
        except (ValueError, RecursionError, TrustError) as error:
            raise TrustError(f"line {number} of {path} is no head", line=number) from error
    return anchors
