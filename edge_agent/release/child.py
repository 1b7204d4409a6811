"""The release check of a real device, in a child process: TUF and X.509 code costs 8 MiB that serving does
not need.

Laws of the file: the child verifies and stages files, renews the certificate when that is due, and prints one
JSON object; the parent believes its own child, and the slots compare every hash again. `python -m
edge_agent.release.child STATE NOW` is the child. Source: docs/architecture.md, "TUF layout".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta, Struct, structs

from edge_agent.child import ChildTimeoutError, run_child
from edge_agent.enrolment import identity as identity_files
from edge_agent.enrolment.identity import Identity
from edge_agent.enrolment.patience import asked_of
from edge_agent.link.allowance import NOTE_NAME, Allowance
from edge_agent.link.door import Link, Terms
from edge_agent.release import tuf_client
from edge_agent.release.source import Held, Known, Offer
from edge_agent.uplink.online_keys import OnlineKeys
from process.clock import Clock, SystemClock
from process.logs import get_logger
from wire import errors
from wire.errors import EnrolmentError, ReleaseError, ShoalError, TransportError, TrustError

if TYPE_CHECKING:
    from edge_agent.release.fetcher import Fetcher

_log = get_logger("edge_agent.releases")

STAGING_NAME: Final = "tuf"
TIMEOUT_SECONDS: Final = 1800.0
_RAISED: Final = (
    "ReleaseError",
    "TransportError",
    "TrustError",
    "EnrolmentError",
    "StorageError",
    "RefusedError",
)


class Request(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the child is told: the release that serves, the files of its model that are in the slots, and what it may
    do on the link (`link.door.Terms`)."""

    current_version: int
    graphs_sha256: str = ""
    held: tuple[str, ...] = ()
    is_open: bool = True
    bytes_left: int | None = None
    until: float = 0.0


class Found(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the child found; keys are (id, algorithm, public) and (id, public)."""

    tenant: str
    fleet: str
    kem: tuple[tuple[bytes, str, bytes], ...]
    orders: tuple[tuple[bytes, bytes], ...]
    release_version: int
    rollback: bool
    serial: int
    files: dict[str, str]
    fetched_bytes: int
    signed_at: float
    expires: float
    keys_version: int = 0
    helper: bytes = b""
    is_withheld: bool = False
    renewal_failure: str = ""


class Failed(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why the child found nothing."""

    error: str
    message: Annotated[str, Meta(max_length=2000)]
    hint: str = ""
    asked_seconds: float = 0.0
    renewal_failure: str = ""


class ChildReleases:
    """Releases over HTTPS, checked in a child process.

    Args:
        folder: the state folder.
        graphs: hash (hex) of the graphs that are installed, or empty.
        checked: called after every check, whether it found something or failed: the child may have written a new
            certificate.
        link: which says what a check may do; None for one without limits.
    """

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        *,
        graphs: Callable[[], str],
        checked: Callable[[], None],
        link: Link | None = None,
    ) -> None:
        self._folder = folder
        self._link = link
        self._clock = clock
        self._graphs = graphs
        self._checked = checked

    def fetch(self, current_version: int, held: Held, known: Known) -> Offer:
        tuf_client.seed_staging(self._folder / STAGING_NAME, known)
        graphs = self._graphs()
        terms = self._link.terms() if self._link is not None else Terms()
        request = Request(
            current_version=current_version,
            graphs_sha256=graphs,
            held=tuple(sorted(held(graphs))) if graphs else (),
            is_open=terms.is_open,
            bytes_left=terms.bytes_left,
            until=terms.until,
        )
        try:
            found = self._ask(msgspec.json.encode(request))
        finally:
            if self._link is not None:
                self._link.settle()
            self._checked()
        keys = OnlineKeys(found.tenant, found.fleet, found.kem, found.orders, found.keys_version)
        files = {name: Path(path) for name, path in found.files.items()}
        if not files and not found.is_withheld:
            self.clear()
        return Offer(
            keys=keys,
            release_version=found.release_version,
            rollback=found.rollback,
            serial=found.serial,
            fetched_bytes=found.fetched_bytes,
            files=files,
            signed_at=found.signed_at,
            expires=found.expires,
            helper=found.helper,
        )

    def clear(self) -> None:
        tuf_client.clear_staging(self._folder / STAGING_NAME)

    def _ask(self, request: bytes) -> Found:
        arguments = [str(self._folder), repr(self._clock.now())]
        try:
            ended = run_child(
                "edge_agent.release.child", arguments, timeout_seconds=TIMEOUT_SECONDS, stdin=request
            )
        except ChildTimeoutError as error:
            raise TransportError("the release check took too long") from error
        try:
            result: Found | Failed
            if ended.code == 0:
                result = msgspec.json.decode(ended.output, type=Found)
            else:
                result = msgspec.json.decode(ended.output, type=Failed)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ReleaseError(
                f"the release check ended with code {ended.code} and without a result"
            ) from error
        if result.renewal_failure:
            _log.warning("certificate_not_renewed", reason=result.renewal_failure)
        if isinstance(result, Found):
            return result
        kind = getattr(errors, result.error) if result.error in _RAISED else ReleaseError
        raise kind(result.message, hint=result.hint, asked_seconds=result.asked_seconds)


class _FixedClock:
    """The parent's time, which has a floor, at the start of the check."""

    def __init__(self, now: float) -> None:
        self._now = now
        self._machine = SystemClock()

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._machine.monotonic()


def check(folder: Path, now: float, request: Request, identity: Identity) -> Found:
    """The child's work; raises as `tuf_client.check` and `tuf_client.download`."""
    from edge_agent.enrolment.https import METER
    from edge_agent.release.fetcher import HttpsFetcher

    bounded = request.is_open
    allowance = Allowance(
        folder / NOTE_NAME,
        METER,
        SystemClock(),
        bytes_left=request.bytes_left if bounded else None,
        until=request.until if bounded else 0.0,
    )
    fetcher = HttpsFetcher(identity, allow=allowance.check)
    try:
        return _check_by(fetcher, folder, now, request, identity)
    finally:
        fetcher.close()
        allowance.close()


def _check_by(fetcher: Fetcher, folder: Path, now: float, request: Request, identity: Identity) -> Found:
    info = tuf_client.check(
        folder / STAGING_NAME, identity.tuf_root, fetcher, identity.ring, _FixedClock(now)
    )
    authorities = tuf_client.newer_authorities(info.session, identity.ca_pem)
    if authorities is not None:
        identity_files.with_authorities(identity, authorities)
    files: dict[str, str] = {}
    is_news = info.release_version not in (0, request.current_version)
    # A link that is shut brings nothing but a way back: a release that is bad must not wait for the night.
    is_withheld = is_news and not request.is_open and not info.rollback
    if is_news and not is_withheld:
        held = frozenset(request.held)
        paths = tuf_client.download(
            info, held=lambda graphs: held if graphs == request.graphs_sha256 else frozenset()
        )
        files = {name: str(path) for name, path in paths.items()}
    return Found(
        tenant=info.keys.tenant,
        fleet=info.keys.fleet,
        kem=info.keys.kem,
        orders=info.keys.orders,
        release_version=info.release_version,
        rollback=info.rollback,
        serial=info.serial,
        files=files,
        fetched_bytes=fetcher.fetched_bytes_total,
        signed_at=info.signed_at,
        expires=info.expires,
        keys_version=info.keys.version,
        helper=info.helper,
        is_withheld=is_withheld,
    )


def _renew_if_due(identity: Identity, now: float) -> str:
    """Returns why it failed, or nothing. It is tried again at the next check."""
    from edge_agent.enrolment.enrol import is_expired, renew, renew_late, renewal_is_due, was_refused

    try:
        if is_expired(identity, now):
            renew_late(identity)
        elif renewal_is_due(identity, now):
            try:
                renew(identity)
            except TransportError as error:
                if not was_refused(error):
                    raise
                renew_late(identity)
    except ShoalError as error:
        return _explained(error)
    return ""


def _check_with_trust(folder: Path, now: float, request: Request, identity: Identity) -> Found:
    """`check`; with the authorities of now where the aggregator shows a certificate of one that we do not know, and
    with the next certificate of our own where it takes ours no more (its authority was replaced, or our clock is
    behind). Each at most once."""
    from edge_agent.enrolment.enrol import renew_late, was_refused

    is_renewed = is_told = False
    while True:
        try:
            return check(folder, now, request, identity)
        except TransportError as error:
            if is_renewed or not was_refused(error):
                raise
            identity, is_renewed = renew_late(identity), True
        except (ReleaseError, EnrolmentError):
            raise
        except TrustError:  # not the server that we expect
            if is_told:
                raise
            found = _ask_for_authorities(folder, now, identity)
            if found is None:
                raise
            identity, is_told = found, True


def _ask_for_authorities(folder: Path, now: float, identity: Identity) -> Identity | None:
    """The device with the authorities of now; None when it knows them. Over a connection that proves nothing: the
    answer is believed because TUF verifies it, which is what outlives a stolen authority."""
    from edge_agent.enrolment.https import unverified_context
    from edge_agent.release.fetcher import HttpsFetcher

    fetcher = HttpsFetcher(identity, url=identity.url_enrol, context=unverified_context())
    try:
        authorities = tuf_client.find_authorities(
            folder / STAGING_NAME, identity.tuf_root, fetcher, _FixedClock(now), identity.ca_pem
        )
    finally:
        fetcher.close()
    return None if authorities is None else identity_files.with_authorities(identity, authorities)


def _explained(error: ShoalError) -> str:
    return f"{error} ({error.hint})"[:500] if error.hint else str(error)[:500]


def main(arguments: Sequence[str]) -> int:
    """The child: prints what it found, or why it failed."""
    folder, now, failure = Path(arguments[0]), float(arguments[1]), ""
    code = 1
    result: Found | Failed
    try:
        request = msgspec.json.decode(sys.stdin.buffer.read(2**20), type=Request)
        identity = identity_files.load(folder)
        failure = _renew_if_due(identity, now)
        result = _check_with_trust(folder, now, request, identity)
        code = 0
    except ShoalError as error:
        result = Failed(
            error=type(error).__name__,
            message=str(error)[:2000],
            hint=error.hint,
            asked_seconds=asked_of(error),
        )
    except (OSError, ValueError) as error:
        result = Failed(error="StorageError", message=str(error)[:2000])
    print(msgspec.json.encode(structs.replace(result, renewal_failure=failure)).decode("ascii"))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
