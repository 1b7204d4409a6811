"""A fleet that loses its broker in the middle of a round, with and without the aggregator's word on how to come back.

1,000 light agents (`fleet/load`), each with its own certificate, over TLS; the aggregator is `shoal-cloud run` with
its own mosquitto, which is killed (SIGKILL) when nearly all have made their update and many have no receipt. What is
measured begins there and ends when every update has its receipt and every device is back. Laws of the file: the same
fleet twice, in one run; only `pace.connections_per_second` differs.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import structs

from bench.table import Row
from cloud_server.settings import PaceSettings
from fleet.load.campaign import LoadPlan, draft_of, load_settings
from fleet.load.crew import Crew
from fleet.load.crowd import CrowdPlan
from fleet.load.light_agent import Habits
from fleet.load.open_files import allow_open_files
from fleet.load.roll import enrol_fleet
from fleet.load.watch import UP, broker_of, scrape
from fleet.local_cloud import LocalCloud, free_port
from fleet.processes import own_cpu_seconds
from models.bundle import Bundle
from models.data import digits
from models.data.federation import Federation
from models.first_bundle import make_first_bundle
from wire.errors import RoundError

DEVICES = int(os.environ.get("BENCH_DEVICES", "1000"))
RATE = 50.0
_LIMIT_SECONDS = 900.0
_HEARTBEAT_SECONDS = 300.0
_POLL_SECONDS = 0.25
_WINDOW_SECONDS = 3.0
"""Crowds say once a second how many connections they have had: a rate is taken over a few of those."""


@dataclass(slots=True)
class Return:
    """How a fleet came back.

    Attributes:
        owed: updates without a receipt when the broker died.
        peak_rate: connections a second, the most over `_WINDOW_SECONDS`.
        peak_queue: the most that waited for the aggregator's loop.
        failed: attempts that never stood.
        online_seconds, receipts_seconds: until all were back; until all had their receipts.
        broker_cpu, cloud_cpu: seconds.
    """

    owed: int = 0
    peak_rate: float = 0.0
    peak_queue: int = 0
    failed: int = 0
    online_seconds: float = 0.0
    receipts_seconds: float = 0.0
    broker_cpu: float = 0.0
    cloud_cpu: float = 0.0
    _connects: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=4096))

    def note(self, now: float, connects: int, waiting: int) -> None:
        """One look."""
        self._connects.append((now, connects))
        for then, count in self._connects:
            if now - then >= _WINDOW_SECONDS:
                self.peak_rate = max(self.peak_rate, (connects - count) / (now - then))
        while self._connects and now - self._connects[0][0] > 2 * _WINDOW_SECONDS:
            self._connects.popleft()
        self.peak_queue = max(self.peak_queue, waiting)


def measure() -> list[Row]:
    """Rows: without a word against with one."""
    allow_open_files(DEVICES)
    federation = digits.federation(devices=2)
    with tempfile.TemporaryDirectory(prefix="bench-reconnect-model-") as place:
        bundle = make_first_bundle(federation, "digits_mlp", Path(place) / "bundle", seed=1)
        free = _play(0.0, bundle, federation)
        paced = _play(RATE, bundle, federation)
    note = (
        f"{DEVICES} devices over TLS; {free.owed} and {paced.owed} updates without a receipt when the broker was"
        f" killed; load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
    )
    return [
        _row("peak of connections a second", free.peak_rate, paced.peak_rate, note),
        _row("peak of events that wait in the aggregator", free.peak_queue, paced.peak_queue),
        _row("CPU of the broker, s", free.broker_cpu, paced.broker_cpu),
        _row("CPU of the aggregator, s", free.cloud_cpu, paced.cloud_cpu),
        _row("attempts that failed", free.failed, paced.failed),
        _row("time until all are back, s", free.online_seconds, paced.online_seconds),
        _row("time until all have their receipts, s", free.receipts_seconds, paced.receipts_seconds),
    ]


def _row(name: str, free: float, paced: float, note: str = "") -> Row:
    figures = f"{free:.1f} / {paced:.1f}"
    return Row(
        f"{name}: at once / spread", free / max(paced, 1e-9), note=f"{figures}; {note}" if note else figures
    )


def _play(rate: float, bundle: Bundle, federation: Federation) -> Return:
    with tempfile.TemporaryDirectory(prefix="bench-reconnect-") as place:
        out, port = Path(place), free_port()
        plan = LoadPlan(devices=DEVICES, limit_seconds=_LIMIT_SECONDS, cut_every=0, fetch_every=0)
        pace = PaceSettings(connections_per_second=rate, downloads_per_second=0.0)
        settings = load_settings(plan, port)
        # Nobody is silent for as long as this takes, however busy the machine is.
        broker = structs.replace(settings.broker, silent_seconds=6 * _HEARTBEAT_SECONDS)
        settings = structs.replace(settings, pace=pace, broker=broker)
        with LocalCloud(out / "cloud", settings, federation) as cloud:
            cloud.import_model(bundle)
            roll = enrol_fleet(
                cloud.deployment,
                out / "roll",
                DEVICES,
                broker_url=f"mqtts://127.0.0.1:{settings.broker.port}",
                each=lambda: None,
            )
            cloud.launch()
            _until(lambda: cloud.answers() and cloud.has_run, cloud)
            crowd = CrowdPlan(
                roll=str(roll.folder),
                first=0,
                count=DEVICES,
                ledger=str(out / "ledger.jsonl"),
                folder=str(out / "fetched"),
                host="127.0.0.1",
                port=settings.broker.port,
                is_tls=True,
                draft=draft_of(bundle, 1),
                habits=Habits(heartbeat_seconds=_HEARTBEAT_SECONDS),
                seed=1,
                dials=32,
            )
            with Crew([crowd], out) as crew:
                return _break(cloud, crew, port)


def _break(cloud: LocalCloud, crew: Crew, metrics_port: int) -> Return:
    """Opens the round, kills the broker, and watches the fleet come back."""
    _until(lambda: crew.tally().online >= DEVICES and crew.tally().releases.get(1, 0) >= DEVICES, cloud, crew)
    cloud.set_paused(False)
    _until(lambda: crew.tally().made >= 0.9 * DEVICES, cloud, crew)
    found, before = Return(), crew.tally()
    old = broker_of(cloud.process_id)
    found.owed = before.made - sum(before.receipts.values())
    cloud_cpu = own_cpu_seconds(cloud.process_id)
    os.kill(old, signal.SIGKILL)
    killed = time.monotonic()

    def is_over() -> bool:
        tally, now = crew.tally(), time.monotonic()
        found.note(now, tally.connects, int(scrape(metrics_port).get(UP, 0)))
        if not found.online_seconds and tally.connects - before.connects >= DEVICES:
            found.online_seconds = now - killed
        return bool(found.online_seconds) and sum(tally.receipts.values()) >= DEVICES

    _until(is_over, cloud, crew)
    found.receipts_seconds = time.monotonic() - killed
    found.failed = crew.tally().attempts_failed - before.attempts_failed
    found.cloud_cpu = own_cpu_seconds(cloud.process_id) - cloud_cpu
    found.broker_cpu = own_cpu_seconds(broker_of(cloud.process_id))
    return found


def _until(is_so: Callable[[], bool], cloud: LocalCloud, crew: Crew | None = None) -> None:
    """Waits for a state.

    Raises:
        RoundError: it did not come, or a process ended.
    """
    until = time.monotonic() + _LIMIT_SECONDS
    while not is_so():
        cloud.check()
        if crew is not None:
            crew.check()
        if time.monotonic() > until:
            raise RoundError("the fleet took too long", hint=f"see {cloud.log_file}")
        time.sleep(_POLL_SECONDS)
