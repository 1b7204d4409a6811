"""`shoal-edge check`: everything that a device needs, looked at one by one, with what to do about it.

Laws of the file: a check changes nothing that a running agent uses; one that fails does not keep the others
from running; a person reads the hints.
"""

from __future__ import annotations

import email.utils
import http.client
import os
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from edge_agent import identity as identity_files
from edge_agent.device import broker_context
from edge_agent.https import HttpsConnection, verified_context
from edge_agent.identity import Identity
from edge_agent.lock import is_locked
from edge_agent.selftest import ChildSelfTest
from edge_agent.settings import EdgeSettings
from edge_agent.slots import Slots
from edge_agent.status import read_status
from process.clock import Clock
from wire.errors import ShoalError, TransportError
from wire.primitives import certificate_not_after

Level = Literal["ok", "warn", "fail"]
MIN_FREE_BYTES: Final = 64 * 2**20
CONNECT_SECONDS: Final = 10.0
CLOCK_SKEW_SECONDS: Final = 60.0
EXPIRY_WARNING_SECONDS: Final = 2 * 86_400.0
MAX_OWED: Final = 64


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `hint` says what to do, where there is something to do."""

    name: str
    level: Level
    detail: str
    hint: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_checks(folder: Path, settings: EdgeSettings, clock: Clock) -> Iterator[Finding]:
    """Yields the findings one by one, in the order in which one would look."""
    yield _guarded("disk", lambda: _disk(folder, settings))
    try:
        identity = identity_files.load(folder)
    except ShoalError as error:
        yield Finding("identity", "fail", str(error), error.hint)
        return
    yield Finding("identity", "ok", f"{identity.device} of {identity.tenant}/{identity.fleet}")
    yield _guarded("certificate", lambda: _certificate(identity, clock))
    yield _guarded("aggregator", lambda: _aggregator(identity, clock))
    yield _guarded("broker", lambda: _broker(identity))
    yield _guarded("model", lambda: _model(folder, settings))
    yield _guarded("agent", lambda: _agent(folder, clock))


def _guarded(name: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except ShoalError as error:
        return Finding(name, "fail", str(error), error.hint)
    except OSError as error:
        return Finding(name, "fail", error.strerror or str(error))


def _disk(folder: Path, settings: EdgeSettings) -> Finding:
    if not folder.is_dir():
        return Finding("disk", "fail", f"there is no {folder}", identity_files.NOT_ENROLLED_HINT)
    if not os.access(folder, os.W_OK):
        return Finding(
            "disk", "fail", f"{folder} cannot be written", "run as the agent's user, or change its owner"
        )
    free = shutil.disk_usage(folder).free
    detail = f"{free // 2**20} MiB free at {folder}"
    if free < MIN_FREE_BYTES:
        return Finding("disk", "warn", detail, f"{MIN_FREE_BYTES // 2**20} MiB should be free for a release")
    return Finding("disk", "ok", detail)


def _certificate(identity: Identity, clock: Clock) -> Finding:
    left = certificate_not_after(identity.certificate_pem) - clock.now()
    if left <= 0:
        return Finding(
            "certificate",
            "fail",
            f"expired {-left / 86_400:.1f} days ago",
            "start the agent: it renews by its update key, unless the device was away for too long",
        )
    detail = f"valid for {left / 86_400:.1f} days"
    if left < EXPIRY_WARNING_SECONDS:
        return Finding(
            "certificate", "warn", detail, "it renews itself while the agent runs and reaches the aggregator"
        )
    return Finding("certificate", "ok", detail)


def _aggregator(identity: Identity, clock: Clock) -> Finding:
    """Reaches the port without client certificates, and compares clocks by the answer's `Date`."""
    connection = HttpsConnection(
        identity.url_enrol, tls_name=identity.tls_name, context=verified_context(identity.ca_pem)
    )
    try:
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        response.read(65_536)
        date = response.getheader("Date", "")
    except (OSError, http.client.HTTPException) as error:
        raise TransportError(f"no answer from {identity.url_enrol}: {error}") from error
    finally:
        connection.close()
    if response.status != http.client.OK:
        return Finding(
            "aggregator", "warn", f"{identity.url_enrol} answers {response.status}", "see its own status"
        )
    try:
        skew = clock.now() - email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return Finding("aggregator", "ok", f"{identity.url_enrol} answers")
    if abs(skew) > CLOCK_SKEW_SECONDS:
        return Finding(
            "aggregator",
            "fail",
            f"{identity.url_enrol} answers, but this clock is {skew:+.0f} seconds off",
            "set the clock (NTP): messages and certificates expire by it",
        )
    return Finding("aggregator", "ok", f"{identity.url_enrol} answers, clocks agree within {abs(skew):.0f} s")


def _broker(identity: Identity) -> Finding:
    """Reaches the port, with TLS where it is spoken; an MQTT session would end the agent's own."""
    address = (identity.mqtt_host, identity.mqtt_port)
    where = f"{identity.mqtt_host}:{identity.mqtt_port}"
    hint = "is the broker running, and is its port open from here?"
    try:
        with socket.create_connection(address, CONNECT_SECONDS) as plain:
            if not identity.mqtt_tls:
                return Finding("broker", "ok", f"{where} accepts connections")
            with broker_context(identity).wrap_socket(plain) as secured:
                return Finding("broker", "ok", f"{where} accepts connections, {secured.version()}")
    except ssl.SSLError as error:
        return Finding(
            "broker", "fail", f"{where}: no TLS: {error.reason or error}", "wrong clock, or another broker"
        )
    except OSError as error:
        return Finding("broker", "fail", f"{where}: {error.strerror or error}", hint)


def _model(folder: Path, settings: EdgeSettings) -> Finding:
    if is_locked(folder):
        serving = (read_status(folder) or {}).get("release") or {}
        return Finding("model", "ok", f"release {serving.get('version', 0)} serves in the running agent")
    contents = Slots(folder).current() if (folder / "slots").is_dir() else None
    if contents is None:
        return Finding("model", "warn", "no release is installed yet", "it comes while the agent runs")
    verdict = ChildSelfTest(
        memory_bytes=settings.release.selftest_memory_bytes, timeout_seconds=settings.release.selftest_seconds
    ).check(contents)
    return Finding(
        "model",
        "ok",
        f"release {contents.version} of {contents.manifest.model} gives its golden answers;"
        f" int8 {verdict.int8_seconds * 1e3:.2f} ms, float32 {verdict.float32_seconds * 1e3:.2f} ms a window",
    )


def _agent(folder: Path, clock: Clock) -> Finding:
    status = read_status(folder)
    if status is None:
        return Finding(
            "agent", "warn", "no agent has run here yet", f"start it: shoal-edge run --state {folder}"
        )
    owed = int(status.get("outbox", {}).get("open", 0))
    detail = (
        f"{status.get('status')}, {'connected' if status.get('connected') else 'not connected'}, {owed} owed"
    )
    if owed > MAX_OWED:
        return Finding("agent", "warn", detail, "updates wait for receipts: is the aggregator running?")
    return Finding("agent", "ok", detail)
