"""The aggregator's HTTP interface as two applications: one for everybody, one for enrolled devices.

Laws of the file: nothing but `/healthz` and `/readyz` (one word), the CA, enrolment, late renewal and what leads to the
CA in the signed metadata answers without a certificate;
every request of a device asks the register again, whatever TLS has verified; strangers are let through only so
often; a body is counted while it is read, and must come soon; a refusal is a `Refusal` and says nothing of
others. Only what TUF published and checkpoints are served: raw updates lie in the same store and have no
address here. Source: docs/architecture.md, "The aggregator".
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from fastapi import Depends, FastAPI, Request, Response, params
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from cloud_server.artefacts import Artefacts, blob_key
from cloud_server.db.devices import REVOKED
from cloud_server.enrolment.limits import RateLimit
from cloud_server.enrolment.service import EnrolmentService
from cloud_server.registry import Registry
from cloud_server.release.tuf_repository import served_key
from process.pulse import ALIVE, READY, Pulse
from wire.enrolment import (
    MAX_BODY_BYTES,
    EnrolRequest,
    LateRenewRequest,
    Refusal,
    RenewRequest,
    decode_json,
    encode_json,
)
from wire.errors import EnrolmentError, MessageError, ShoalError, StorageError

PEER: Final = "shoal.peer"
"""Where `https.py` puts the verified certificate's `Peer` into the ASGI scope."""

_CHUNK_BYTES: Final = 1024 * 1024
_BODY_SECONDS: Final = 15.0
_BUSY_SECONDS: Final = 10
"""What a device is asked to wait when our disk or store does not answer; it spreads that again."""
_RANGE: Final = re.compile(r"bytes=(\d{0,15})-(\d{0,15})")
_LEADS_TO_KEYS: Final = re.compile(r"timestamp\.json|[0-9]{1,10}\.(?:root|snapshot|targets|keys)\.json")
_AUTHORITIES: Final = re.compile(r"[0-9a-f]{64}\.authorities\.pem")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_IMMUTABLE: Final = "public, max-age=31536000, immutable"
_STATUS: Final = {
    "name_taken": 409,
    "busy": 503,
    "bad_request": 400,
    "csr": 400,
    "name": 400,
    "update_key": 400,
    "challenge": 400,
}


@dataclass(frozen=True, slots=True)
class Peer:
    """Who the client certificate of a connection names: device id and serial (hex)."""

    device: str
    serial: str


class _TooOftenError(EnrolmentError):
    """A stranger came too often; `wait_seconds` says when to come again."""


def public_app(
    enrolment: EnrolmentService, limit: RateLimit, artefacts: Artefacts, pulse: Pulse | None = None
) -> FastAPI:
    """The port without client certificates: enrolment, late renewal, the CA, liveness; and of the signed metadata
    what leads to the authorities, for a device that knows none of them any more.

    Args:
        limit: of requests that cost us anything.
        pulse: what `/healthz` and `/readyz` tell in one word; without one there is nothing that could hang.
    """
    app = _app()

    @app.get(ALIVE)
    @app.get(READY)
    async def probe(request: Request) -> Response:
        status, word = probed(pulse, request.url.path)
        return JSONResponse({"status": word}, status)

    @app.get("/v1/ca")
    def ca() -> PlainTextResponse:
        return PlainTextResponse(enrolment.ca_pem, media_type="application/x-pem-file")

    @app.post("/v1/enroll")
    async def enroll(request: Request) -> Response:
        address = _let_through(request, limit)
        body = decode_json(await _read_body(request), EnrolRequest)
        answer = await run_in_threadpool(enrolment.enrol, body, address)
        return Response(encode_json(answer), media_type="application/json")

    @app.post("/v1/challenge")
    async def challenge(request: Request) -> Response:
        _let_through(request, limit)
        return Response(encode_json(enrolment.challenge()), media_type="application/json")

    @app.get("/metadata/{name}")
    async def metadata(name: str, request: Request) -> Response:
        _let_through(request, limit)
        if _LEADS_TO_KEYS.fullmatch(name) is None:
            return _missing()
        return await run_in_threadpool(_metadata, artefacts, name)

    @app.get("/targets/keys/{name}")
    async def authorities(name: str, request: Request) -> Response:
        _let_through(request, limit)
        if _AUTHORITIES.fullmatch(name) is None:
            return _missing()
        return await run_in_threadpool(_serve, artefacts, served_key(f"targets/keys/{name}"), request)

    @app.post("/v1/late-renewal")
    async def renew_late(request: Request) -> Response:
        address = _let_through(request, limit)
        body = decode_json(await _read_body(request), LateRenewRequest)
        answer = await run_in_threadpool(enrolment.renew_late, body, address)
        return Response(encode_json(answer), media_type="application/json")

    return app


def probed(pulse: Pulse | None, path: str) -> tuple[int, str]:
    """HTTP status and word of a probe."""
    answer = pulse.answer(path) if pulse is not None else None
    return answer or (200, "ok" if path == ALIVE else "ready")


def _let_through(request: Request, limit: RateLimit) -> str:
    """The address that a stranger came from; raises `_TooOftenError`. On the port's own thread only."""
    address = request.client.host if request.client is not None else ""
    wait_seconds = limit.take(address)
    if wait_seconds:
        raise _TooOftenError("too many requests: try again later", code="busy", wait_seconds=wait_seconds)
    return address


def device_app(
    enrolment: EnrolmentService,
    registry: Registry,
    artefacts: Artefacts,
    *,
    is_served_blob: Callable[[str], bool],
) -> FastAPI:
    """The port with mutual TLS: release metadata and files, checkpoints, renewal.

    Args:
        is_served_blob: whether a blob of this SHA-256 (hex) is meant for devices.
    """

    def admit(request: Request) -> None:
        peer = request.scope.get(PEER)
        if not isinstance(peer, Peer) or registry.status(peer.device) in ("", REVOKED):
            raise EnrolmentError("this certificate is not trusted any more", code="revoked")

    app = _app(Depends(admit))

    @app.post("/v1/renew")
    async def renew(request: Request) -> Response:
        peer: Peer = request.scope[PEER]
        body = decode_json(await _read_body(request), RenewRequest)
        answer = await run_in_threadpool(enrolment.renew, peer.device, peer.serial, body)
        return Response(encode_json(answer), media_type="application/json")

    @app.get("/metadata/{path:path}")
    def metadata(path: str) -> Response:
        return _metadata(artefacts, path)

    @app.get("/targets/{path:path}")
    def targets(path: str, request: Request) -> Response:
        return _serve(artefacts, served_key(f"targets/{path}"), request)

    @app.get("/blobs/{sha256}")
    def blobs(sha256: str, request: Request) -> Response:
        is_served = _DIGEST.fullmatch(sha256) is not None and is_served_blob(sha256)
        return _serve(artefacts, blob_key(sha256) if is_served else None, request)

    return app


def _app(*dependencies: params.Depends) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=dependencies)

    async def refused(_request: Request, error: Exception) -> Response:
        return _answer_error(error)

    app.add_exception_handler(ShoalError, refused)
    return app


def _answer_error(error: Exception) -> Response:
    """What a peer is told of an error: its own mistake by a word, ours only as `busy`."""
    if isinstance(error, _TooOftenError):
        refusal = _refuse(429, "busy", str(error))
        refusal.headers["Retry-After"] = str(math.ceil(error.facts["wait_seconds"]))
        return refusal
    if isinstance(error, EnrolmentError):
        code = str(error.facts.get("code", "bad_request"))
        return _refuse(_STATUS.get(code, 403), code, str(error))
    if isinstance(error, MessageError):
        limit = error.facts.get("limit_bytes")
        return _refuse(413 if limit else 400, "bad_request", str(error))
    if isinstance(error, StorageError):
        refusal = _refuse(503, "busy", "try again later")
        refusal.headers["Retry-After"] = str(_BUSY_SECONDS)
        return refusal
    return _refuse(500, "busy", "the aggregator cannot answer this now")


def _refuse(status: int, code: str, message: str) -> Response:
    return Response(encode_json(Refusal(error=code, message=message)), status, media_type="application/json")


def _missing() -> Response:
    return JSONResponse({"error": "missing", "message": "there is no such file"}, 404)


async def _read_body(request: Request) -> bytes:
    """The body, given up as soon as it is too long (its declared length may lie) or takes too long."""
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                data += piece
                if len(data) > MAX_BODY_BYTES:
                    raise MessageError(
                        "the body is too long", size_bytes=len(data), limit_bytes=MAX_BODY_BYTES
                    )
    except TimeoutError as error:
        raise MessageError("the body takes too long") from error
    return bytes(data)


def _metadata(artefacts: Artefacts, path: str) -> Response:
    key = served_key(f"metadata/{path}")
    data = artefacts.read(key) if key is not None else None
    if data is None:
        return _missing()
    caching = "no-cache" if path == "timestamp.json" else _IMMUTABLE
    return Response(data, media_type="application/json", headers={"Cache-Control": caching})


def _serve(artefacts: Artefacts, key: str | None, request: Request) -> Response:
    """A file that never changes, whole or one range of it (RFC 9110 §14; several ranges get the whole)."""
    size = artefacts.size(key) if key is not None else None
    if key is None or size is None:
        return _missing()
    wanted = _range(request.headers.get("range", ""), size)
    headers = {"Accept-Ranges": "bytes", "Cache-Control": _IMMUTABLE}
    if wanted is None:
        return _stream(artefacts, key, 0, size, 200, headers)
    start, end = wanted
    if start >= end:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return _stream(artefacts, key, start, end, 206, headers)


def _stream(
    artefacts: Artefacts, key: str, start: int, end: int, status: int, headers: dict[str, str]
) -> Response:
    def pieces() -> Iterator[bytes]:
        for offset in range(start, end, _CHUNK_BYTES):
            yield artefacts.read_range(key, offset, min(end, offset + _CHUNK_BYTES))

    sized = {**headers, "Content-Length": str(end - start)}
    return StreamingResponse(pieces(), status, sized, media_type="application/octet-stream")


def _range(header: str, size: int) -> tuple[int, int] | None:
    """(start, end) of a range, end not included; start ≥ end where nothing fits; None for the whole."""
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if match is None or match.group() == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return None  # RFC 9110 §14.1.1: not a range at all, so the field is ignored
    return int(first), min(size, int(last) + 1) if last else size
