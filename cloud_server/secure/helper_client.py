"""The way to the helper: what the aggregator was given by who runs it, and asking without waiting.

Laws of the file: TLS 1.3 to the authority that the helper's folder names and to nobody else; every call has a time-out
and a byte limit; `ask` returns at once, and what came of it is taken later, for the question that it was asked for.
Source: docs/protocol.md, clause 15.5.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

from cloud_server.helper.folder import AUTHORITY_FILE, HELPER_FILE, TLS_NAME, TOKEN_FILE
from process.logs import get_logger
from wire.errors import (
    ConfigurationError,
    MessageError,
    ReleaseError,
    ShoalError,
    StorageError,
    TransportError,
)
from wire.helper import (
    CBOR,
    MAX_REFUSAL_BYTES,
    SUM_PATH,
    HelperAnswer,
    HelperRefusal,
    read_answer,
    read_helper_json,
)
from wire.primitives import KemPublicKey, read_private, sha256

TIMEOUT_SECONDS: Final = 120.0
_MAX_FILE_BYTES: Final = 64 * 1024
_PIECE_BYTES: Final = 1 << 20

_log = get_logger("cloud.secure")


class AskedHelper(Protocol):
    """A helper as a run sees it."""

    @property
    def key(self) -> KemPublicKey:
        """What devices seal their seeds to."""
        ...

    def ask(self, question: bytes, total_bytes: int) -> None:
        """Begins to ask; a question that is on its way is not asked again.

        Args:
            total_bytes: length of the sum.
        """
        ...

    def take(self, question: bytes) -> HelperAnswer | HelperRefusal | None:
        """What came of a question, once; None while nothing did, or when the helper could not be reached."""
        ...


class HttpsHelper:
    """A helper at an address.

    Args:
        url: `https://host:port`.
        folder: what the helper's `init` left for the aggregator: helper.json, ca.pem, token.

    Raises:
        ConfigurationError: (operator) the address or a file cannot be used.
    """

    def __init__(self, url: str, folder: Path, *, tenant: str, fleet: str) -> None:
        self._host, self._port = _address(url)
        self._key = read_helper_file(folder / HELPER_FILE, tenant=tenant, fleet=fleet)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            self._context.load_verify_locations(cadata=(folder / AUTHORITY_FILE).read_text(encoding="ascii"))
            self._token = read_private(folder / TOKEN_FILE).decode("ascii").strip()
        except (OSError, ValueError, StorageError) as error:
            raise _unusable(folder, error) from error
        self._lock = threading.Lock()
        self._asked = b""
        self._result: HelperAnswer | HelperRefusal | None = None
        self._thread: threading.Thread | None = None

    @property
    def key(self) -> KemPublicKey:
        return self._key

    def ask(self, question: bytes, total_bytes: int) -> None:
        """See `AskedHelper`."""
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            self._asked, self._result = sha256(question), None
            self._thread = threading.Thread(
                target=self._work, args=(question, total_bytes), name="ask-helper", daemon=True
            )
            self._thread.start()

    def take(self, question: bytes) -> HelperAnswer | HelperRefusal | None:
        """See `AskedHelper`."""
        with self._lock:
            # Looked at in every turn of the loop; a question may be long.
            if self._result is None or self._asked != sha256(question):
                return None
            result, self._result = self._result, None
            return result

    def _work(self, question: bytes, total_bytes: int) -> None:
        try:
            data = self._post(question, total_bytes + MAX_REFUSAL_BYTES)
            result = read_answer(data, question=question, total_bytes=total_bytes)
        except ShoalError as error:
            _log.warning("helper_not_reached", reason=str(error), hint=error.hint)
            return
        with self._lock:
            if self._asked == sha256(question):
                self._result = result

    def _post(self, body: bytes, limit_bytes: int) -> bytes:
        connection = _Connection(self._host, self._port, self._context)
        try:
            headers = {"Authorization": f"Bearer {self._token}", "Content-Type": CBOR}
            connection.request("POST", SUM_PATH, body, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise TransportError(
                    f"the helper answers {response.status}",
                    hint="401: another token than the helper's; its own log says more",
                )
            return _read(response, limit_bytes)
        except (OSError, http.client.HTTPException) as error:
            raise TransportError(
                f"the helper cannot be reached: {error}", hint="see secure.helper_url"
            ) from error
        finally:
            connection.close()


class _Connection(http.client.HTTPSConnection):
    """To an address, verified under the one name that every helper's certificate has."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext) -> None:
        super().__init__(host, port, timeout=TIMEOUT_SECONDS)
        self._tls = context

    def connect(self) -> None:
        self.sock = socket.create_connection((self.host, self.port), self.timeout)
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=TLS_NAME)


def read_helper_file(path: Path, *, tenant: str, fleet: str) -> KemPublicKey:
    """The key in a helper's `helper.json`.

    Raises:
        ConfigurationError: (operator) it is missing, or of another fleet.
    """
    try:
        with path.open("rb") as file:
            return read_helper_json(file.read(_MAX_FILE_BYTES), tenant=tenant, fleet=fleet)
    except (OSError, ReleaseError) as error:
        raise _unusable(path.parent, error) from error


def _read(response: http.client.HTTPResponse, limit_bytes: int) -> bytes:
    data = bytearray()
    while piece := response.read(_PIECE_BYTES):
        data += piece
        if len(data) > limit_bytes:
            raise MessageError("the helper says too much", limit_bytes=limit_bytes)
    return bytes(data)


def _address(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        if parts.scheme == "https" and parts.hostname and not parts.username and parts.path in ("", "/"):
            return parts.hostname, parts.port or 443
    except ValueError:
        pass
    raise ConfigurationError(
        f"secure.helper_url: {url!r} is no address of a helper", hint="such as https://helper.example:8446"
    )


def _unusable(folder: Path, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"the helper's files in {folder} cannot be used: {error}",
        hint="copy for-aggregator/ of the helper's folder there; see docs/how-to/secure-aggregation.md",
        path=str(folder),
    )
