"""The helper's HTTPS port: one question, one answer, for who shows the aggregator's token.

    POST /v1/sum   (CBOR, `wire.helper.HelperQuestion`)  -> `wire.helper.read_answer`
    GET  /healthz  -> 200

Laws of the file: without the token nothing is read and nothing is said; a body is bounded while it is read; what a
question is refused for is a word to the aggregator and a line in the helper's own log. Source: docs/protocol.md,
clause 15.5.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from typing import Final

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from cloud_server.enrolment.limits import RateLimit
from cloud_server.helper.helper import Helper
from process.clock import Clock
from process.logs import get_logger
from wire.errors import StorageError
from wire.helper import CBOR, MAX_QUESTION_BYTES, SUM_PATH, encode_answer

_BODY_SECONDS: Final = 120.0
_STRANGERS_PER_MINUTE: Final = 60

_log = get_logger("cloud.helper")


def helper_app(helper: Helper, token_sha256: bytes, clock: Clock) -> FastAPI:
    """The application of the port.

    Args:
        token_sha256: of the bearer token that the aggregator shows.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    strangers = RateLimit(clock, per_address=_STRANGERS_PER_MINUTE, overall=10 * _STRANGERS_PER_MINUTE)
    at_work = asyncio.Lock()

    @app.get("/healthz")
    def healthz() -> Response:
        return Response("ok\n", media_type="text/plain")

    @app.post(SUM_PATH)
    async def sum_of_masks(request: Request) -> Response:
        if not _is_known(request, token_sha256):
            address = request.client.host if request.client is not None else ""
            status = 429 if strangers.take(address) else 401
            _log.warning("stranger_refused", address=address, status=status)
            return Response(status_code=status)
        async with at_work:  # one question in memory at a time
            body = await _read_body(request)
            if body is None:
                return Response(status_code=413)
            try:
                answer = await run_in_threadpool(helper.answer, body)
            except StorageError as error:
                _log.error("answer_not_kept", reason=str(error))
                return Response(status_code=503)
        return Response(encode_answer(answer), media_type=CBOR)

    return app


def _is_known(request: Request, token_sha256: bytes) -> bool:
    shown = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1", "replace")
    return hmac.compare_digest(hashlib.sha256(shown).digest(), token_sha256)


async def _read_body(request: Request) -> bytes | None:
    """The body; None as soon as it is too long (its declared length may lie) or takes too long."""
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                data += piece
                if len(data) > MAX_QUESTION_BYTES:
                    return None
    except TimeoutError:
        return None
    return bytes(data)
