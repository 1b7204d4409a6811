"""Two aggregators on one database: the one that waits for the other's lease to end, and the lease that each holds.

Laws of the file: whoever finds that it holds the lease no more ends at once, without a last word: what it has queued
must not leave, and all that counts is in the database; a database that does not answer ends nobody's lease; the beat
says that the loop lives, so a loop that hangs loses its lease as a machine that is gone does. Source:
docs/how-to/standby.md, docs/architecture.md (Two aggregators).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from cloud_server.db.engine import Database
from cloud_server.db.lease import Lease, load_lease, release_lease, renew_lease, take_lease
from cloud_server.deployment import Deployment
from cloud_server.settings import CloudSettings
from process.logs import get_logger
from process.metrics import Registry
from process.metrics_port import MetricsPort
from process.pulse import Pulse
from process.vitals import register_vitals
from wire.errors import ConfigurationError, StorageError

_log = get_logger("cloud.standby")

LOOK_SECONDS = 0.5
"""How often a standby looks at the lease."""
BEATS_PER_LEASE = 5.0


class Stop(Protocol):
    """What ends the wait; `threading.Event` is one, and so is what `service.run` is given."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Watch:
    """What a standby saw of the lease, by its own monotonic clock. Pure.

    Attributes:
        seen: the newest; None before the first look and after a look that failed.
        since: when it was first seen like that.
    """

    seen: Lease | None = None
    since: float = 0.0

    def look(self, lease: Lease, now: float) -> Watch:
        """One look that was answered."""
        return self if lease == self.seen else Watch(lease, now)

    def lost_sight(self) -> Watch:
        """The database did not answer: nor could the holder renew anything there."""
        return replace(self, seen=None)

    def has_ended(self, now: float) -> bool:
        """Whether the lease that was seen last may be taken."""
        return self.seen is not None and now - self.since >= self.seen.seconds


def check_standby(settings: CloudSettings) -> None:
    """Looks whether another machine can go on where this one stops.

    Raises:
        ConfigurationError: (operator) something of it would be on one machine only.
    """
    needs = {
        "storage.database": (settings.storage.database.startswith("postgresql"), "a PostgreSQL database"),
        "storage.artefacts": (bool(settings.storage.artefacts), "a store that both reach, such as s3://"),
        "broker.kind": (settings.broker.kind == "external", "a broker of its own: external"),
    }
    for option, (is_met, needed) in needs.items():
        if not is_met:
            raise ConfigurationError(
                f"a standby needs {needed} ({option} in settings.toml)", hint="docs/how-to/standby.md"
            )


def check_unheld(deployment: Deployment) -> None:
    """Looks for as long as a lease lasts whether somebody holds it; returns when it ended long ago, or never began.

    Raises:
        ConfigurationError: (operator) an aggregator lives on this database.
        StorageError: (disk) the database did not answer.
    """
    clock, pause = deployment.clock, threading.Event()
    first = _read(deployment.database)
    watch = Watch().look(first, clock.monotonic())
    while not watch.has_ended(clock.monotonic()):
        pause.wait(LOOK_SECONDS)
        watch = watch.look(_read(deployment.database), clock.monotonic())
        if watch.seen != first:
            raise ConfigurationError("an aggregator runs on this database", hint="stop it first, for good")


def wait_for_lease(deployment: Deployment, stop: Stop, pulse: Pulse) -> int | None:
    """Waits until nobody holds the lease, and takes it.

    Returns:
        The fencing token; None if `stop` was set first.
    """
    settings, clock, database = deployment.settings, deployment.clock, deployment.database
    watch, began, complained = Watch(), clock.monotonic(), ""
    pause = threading.Event()
    with ExitStack() as stack:
        if settings.metrics.listen:
            registry = Registry()
            register_vitals(registry, clock.now())
            stack.enter_context(MetricsPort(registry, settings.metrics.listen, pulse))
        _log.info("standby_waits", lease_seconds=settings.standby.lease_seconds)
        while not stop.is_set():
            pulse.stand_by("standby: another aggregator holds the lease")
            try:
                watch = watch.look(_read(database), clock.monotonic())
                if watch.has_ended(clock.monotonic()) and watch.seen is not None:
                    token = _take(database, watch.seen, settings.standby.lease_seconds)
                    if token is not None:
                        waited = round(clock.monotonic() - began, 1)
                        silent = round(clock.monotonic() - watch.since, 1)
                        _log.info(
                            "standby_takes_over", fence=token, waited_seconds=waited, silent_seconds=silent
                        )
                        return token
                complained = ""
            except StorageError as error:
                watch = watch.lost_sight()
                if str(error) != complained:
                    complained = str(error)
                    _log.warning("standby_cannot_look", error=complained, hint=error.hint)
            pause.wait(LOOK_SECONDS)
    return None


def _read(database: Database) -> Lease:
    with database.read() as connection:
        return load_lease(connection)


def _take(database: Database, seen: Lease, seconds: float) -> int | None:
    with database.transaction() as connection:
        token = take_lease(connection, seen, seconds)
    if token is not None:
        database.claimed = token
    return token


@contextmanager
def held_lease(
    database: Database,
    fence: int,
    seconds: float,
    *,
    is_alive: Callable[[], bool],
    on_lost: Callable[[], object],
) -> Iterator[None]:
    """Renews the lease of this process on a thread of its own, and gives it back at the end.

    Args:
        is_alive: whether the loop that the lease stands for came round lately.
        on_lost: called once, from the thread, when somebody else has claimed.
    """
    ended = threading.Event()

    def keep() -> None:
        complained = ""
        while not ended.wait(seconds / BEATS_PER_LEASE):
            if not is_alive():
                continue
            try:
                with database.transaction() as connection:
                    is_ours = renew_lease(connection, fence, seconds)
                complained = ""
            except StorageError as error:
                if str(error) != complained:
                    complained = str(error)
                    _log.error("lease_not_renewed", error=complained, hint=error.hint)
                continue
            if not is_ours:
                _log.error("lease_lost", fence=fence, hint="another aggregator has taken over: this one ends")
                on_lost()
                return

    with database.transaction() as connection:
        renew_lease(connection, fence, seconds)
    thread = threading.Thread(target=keep, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        try:
            with database.transaction() as connection:
                release_lease(connection, fence)
        except StorageError as error:
            _log.warning("lease_not_given_back", error=str(error))
