"""The end of a revoked device's session at the broker, and the list by which it does not come back.

A broker asks nobody after the handshake: a device that is revoked keeps its connection, and everything that is
delivered on it, for as long as it stays (docs/protocol.md, clause 2). So the aggregator writes the authority's
revocation list, makes the broker read it, and then takes the device's session over: as the authority, it can
hold a certificate of that name for the moment that this takes.

Laws of the file: the list comes before the take-over, or the device is back before it counts; what failed is
tried again; nothing that a broker does ends the aggregator, whose own register refuses the device's messages
and requests from the moment of the revocation.
"""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path

from cloud_server.db.devices import VERSION_QUERY, load_revoked_devices, load_revoked_serials
from cloud_server.db.engine import Database
from cloud_server.enrolment.authorities import Authorities, AuthoritySource
from cloud_server.enrolment.ca import ensure_client_files, refresh_revocation_list
from process.clock import Clock
from process.logs import get_logger
from wire.errors import BrokerError

LIST_NAME = "revoked.crl"
# How often the list is looked at without a change, for the certificates that leave it and its age.
_LOOK_SECONDS = 3600.0
_STAND_IN_DAYS = 1.0 / 24

_log = get_logger("cloud.sessions")


class RevokedSessions:
    """Follows the register's revocations to one broker. For one thread.

    Args:
        list_file: where the broker reads the list.
        reload: makes the broker read it again.
        end_session: takes the session of one device over and leaves nothing of it; raises `BrokerError`.
    """

    def __init__(
        self,
        database: Database,
        authorities: AuthoritySource,
        clock: Clock,
        *,
        list_file: Path,
        reload: Callable[[], None],
        end_session: Callable[[str], None],
    ) -> None:
        self._database = database
        self._authorities = authorities
        self._clock = clock
        self._list_file = list_file
        self._reload = reload
        self._end_session = end_session
        self._version = -1
        self._look_at = 0.0
        self._ended: set[str] = set()
        self._open: set[str] = set()

    def follow(self) -> None:
        """Brings the broker to what the register says now; one cheap question when nothing changed."""
        version = self._database.peek(VERSION_QUERY)
        if version != self._version or self._clock.monotonic() >= self._look_at:
            self._read_register()
            self._version = version
            self._look_at = self._clock.monotonic() + _LOOK_SECONDS
        for device in sorted(self._open):
            self._end(device)

    def _read_register(self) -> None:
        now = self._clock.now()
        with self._database.read() as connection:
            serials = load_revoked_serials(connection, now)
            devices = load_revoked_devices(connection, now)
        if refresh_revocation_list(self._authorities().trusted, self._list_file, serials, now=now):
            self._reload()
        self._open = devices - self._ended

    def _end(self, device: str) -> None:
        try:
            self._end_session(device)
        except BrokerError as error:
            _log.warning("session_not_ended", device=device, error=str(error), hint=error.hint)
            return
        self._open.discard(device)
        self._ended.add(device)
        _log.info("session_ended", device=device)


def stand_in(authorities: Authorities, device: str, *, now: float) -> ssl.SSLContext:
    """A TLS context that shows a certificate in a device's name, for taking its session over.

    The key lies on the disk while the context is made, and nowhere after.
    """
    context = ssl.create_default_context(cadata=authorities.bundle_pem)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the broker is known by its CA; its name is the devices' matter
    with tempfile.TemporaryDirectory(prefix="shoal-stand-in-") as folder:
        certificate, key = ensure_client_files(
            authorities.issuing, Path(folder), device, now=now, days=_STAND_IN_DAYS
        )
        context.load_cert_chain(certificate, key)
    return context
