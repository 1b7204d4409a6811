"""`shoal-edge check`: everything that a device needs, looked at one by one, with what to do about it.

The judging is that of a running agent (`checks/`); here the facts are gathered from outside of it: by connecting, by
reading, and by the self-test of the model that would serve. Laws of the file: it changes nothing that a running agent
uses; what fails does not keep the rest from being looked at.
"""

from __future__ import annotations

import email.utils
import http.client
import math
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from edge_agent import checks
from edge_agent.checks.facts import Facts
from edge_agent.device import broker_context
from edge_agent.enrolment import identity as identity_files
from edge_agent.enrolment.https import HttpsConnection, verified_context
from edge_agent.enrolment.identity import Identity
from edge_agent.link.budget import IDLE_SHARE
from edge_agent.link.door import plan_of
from edge_agent.lock import is_locked
from edge_agent.release.selftest import ChildSelfTest
from edge_agent.release.slots import FOLDER_NAME as SLOTS_NAME
from edge_agent.release.slots import Slots
from edge_agent.remedies import prescribe
from edge_agent.settings import EdgeSettings
from edge_agent.vitals.machine import free_bytes, hottest
from edge_agent.vitals.status import read_status
from process.clock import Clock
from process.health import Finding, with_remedies
from process.version import VERSION
from wire.agent_versions import TOO_OLD_HINT, is_new_enough
from wire.errors import ShoalError, TransportError
from wire.primitives import certificate_validity

CONNECT_SECONDS: Final = 10.0
_OF_IDENTITY: Final = (checks.certificate, checks.broker)
"""Of a device without an identity there is nothing to say about these."""


def run_checks(folder: Path, settings: EdgeSettings, clock: Clock) -> Iterator[Finding]:
    """Yields the findings one by one, in the order in which one would look; a warning or failure says what an agent
    that runs does about it."""
    limits = settings.health
    disk = _disk(folder)
    yield _with_remedy(checks.disk.judge(disk, limits), disk, settings)
    status = read_status(folder) or {}
    agent = _agent(folder, status)
    running = status if agent.level == "ok" else {}
    facts = replace(_of_status(disk, running) if running else disk, celsius=hottest())
    judged = list(checks.CHECKS[1:])
    try:
        identity = identity_files.load(folder)
    except ShoalError as error:
        yield Finding("identity", "fail", str(error), error.hint)
        if not (folder / SLOTS_NAME).is_dir():
            return
        judged = [check for check in judged if check not in _OF_IDENTITY]
    else:
        yield Finding("identity", "ok", f"{identity.device} of {identity.tenant}/{identity.fleet}")
        answered, skew_seconds = _guarded("aggregator", lambda: _aggregator(identity, clock))
        yield answered
        facts = replace(
            facts, skew_seconds=skew_seconds, **_certificate(identity, clock), **_broker(identity)
        )
    facts = replace(facts, **_model(folder, settings, status))
    for check in judged:
        yield _with_remedy(check.judge(facts, limits), facts, settings)
    yield judge_link(settings, running, clock)
    yield agent
    yield judge_version(status)


def _with_remedy(finding: Finding, facts: Facts, settings: EdgeSettings) -> Finding:
    if finding.level == "ok" or settings.health.remedies != "on":
        return finding
    return with_remedies([finding], prescribe(facts, settings.health))[0]


def _guarded(name: str, look: Callable[[], tuple[Finding, float | None]]) -> tuple[Finding, float | None]:
    try:
        return look()
    except ShoalError as error:
        return Finding(name, "fail", str(error), error.hint), None
    except OSError as error:
        return Finding(name, "fail", error.strerror or str(error)), None


def _disk(folder: Path) -> Facts:
    if not folder.is_dir():
        return Facts(disk_trouble=f"there is no {folder}")
    if not os.access(folder, os.W_OK):
        return Facts(disk_trouble=f"{folder} cannot be written")
    return Facts(free_bytes=free_bytes(folder))


def _certificate(identity: Identity, clock: Clock) -> dict[str, Any]:
    begin, end = certificate_validity(identity.certificate_pem)
    return {"certificate_seconds": end - clock.now(), "certificate_life_seconds": end - begin}


def _aggregator(identity: Identity, clock: Clock) -> tuple[Finding, float | None]:
    """Reaches the port without client certificates; with its answer's `Date`, how far this clock is off."""
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
        detail = f"{identity.url_enrol} answers {response.status}"
        return Finding("aggregator", "warn", detail, "see its own status: shoal-cloud check"), None
    answers = Finding("aggregator", "ok", f"{identity.url_enrol} answers")
    try:
        return answers, clock.now() - email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return answers, None


def _broker(identity: Identity) -> dict[str, Any]:
    """Reaches the port, with TLS where it is spoken; an MQTT session would end the agent's own."""
    where = f"{identity.mqtt_host}:{identity.mqtt_port}"
    try:
        address = (identity.mqtt_host, identity.mqtt_port)
        with socket.create_connection(address, CONNECT_SECONDS) as plain:
            if not identity.mqtt_tls:
                return {"broker_detail": f"{where} accepts connections"}
            with broker_context(identity).wrap_socket(plain) as secured:
                return {"broker_detail": f"{where} accepts connections, {secured.version()}"}
    except ShoalError as error:
        return {"broker_trouble": f"{where}: {error}"}
    except ssl.SSLError as error:
        return {
            "broker_trouble": f"{where}: no TLS: {error.reason or error} (a wrong clock, or another broker)"
        }
    except OSError as error:
        return {"broker_trouble": f"{where}: {error.strerror or error}"}


def _model(folder: Path, settings: EdgeSettings, status: dict[str, Any]) -> dict[str, Any]:
    if is_locked(folder):
        serving = status.get("release") or {}
        version = int(serving.get("version", 0))
        return {"release_version": version, "model_detail": f"release {version} serves in the running agent"}
    try:
        contents = Slots(folder).current() if (folder / SLOTS_NAME).is_dir() else None
        if contents is None:
            return {"release_version": 0}
        verdict = ChildSelfTest(
            memory_bytes=settings.release.selftest_memory_bytes,
            timeout_seconds=settings.release.selftest_seconds,
        ).check(contents)
    except ShoalError as error:
        return {"model_trouble": str(error)}
    return {
        "release_version": contents.version,
        "model_detail": f"release {contents.version} of {contents.manifest.model} gives its golden answers;"
        f" int8 {verdict.int8_seconds * 1e3:.2f} ms, float32 {verdict.float32_seconds * 1e3:.2f} ms a window",
    }


def _of_status(facts: Facts, status: dict[str, Any]) -> Facts:
    """What a running agent wrote down of itself."""
    outbox, told = status.get("outbox") or {}, status.get("metrics") or {}
    return replace(
        facts,
        owed=int(outbox.get("open", 0)),
        owed_bytes=int(told.get("shoal_edge_outbox_bytes", 0)),
    )


def judge_version(status: Mapping[str, Any]) -> Finding:
    """Warns when the aggregator said that it asks no agent as old as this one.

    Args:
        status: as a running agent wrote it last.
    """
    least = str(status.get("least_agent_version") or "")
    if is_new_enough(VERSION, least):
        return Finding("version", "ok", VERSION)
    return Finding("version", "warn", f"{VERSION} is older than {least[:64]}", TOO_OLD_HINT)


def judge_link(settings: EdgeSettings, status: Mapping[str, Any], clock: Clock) -> Finding:
    """Whether the link lets updates and downloads pass, and whether an idle agent fits its budget.

    Args:
        status: of an agent that runs; empty without one.

    Raises:
        ConfigurationError: (operator) a link that cannot be.
    """
    plan = plan_of(settings)
    if not plan.is_limited:
        return Finding("link", "ok", "no limits")
    budget = min(plan.per_day or math.inf, plan.per_month / 31 if plan.per_month else math.inf)
    idle = (
        f"an idle agent costs {_mb(plan.idle_bytes_a_day)} a day at a keepalive of {plan.keepalive_seconds} s"
    )
    if plan.idle_bytes_a_day > IDLE_SHARE * budget:
        hint = (
            "raise report.telemetry_seconds (and the aggregator's broker.silent_seconds to six times that),"
            " report.inference_seconds and release.check_seconds, or the budget"
        )
        return Finding("link", "warn", f"{idle}, of a budget of {_mb(budget)}", hint)
    told = status.get("link") or {}
    spent = [
        f"{_mb(int(told.get(f'spent_{name}_bytes', 0)))} of {_mb(most)} this {name}"
        for name, most in (("day", plan.per_day), ("month", plan.per_month))
        if most and told
    ]
    if told and not told.get("is_open", True):
        until = told.get("until")
        opens = f" until {_local(float(until))}" if until else ""
        detail = "; ".join([f"shut{opens}: {told.get('reason', '')}", *spent])
        return Finding(
            "link", "warn", detail, "updates and downloads wait; link.windows and the budget decide"
        )
    if not told and plan.has_windows and not plan.calendar.is_open(clock.now()):
        opens = _local(plan.calendar.next_change(clock.now()))
        return Finding("link", "ok", f"outside of its windows until {opens}; {idle}")
    return Finding("link", "ok", "; ".join(["open", *spent, idle]))


def _mb(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def _local(wall: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(wall))


def _agent(folder: Path, status: dict[str, Any]) -> Finding:
    start = f"start it: shoal-edge run --state {folder}"
    if not status:
        return Finding("agent", "warn", "no agent has run here yet", start)
    if not is_locked(folder):
        return Finding("agent", "warn", "no agent runs here", start)
    given = (status.get("health") or {}).get("remedies") or {}
    did = ", ".join(f"{name} {count}" for name, count in sorted(given.items()))
    detail = f"runs, {'connected' if status.get('connected') else 'not connected'}"
    return Finding("agent", "ok", f"{detail}; remedies: {did}" if did else detail)
