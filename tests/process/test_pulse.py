"""What a service manager and a probe are told: the beat of a loop, over a real notification socket and a real port."""

from __future__ import annotations

import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from process.metrics import Registry
from process.metrics_port import MetricsPort
from process.pulse import Pulse
from process.service_manager import ServiceManager


class Time:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> float:
        return self.seconds

    def monotonic(self) -> float:
        return self.seconds


class Listener:
    """systemd's end of the notification socket."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._socket.setblocking(False)
        self.address = address

    def heard(self) -> list[str]:
        said = []
        try:
            while True:
                said.append(self._socket.recv(4096).decode())
        except BlockingIOError:
            return said

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listener]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@shoal-test-{os.getpid()}"
    opened = Listener(address)
    yield opened
    opened.close()


def test_manager_hears_ready_once_then_a_beat_per_share_of_the_watchdog(listener: Listener) -> None:
    time = Time()
    manager = ServiceManager.of({"NOTIFY_SOCKET": listener.address, "WATCHDOG_USEC": "40000000"})
    pulse = Pulse(time, stale_seconds=60.0, manager=manager)
    assert pulse.longest_wait_seconds == 10.0
    pulse.beat(is_ready=True, status="release 3\nX=1")
    assert listener.heard() == ["READY=1", "WATCHDOG=1\nSTATUS=release 3X=1"]
    time.seconds += 4.0
    pulse.beat(is_ready=True)
    assert listener.heard() == []
    time.seconds += 1.0
    pulse.beat(is_ready=True)
    assert listener.heard() == ["WATCHDOG=1"]
    pulse.stop()
    assert listener.heard() == ["STOPPING=1"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"NOTIFY_SOCKET": "/nowhere/notify", "WATCHDOG_USEC": "soon"},
        {"NOTIFY_SOCKET": "/nowhere/notify", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"},
        {"WATCHDOG_USEC": "1000000"},
    ],
)
def test_manager_that_is_not_there_or_not_ours_changes_nothing(environment: dict[str, str]) -> None:
    manager = ServiceManager.of(environment)
    assert manager.watchdog_seconds == 0.0
    pulse = Pulse(Time(), stale_seconds=60.0, manager=manager)
    pulse.beat(is_ready=True, status="x")
    pulse.stop()
    assert pulse.longest_wait_seconds == float("inf")


def test_probes_see_a_loop_that_hangs_and_one_that_stops() -> None:
    time = Time()
    pulse = Pulse(time, stale_seconds=60.0)
    assert pulse.answer("/healthz") == (200, "ok")
    assert pulse.answer("/readyz") == (503, "not ready")
    pulse.beat(is_ready=False)
    assert pulse.answer("/readyz") == (503, "not ready")
    pulse.beat(is_ready=True)
    assert pulse.answer("/readyz") == (200, "ready")
    time.seconds += 61.0
    assert pulse.answer("/healthz") == (503, "stuck")
    assert pulse.answer("/readyz") == (503, "not ready")
    pulse.beat(is_ready=True)
    pulse.stop()
    assert pulse.answer("/readyz") == (503, "not ready")
    assert pulse.answer("/metrics") is None


def test_port_answers_probes_with_one_word() -> None:
    pulse = Pulse(Time(), stale_seconds=60.0)
    with MetricsPort(Registry(), "127.0.0.1:0", pulse) as port:
        assert read(port, "/healthz") == (200, b'{"status": "ok"}')
        assert read(port, "/readyz") == (503, b'{"status": "not ready"}')
        pulse.beat(is_ready=True)
        assert read(port, "/readyz") == (200, b'{"status": "ready"}')
        assert read(port, "/other")[0] == 404


def test_port_without_a_pulse_answers_no_probe() -> None:
    with MetricsPort(Registry(), "127.0.0.1:0") as port:
        assert read(port, "/healthz")[0] == 404


def read(port: MetricsPort, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port.port}{path}", timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
