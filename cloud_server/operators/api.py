"""The operators' interface: `/v1/operator/…`, JSON in and out, behind `gate.py`.

Laws of the file: every route names the role that it needs; what changes something is a POST or DELETE with a JSON
body, and stands in the audit chain under the operator's pseudonym before it is done; an answer to an operator
names the mistake and the way out (`hint`), since nobody else is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from msgspec import Meta, Struct
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from cloud_server.api import probed
from cloud_server.audit.lineage import trace_lineage
from cloud_server.db.audit import append_audit
from cloud_server.db.operators import OperatorRow, load_operators
from cloud_server.db.overview import list_rounds, show_round
from cloud_server.deployment import Deployment
from cloud_server.operators import actions, views
from cloud_server.operators.accounts import Doorkeeper, Role, add_operator, remove_operator
from cloud_server.operators.gate import OPERATOR, Gate, refusal
from cloud_server.operators.throttle import FailureLimit
from cloud_server.status import collect_status
from process.health import Finding
from process.pulse import ALIVE, READY, Pulse
from wire.errors import ConfigurationError, MessageError, PeerError, ShoalError, StorageError, TrustError
from wire.messages import ID_PATTERN
from wire.topics import ID

BASE: Final = "/v1/operator"
MAX_BODY_BYTES: Final = 65_536
MAX_ROWS: Final = 1000

_Reason = Annotated[str, Meta(max_length=512)]
_Ring = Annotated[str, Meta(pattern=ID_PATTERN)]
_Version = Annotated[int, Meta(ge=0, le=2**53)]
_Name = Annotated[str, Meta(min_length=1, max_length=64)]
T = TypeVar("T", bound=Struct)


class _Because(Struct, frozen=True, forbid_unknown_fields=True):
    reason: _Reason = ""


class _Promotion(Struct, frozen=True, forbid_unknown_fields=True):
    ring: _Ring = "stable"


class _Rollback(Struct, frozen=True, forbid_unknown_fields=True):
    version: _Version = 0
    reason: _Reason = ""


class _Run(Struct, frozen=True, forbid_unknown_fields=True):
    run: Annotated[str, Meta(max_length=64)] = ""


class _NewOperator(Struct, frozen=True, forbid_unknown_fields=True):
    name: _Name
    role: Role


def operator_app(
    deployment: Deployment,
    hosts: set[str],
    *,
    limit: FailureLimit | None = None,
    pulse: Pulse | None = None,
    findings: Callable[[], Sequence[Finding]] = tuple,
) -> FastAPI:
    """The application behind its gate.

    Args:
        hosts: what a `Host` header may name, without port.
        pulse: whether the service lives: one word at `/healthz`, for anybody.
        findings: what its checks found: at `/readyz`, for operators.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    async def refused(_request: Request, error: Exception) -> Response:
        return _answer_error(error)

    app.add_exception_handler(ShoalError, refused)

    @app.get(ALIVE)
    def healthz() -> Response:
        status, word = probed(pulse, ALIVE)
        return JSONResponse({"status": word}, status)

    @app.get(READY)
    def readyz() -> Response:
        status, word = probed(pulse, READY)
        return JSONResponse({"status": word, "findings": [each.as_dict() for each in findings()]}, status)

    _add_views(app, deployment)
    _add_device_actions(app, deployment)
    _add_release_actions(app, deployment)
    _add_accounts(app, deployment)

    def note_limit() -> None:
        with deployment.database.transaction() as connection:
            append_audit(connection, "operator.refused", deployment.clock.now(), {})

    doorkeeper = Doorkeeper(deployment.database, deployment.clock)
    app.add_middleware(
        Gate,
        recognise=doorkeeper.recognise,
        hosts=hosts,
        clock=deployment.clock,
        limit=limit or FailureLimit(),
        note_limit=note_limit,
    )
    return app


# ---- looking -----------------------------------------------------------------------------------------------


def _add_views(app: FastAPI, deployment: Deployment) -> None:
    def see(path: str, read: Callable[..., Any]) -> None:
        app.add_api_route(BASE + path, read, methods=["GET"])

    def whoami(request: Request) -> dict[str, Any]:
        return views.operator(_operator(request))

    def rounds(last: int = 100) -> list[dict[str, Any]]:
        with deployment.database.read() as connection:
            return list_rounds(connection, last=min(max(last, 1), MAX_ROWS))

    def one_round(run: str, number: int) -> dict[str, Any]:
        with deployment.database.read() as connection:
            found = show_round(connection, run, number) if 0 < number < 2**31 else None
        if found is None:
            raise ConfigurationError(f"there is no round {number} of run {run[:64]}", is_missing=True)
        return found

    def releases() -> list[dict[str, Any]]:
        with deployment.database.read() as connection:
            return views.releases(connection)

    def lineage(version: int) -> dict[str, Any]:
        with deployment.database.read() as connection:
            return trace_lineage(connection, min(max(version, 0), 2**53))

    def audit(last: int = 100) -> list[dict[str, Any]]:
        with deployment.database.read() as connection:
            return views.audit_entries(connection, last=min(max(last, 1), MAX_ROWS))

    see("/whoami", whoami)
    see("/status", lambda: collect_status(deployment))
    see("/devices", lambda: views.devices(deployment))
    see("/devices/{name}", lambda name: views.device(deployment, name))
    see("/rounds", rounds)
    see("/rounds/{run}/{number}", one_round)
    see("/releases", releases)
    see("/releases/{version}/lineage", lineage)
    see("/audit", audit)


# ---- acting ------------------------------------------------------------------------------------------------


def _add_device_actions(app: FastAPI, deployment: Deployment) -> None:
    registry = deployment.registry

    async def change(name: str, action: str, request: Request) -> dict[str, Any]:
        operator = _require(request, Role.OPERATOR)
        because = await _body(request, _Because)

        def act() -> dict[str, Any]:
            row = registry.show(name)
            _note(deployment, operator, f"device.{action}", device=row.pseudonym)
            if action == "approve":
                registry.approve(name)
            elif action == "revoke":
                registry.revoke(name, because.reason)
            else:
                registry.quarantine(name, because.reason)
            return views.device(deployment, name)

        return await run_in_threadpool(act)

    for action in ("quarantine", "approve", "revoke"):
        _post(app, f"/devices/{{name}}/{action}", _named(change, action))


def _named(change: Callable[..., Any], action: str) -> Callable[..., Any]:
    async def one(name: str, request: Request) -> dict[str, Any]:
        found: dict[str, Any] = await change(name, action, request)
        return found

    return one


def _add_release_actions(app: FastAPI, deployment: Deployment) -> None:
    async def promote(version: int, request: Request) -> dict[str, Any]:
        operator = _require(request, Role.OPERATOR)
        body = await _body(request, _Promotion)

        def act() -> dict[str, Any]:
            actions.require_release(deployment, version)
            _note(deployment, operator, "release.promote", version=version, ring=body.ring)
            actions.promote(deployment, version, body.ring)
            return {"ring": body.ring, "release_version": version}

        return await run_in_threadpool(act)

    async def rollback(ring: str, request: Request) -> dict[str, Any]:
        operator = _require(request, Role.OPERATOR)
        body = await _body(request, _Rollback)
        if not ID.fullmatch(ring):
            raise MessageError("there can be no such ring")

        def act() -> dict[str, Any]:
            _note(deployment, operator, "ring.rollback", version=body.version, ring=ring)
            version = actions.rollback(deployment, ring, body.version, body.reason)
            return {"ring": ring, "release_version": version}

        return await run_in_threadpool(act)

    def setter(status: str, action: str) -> Callable[..., Any]:
        async def change(request: Request) -> dict[str, Any]:
            operator = _require(request, Role.OPERATOR)
            body = await _body(request, _Run)

            def act() -> dict[str, Any]:
                _note(deployment, operator, action)
                return {"run": actions.set_run(deployment, body.run, status), "status": status}

            return await run_in_threadpool(act)

        return change

    _post(app, "/releases/{version}/promote", promote)
    _post(app, "/rings/{ring}/rollback", rollback)
    _post(app, "/run/pause", setter("paused", "run.pause"))
    _post(app, "/run/resume", setter("active", "run.resume"))


def _add_accounts(app: FastAPI, deployment: Deployment) -> None:
    def listed(request: Request) -> list[dict[str, Any]]:
        _require(request, Role.ADMIN)
        with deployment.database.read() as connection:
            return [views.operator(row) for row in load_operators(connection)]

    async def add(request: Request) -> dict[str, Any]:
        operator = _require(request, Role.ADMIN)
        body = await _body(request, _NewOperator)

        def act() -> dict[str, Any]:
            _note(deployment, operator, "operator.add")
            with deployment.database.transaction() as connection:
                token = add_operator(connection, body.name, body.role, deployment.clock.now())
            return {"name": body.name, "role": str(body.role), "token": token}

        return await run_in_threadpool(act)

    def remove(name: str, request: Request) -> dict[str, Any]:
        operator = _require(request, Role.ADMIN)
        _note(deployment, operator, "operator.remove")
        with deployment.database.transaction() as connection:
            remove_operator(connection, name, deployment.clock.now())
        return {"name": name, "removed": True}

    app.add_api_route(BASE + "/users", listed, methods=["GET"])
    _post(app, "/users", add)
    app.add_api_route(BASE + "/users/{name}", remove, methods=["DELETE"])


# ---- parts -------------------------------------------------------------------------------------------------


class _RoleError(TrustError):
    """An operator may not do this."""


def _post(app: FastAPI, path: str, act: Callable[..., Any]) -> None:
    app.add_api_route(BASE + path, act, methods=["POST"])


def _operator(request: Request) -> OperatorRow:
    found: OperatorRow = request.scope[OPERATOR]
    return found


def _require(request: Request, role: Role) -> OperatorRow:
    operator = _operator(request)
    if not Role(operator.role).includes(role):
        raise _RoleError(f"this needs the role {role}, and yours is {operator.role}", hint="ask an admin")
    return operator


def _note(deployment: Deployment, operator: OperatorRow, action: str, **subject: Any) -> None:
    body = {"operator": operator.pseudonym, "action": action, **subject}
    with deployment.database.transaction() as connection:
        append_audit(connection, "operator.asked", deployment.clock.now(), body)


async def _body(request: Request, kind: type[T]) -> T:
    """The body; an empty one is that of all defaults."""
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > MAX_BODY_BYTES:
            raise MessageError("the body is too long", limit_bytes=MAX_BODY_BYTES)
    # Only a page of ours, or a program, can send this type without being asked for leave first (CORS).
    if data and request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise MessageError("the body is not application/json")
    try:
        return msgspec.json.decode(bytes(data) or b"{}", type=kind, strict=True)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"the body is not what it should be: {error}") from error


def _answer_error(error: Exception) -> Response:
    if isinstance(error, _RoleError):
        return refusal(403, "role", str(error))
    if isinstance(error, StorageError):
        return refusal(503, "busy", "the database or the store does not answer")
    if isinstance(error, ShoalError):
        status = 400 if isinstance(error, PeerError) else 409
        plain = {"error": "refused", "message": str(error), "hint": error.hint}
        return JSONResponse(plain, status)
    return refusal(500, "busy", "this cannot be answered now")
