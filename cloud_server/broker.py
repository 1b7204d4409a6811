"""The broker of one deployment: started here or run by somebody else, watched, and told of revoked devices.

Laws of the file: wiring only; what watches has a thread of its own, because a probe of a dead broker takes
seconds, and nothing that goes wrong there ends the service.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cloud_server.db.devices import load_revoked_serials
from cloud_server.deployment import Deployment
from cloud_server.enrolment.ca import refresh_revocation_list
from cloud_server.enrolment.sessions import LIST_NAME, RevokedSessions, stand_in
from cloud_server.registry import AGGREGATOR_NAME
from process.logs import get_logger
from wire.errors import BrokerError, ConfigurationError, StorageError
from wire.primitives import write_private
from wire.transport.broker import BrokerTls, RunningBroker, end_session, start_broker

BROKER_PROBE_SECONDS = 5.0
AUTHORITIES_NAME = "authorities.pem"
_PURPOSE = "broker"
BUSY_SECONDS = 60.0
"""How long a broker that lives may leave a fresh connection without an answer: thousands of devices that come at once
keep it busy for a while, and who ended it then would make all of them come again."""
SESSIONS_SECONDS = 1.0
"""How often the register is asked whom to disconnect."""
_CALLED = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where we find what listens everywhere

_log = get_logger("cloud.broker")


@contextmanager
def open_broker(deployment: Deployment) -> Iterator[tuple[str, int]]:
    """Host and port of the broker, which is started here unless it is external."""
    settings = deployment.settings.broker
    if settings.kind == "external":
        if not settings.tls and not _is_here(settings.host):
            _log.warning(
                "broker_without_tls",
                host=settings.host,
                hint="anybody on the way can stop the fleet: shoal-cloud broker config, and broker.tls = true",
            )
        sessions = _sessions(deployment, settings.host, settings.port, None) if settings.tls else None
        with _watched(None, sessions):
            yield settings.host, settings.port
        return
    tls = broker_tls(deployment) if settings.tls else None
    with start_broker(
        settings.kind, folder=deployment.folder.broker, host=settings.host, port=settings.port, tls=tls
    ) as broker:
        _log.info("broker_started", kind=broker.kind, port=broker.port)
        sessions = _sessions(deployment, broker.host, broker.port, broker) if tls is not None else None
        followed = _FollowedAuthorities(deployment, broker) if tls is not None else None
        with _watched(broker, sessions, followed):
            yield broker.host, broker.port


@contextmanager
def _watched(
    broker: RunningBroker | None,
    sessions: RevokedSessions | None,
    followed: _FollowedAuthorities | None = None,
) -> Iterator[None]:
    """Keeps an eye on the broker and its sessions, on a thread of its own: a probe of a dead one takes seconds."""
    ended = threading.Event()
    watch = threading.Thread(
        target=_watch_broker, args=(broker, sessions, followed, ended), name="broker-watch", daemon=True
    )
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch_broker(
    broker: RunningBroker | None,
    sessions: RevokedSessions | None,
    followed: _FollowedAuthorities | None,
    ended: threading.Event,
) -> None:
    """Starts a broker that no longer answers anew, and ends the sessions of revoked devices."""
    next_probe = BROKER_PROBE_SECONDS
    waited = 0.0
    care = BrokerCare(broker) if broker is not None else None
    while not ended.wait(SESSIONS_SECONDS):
        waited += SESSIONS_SECONDS
        try:
            if followed is not None:
                followed.follow()
            if sessions is not None:
                sessions.follow()
            if care is not None and waited >= next_probe:
                next_probe = waited + BROKER_PROBE_SECONDS
                care.look()
        except BrokerError as error:
            _log.error("broker_does_not_come_back", error=str(error), hint=error.hint)
        except (StorageError, ConfigurationError) as error:
            _log.error("revocations_not_read", error=str(error), hint=error.hint)


class BrokerCare:
    """Starts a broker of ours anew that has ended, or that lives and answers nobody any more.

    Args:
        monotonic: seconds.
    """

    def __init__(self, broker: RunningBroker, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._broker = broker
        self._monotonic = monotonic
        self._answered_at = monotonic()

    def look(self) -> bool:
        """Whether it was started anew.

        Raises:
            BrokerError: it does not come back; the next look tries again.
        """
        if self._broker.answers():
            self._answered_at = self._monotonic()
            return False
        if self._broker.is_alive() and self._monotonic() - self._answered_at < BUSY_SECONDS:
            return False
        if not self._broker.revive():
            return False
        self._answered_at = self._monotonic()
        _log.warning("broker_revived", kind=self._broker.kind)
        return True


class _FollowedAuthorities:
    """Gives a broker of ours the authorities and the certificate of now. A reload would not do: mosquitto adds what a
    file says anew and never forgets what it said before, so the broker is started again, which its sessions outlive."""

    def __init__(self, deployment: Deployment, broker: RunningBroker) -> None:
        self._deployment = deployment
        self._broker = broker
        self._used = deployment.authorities
        self._shown = self._certificate()

    def follow(self) -> None:
        present, shown = self._deployment.authorities, self._certificate()
        is_known = [each.fingerprint for each in present.trusted] == [
            each.fingerprint for each in self._used.trusted
        ]
        if is_known and shown in (self._shown, b""):
            return
        broker_tls(self._deployment)
        self._broker.restart()
        self._used, self._shown = present, self._certificate()
        _log.info("broker_follows_authorities", authorities=len(present.trusted))

    def _certificate(self) -> bytes:
        """What the broker shall show; empty while it is made anew (`remedies/renew.py`)."""
        try:
            return (self._deployment.folder.authority / f"{_PURPOSE}.pem").read_bytes()
        except FileNotFoundError:
            return b""


def _sessions(deployment: Deployment, host: str, port: int, broker: RunningBroker | None) -> RevokedSessions:
    """What ends the sessions of revoked devices at a broker with TLS; an external one reads the list when told to."""

    def end(device: str) -> None:
        context = stand_in(deployment.authorities, device, now=deployment.clock.now())
        end_session(_CALLED.get(host, host), port, device, tls=context)

    def reload() -> None:
        if broker is not None:
            broker.reload()
        else:
            _log.warning(
                "revocation_list_changed",
                file=str(_list_file(deployment)),
                hint="give it to the broker: `shoal-cloud broker revoked` writes it too",
            )

    return RevokedSessions(
        deployment.database,
        deployment.authority_folder,
        deployment.clock,
        list_file=_list_file(deployment),
        reload=reload,
        end_session=end,
    )


def _is_here(host: str) -> bool:
    """Whether nothing of what goes there leaves this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _list_file(deployment: Deployment) -> Path:
    deployment.folder.broker.mkdir(parents=True, exist_ok=True)
    return deployment.folder.broker / LIST_NAME


def broker_tls(deployment: Deployment) -> BrokerTls:
    """What a broker of this deployment shows and trusts; its files are made, or made anew."""
    certificate, key = deployment.server_files(_PURPOSE)
    with deployment.database.read() as connection:
        serials = load_revoked_serials(connection, deployment.clock.now())
    authorities, now = deployment.authorities, deployment.clock.now()
    refresh_revocation_list(authorities.trusted, _list_file(deployment), serials, now=now)
    authority_file = deployment.folder.broker / AUTHORITIES_NAME
    write_private(authority_file, authorities.bundle_pem.encode("ascii"))
    return BrokerTls(
        ca_file=authority_file,
        certificate_file=certificate,
        key_file=key,
        tenant=deployment.settings.tenant,
        fleet=deployment.settings.fleet,
        aggregators=(AGGREGATOR_NAME,),
        revocation_file=_list_file(deployment),
    )
