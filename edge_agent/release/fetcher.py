"""Getting bytes by their path: over HTTPS with ranges and resume, or from memory in a simulation.

Laws of the file: nothing fetched is trusted (TUF's metadata and hashes decide, `tuf_client.py`); never more
than the caller's limit is read; a broken connection is resumed where it stopped, a bounded number of times,
and a server that only drips is given up. Source: docs/architecture.md, "The aggregator" (HTTPS port B).
"""

from __future__ import annotations

import contextlib
import http.client
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Protocol

from edge_agent.enrolment.https import (
    BUSY,
    TIMEOUT_SECONDS,
    USER_AGENT,
    HttpsConnection,
    identity_context,
    retry_after_seconds,
)
from edge_agent.enrolment.identity import Identity
from edge_agent.enrolment.patience import asked_of
from process.clock import Clock, SystemClock
from wire.backoff import Backoff, Retries
from wire.errors import PeerError, RefusedError, TransportError

CHUNK_BYTES: Final = 256 * 1024
MAX_ATTEMPTS: Final = 5
FIRST_PAUSE_SECONDS: Final = 0.5
MAX_ASKED_SECONDS: Final = 60.0
"""Who is asked for more comes back with another check."""
# Below this rate over a whole fetch (after one time-out's grace) the server is given up.
MIN_BYTES_PER_SECOND: Final = 512
_MAX_REFUSAL_BYTES: Final = 65_536


class Fetcher(Protocol):
    """Where release metadata and files come from."""

    fetched_bytes_total: int

    def fetch(self, path: str, *, offset: int = 0, limit_bytes: int) -> Iterator[bytes]:
        """The bytes at `path` (it starts with `/`), from `offset` to their end, in pieces.

        Args:
            limit_bytes: how many bytes may come, counted from `offset`.

        Raises:
            RefusedError: the server says no (`status`, such as 404).
            TransportError: no connection, or it broke too often.
            TrustError: not the server that we expect.
            PeerError: there is more than `limit_bytes`.
        """
        ...


class MemoryFetcher:
    """Bytes from memory, for simulated fleets.

    Args:
        source: path to bytes, or a function of the path that returns None for what is not there.
    """

    def __init__(self, source: Mapping[str, bytes] | Callable[[str], bytes | None]) -> None:
        self._source = source.get if isinstance(source, Mapping) else source
        self.fetched_bytes_total = 0

    def fetch(self, path: str, *, offset: int = 0, limit_bytes: int) -> Iterator[bytes]:
        data = self._source(path)
        if data is None:
            raise RefusedError(f"there is no {path}", status=404)
        rest = memoryview(data)[offset:]
        if len(rest) > limit_bytes:
            raise PeerError(f"{path} is longer than allowed", size_bytes=len(rest), limit_bytes=limit_bytes)
        for start in range(0, len(rest), CHUNK_BYTES):
            piece = bytes(rest[start : start + CHUNK_BYTES])
            self.fetched_bytes_total += len(piece)
            yield piece


class HttpsFetcher:
    """Bytes from the aggregator, with mutual TLS. Safe to use from several threads.

    Args:
        url: another port than the one with mutual TLS. context: other TLS than the identity's.
        pause: waits that many seconds between attempts.
        allow: called with every piece; raises `TransportError` (`is_final`) when no more may be fetched.
        backoff: how many those are; a server that is busy may ask for more (`Retry-After`).
    """

    def __init__(
        self,
        identity: Identity,
        *,
        url: str = "",
        context: ssl.SSLContext | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        attempts: int = MAX_ATTEMPTS,
        pause: Callable[[float], None] = time.sleep,
        allow: Callable[[], None] = lambda: None,
        backoff: Backoff | None = None,
        rng: random.Random | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._identity = identity
        self._url = url or identity.url_api
        self._context = context or identity_context(identity)
        self._timeout_seconds = timeout_seconds
        self._attempts = attempts
        self._pause = pause
        self._allow = allow
        self._backoff = backoff or Backoff(FIRST_PAUSE_SECONDS, 60.0, MAX_ASKED_SECONDS)
        self._rng = rng or random.SystemRandom()
        self._clock = clock or SystemClock()
        self._idle: list[HttpsConnection] = []
        self._lock = threading.Lock()
        self.fetched_bytes_total = 0

    def fetch(self, path: str, *, offset: int = 0, limit_bytes: int) -> Iterator[bytes]:
        """See `Fetcher.fetch`. A connection that breaks is resumed by a range request; progress resets the
        count.
        """
        done = 0
        retries = Retries(self._backoff, self._rng)
        started = self._clock.monotonic()
        self._allow()
        while True:
            try:
                for piece in self._attempt(path, offset + done, limit_bytes - done):
                    done += len(piece)
                    retries.succeeded()
                    self._refuse_drip(path, done, started)
                    yield piece
                    self._allow()
                return
            except TransportError as error:
                wait = retries.failed(asked_seconds=asked_of(error))
                is_final = error.facts.get("is_final") or asked_of(error) > MAX_ASKED_SECONDS
                if is_final or retries.failures >= self._attempts:
                    raise
                self._pause(wait)
                started += wait  # what we waited is not held against the server

    def close(self) -> None:
        """Closes kept connections; the fetcher may be used again."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _attempt(self, path: str, offset: int, limit_bytes: int) -> Iterator[bytes]:
        connection, response = self._request(path, offset)
        whole = False
        try:
            if response.status >= http.client.BAD_REQUEST:
                # Read to the end, so that the connection can be used again: a 404 is TUF's usual "no newer
                # root".
                with contextlib.suppress(OSError, http.client.HTTPException):
                    whole = len(response.read(_MAX_REFUSAL_BYTES + 1)) <= _MAX_REFUSAL_BYTES
            _check_status(path, response, offset)
            skip = offset if response.status == http.client.OK else 0
            left = limit_bytes
            while True:
                piece = self._read(response, path)
                if not piece:
                    break
                if skip:
                    skip, piece = max(0, skip - len(piece)), piece[skip:]
                left -= len(piece)
                if left < 0:
                    raise PeerError(f"{path} is longer than allowed", limit_bytes=limit_bytes)
                if piece:
                    self.fetched_bytes_total += len(piece)
                    yield piece
            whole = True
            # `read1` leaves a finished response open, and an open one keeps its connection from being used
            # again.
            response.close()
        finally:
            self._put_back(connection, reusable=whole and not response.will_close)

    def _request(self, path: str, offset: int) -> tuple[HttpsConnection, http.client.HTTPResponse]:
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        while True:
            with self._lock:
                kept = self._idle.pop() if self._idle else None
            connection = kept or HttpsConnection(
                self._url,
                tls_name=self._identity.tls_name,
                context=self._context,
                timeout_seconds=self._timeout_seconds,
            )
            try:
                connection.request("GET", path, headers=headers)
                return connection, connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                # A kept connection may have been closed by the server meanwhile: that is no failure.
                if kept is None:
                    raise TransportError(
                        f"GET {self._url}{path} failed: {error or type(error).__name__}"
                    ) from error

    def _read(self, response: http.client.HTTPResponse, path: str) -> bytes:
        try:
            piece = response.read1(CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise TransportError(f"the download of {path} broke: {error or type(error).__name__}") from error
        if not piece and response.length:
            raise TransportError(f"the download of {path} ended {response.length} bytes early")
        return piece

    def _refuse_drip(self, path: str, done: int, started: float) -> None:
        spent = self._clock.monotonic() - started - self._timeout_seconds
        if spent > 0 and done < spent * MIN_BYTES_PER_SECOND:
            raise PeerError(
                f"the server drips {path}", size_bytes=done, limit_bytes_per_second=MIN_BYTES_PER_SECOND
            )

    def _put_back(self, connection: HttpsConnection, *, reusable: bool) -> None:
        if not reusable:
            connection.close()
            return
        with self._lock:
            self._idle.append(connection)


def _check_status(path: str, response: http.client.HTTPResponse, offset: int) -> None:
    status = response.status
    if status == http.client.OK:
        return
    if status == http.client.PARTIAL_CONTENT:
        content_range = response.getheader("Content-Range", "")
        if content_range.startswith(f"bytes {offset}-"):
            return
        raise PeerError(f"the server answered another range of {path}: {content_range[:100]}")
    if status in BUSY:
        asked = retry_after_seconds(response.getheader("Retry-After", ""), time.time())
        raise TransportError(f"the server is busy: {status} for {path}", status=status, asked_seconds=asked)
    raise RefusedError(f"the server refused {path}: {status} {response.reason}", status=status)
