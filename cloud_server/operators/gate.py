"""Who comes in at the operators' interface: an ASGI gate in front of the application.

Laws of the file: nothing but `/healthz` is answered without a token, not even that a path does not exist; the token
comes in the `Authorization` header and in nothing else. There are no cookies, so no other site can make a browser
act for an operator (CSRF); a `Host` that is not ours is refused, so that no foreign name can be pointed here (DNS
rebinding), and so is any `Origin` but our own. A wrong token and a missing one are the same answer. Failures are
limited by address, and told to the audit chain when an address reaches the limit, so that an attacker does not
write the books.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from cloud_server.db.operators import OperatorRow
from cloud_server.operators.throttle import FailureLimit
from process.clock import Clock
from process.logs import get_logger
from wire.errors import StorageError

_log = get_logger("cloud.operators")

OPERATOR: Final = "shoal.operator"
"""Where the application finds the `OperatorRow` in the ASGI scope."""
_MAX_TOKEN_CHARS: Final = 256
_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class Gate:
    """Lets a request through to `app` once it is known whose it is.

    Args:
        recognise: the operator of a token, or None.
        hosts: names and addresses that a `Host` may have, without port, in lower case.
        note_limit: told, once, when an address has failed too often.
    """

    def __init__(
        self,
        app: Any,
        *,
        recognise: Callable[[str], OperatorRow | None],
        hosts: Collection[str],
        clock: Clock,
        limit: FailureLimit,
        note_limit: Callable[[], None],
    ) -> None:
        self._app = app
        self._recognise = recognise
        self._hosts = frozenset(hosts)
        self._clock = clock
        self._limit = limit
        self._note_limit = note_limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        answer = self._refuse_place(headers)
        if answer is None and scope["path"] != "/healthz":
            answer = await self._authenticate(scope, headers)
        if answer is None:
            await self._app(scope, receive, send)
        else:
            await answer(scope, receive, send)

    def _refuse_place(self, headers: dict[str, str]) -> Response | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if _name_of(f"//{host}") not in self._hosts:
            return refusal(421, "host", "this interface is not called by that name")
        if origin is not None and (not origin.startswith("https://") or _place_of(origin) != host.lower()):
            return refusal(403, "origin", "requests of other sites are not answered")
        return None

    async def _authenticate(self, scope: Any, headers: dict[str, str]) -> Response | None:
        address = scope["client"][0] if scope.get("client") else ""
        wait = self._limit.wait_seconds(address, self._clock.monotonic())
        if wait > 0:
            return refusal(429, "throttled", "too many failures", {"Retry-After": str(int(wait) + 1)})
        scheme, _, token = headers.get("authorization", "").partition(" ")
        row = None
        if scheme.lower() == "bearer" and len(token) <= _MAX_TOKEN_CHARS:
            try:
                row = await run_in_threadpool(self._recognise, token.strip())
            except StorageError as error:
                _log.error("operator_not_recognised", error=str(error))
                return refusal(503, "busy", "try again later")
        if row is not None:
            scope[OPERATOR] = row
            return None
        if self._limit.note_failure(address, self._clock.monotonic()):
            _log.warning("operator_refused_too_often", address=address)
            try:
                await run_in_threadpool(self._note_limit)
            except StorageError as error:
                _log.error("operator_refusal_not_noted", error=str(error))
        return refusal(401, "token", "a token is needed", {"WWW-Authenticate": "Bearer"})


def refusal(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """An answer that says no."""
    return JSONResponse({"error": code, "message": message}, status, {**_HEADERS, **(headers or {})})


def _name_of(url: str) -> str:
    """The host of a URL in lower case, without port; empty where there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _place_of(url: str) -> str:
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""
