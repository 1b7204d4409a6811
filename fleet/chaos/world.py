"""One history: a fleet, its aggregator and its broker on virtual time, under the faults of one schedule.

Laws of the file: the same seed and schedule give the same history; time moves only when nothing is left to do; no fault
strikes after the last update of the schedule, and from then on everything must come to its end within stated bounds.
Source: docs/architecture.md, "The simulation under faults"; DESIGN.md, law 8.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from cloud_server.privacy.budget import PrivateRun
from cloud_server.privacy.keys import LedgerKeys
from cloud_server.privacy.plan import PrivacyPlan
from cloud_server.release.releaser import Holdout
from edge_agent.release.selftest import InlineSelfTest
from edge_agent.release.slots import FOLDER_NAME as SLOTS_FOLDER
from edge_agent.runtime import Runtime
from edge_agent.settings import (
    EdgeSettings,
    NetworkSettings,
    ReleaseSettings,
    ReportSettings,
    StorageSettings,
    TrainingSettings,
)
from fleet.chaos.cloud import DATABASE_NAME, CloudNode, CloudSetup
from fleet.chaos.device import DeviceNode, Surroundings
from fleet.chaos.disk import mounted
from fleet.chaos.engine import RememberingEngine
from fleet.chaos.faults import UPDATES_PER_FAULT, Fault
from fleet.chaos.fold_check import FoldCheck
from fleet.chaos.heads import Heads
from fleet.chaos.helper import FaultyHelper
from fleet.chaos.injector import Injector, Line
from fleet.chaos.ledger import Ledger
from fleet.chaos.model_ledger import TIMESTAMP, Statement, refused_in
from fleet.chaos.node import Node
from fleet.chaos.outside import Outside
from fleet.chaos.plays import MAX_STALENESS, Play, play_of
from fleet.chaos.privacy_ledger import PrivacyLedger
from fleet.chaos.steps import step_of
from fleet.chaos.template import BEGIN, Template, make_split
from fleet.chaos.violation import Violation, ViolationError
from fleet.local_helper import LocalHelper, open_local_helper
from fleet.simulated_device import FLEET, TENANT
from fleet.virtual import VirtualTime
from wire.primitives import SigningKey
from wire.transport.memory import MemoryBroker

DRAIN_SECONDS = 600.0
"""Virtual time within which everything must be at rest once no fault strikes any more: the longest back-off of an
update (300 s and half as much jitter), a round and its failure's rest, and the start of a node that just died."""
CALM_ROUNDS = 2
FEWEST_SUMMED = 3
OVERTIME_UPDATES = 60
"""Updates after the last of the schedule in which faults may still find their points."""
LONGEST_SECONDS = 40_000.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one history."""

    seed: int
    made: int
    struck: tuple[Fault, ...]
    visits: Counter[str]
    standings: Counter[str]
    violations: tuple[Violation, ...]
    virtual_seconds: float
    rounds: int

    @property
    def lost(self) -> int:
        """Updates that no place has any more."""
        return sum(violation.what.endswith("lost") for violation in self.violations)

    @property
    def doubled(self) -> int:
        """Updates that count twice."""
        return sum(violation.what.endswith("doubled") for violation in self.violations)


@dataclass(slots=True)
class _Ready:
    """Nodes that have something to handle, each once."""

    names: deque[str] = field(default_factory=deque)
    waiting: set[str] = field(default_factory=set)

    def add(self, name: str) -> None:
        if name not in self.waiting:
            self.waiting.add(name)
            self.names.append(name)

    def take(self) -> str:
        name = self.names.popleft()
        self.waiting.discard(name)
        return name


class World:
    """One history.

    Args:
        schedule: of the faults; fewer than the seed's own when a failure is shrunk.
        play: another one than the seed's.
        tell: takes every line of the trace.
    """

    def __init__(
        self,
        template: Template,
        seed: int,
        schedule: Sequence[Fault],
        *,
        play: Play | None = None,
        tell: Callable[[Line], None] | None = None,
    ) -> None:
        self.seed = seed
        self.time = VirtualTime(BEGIN)
        self.broker = MemoryBroker(self.time, session_queue_packets=10_000)
        self._schedule = tuple(schedule)
        self._target = max((fault.after for fault in schedule), default=0) + UPDATES_PER_FAULT
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-chaos-", dir=memory_folder())
        self._ready = _Ready()
        self.play = play or play_of(seed)
        root = Path(self._folder.name)
        files = dict(template.files)
        self.helper = open_helper(self.play, seed, template, self.time)
        self.ledger = self._make_ledger(template, files)
        # What a file names comes before it, as it was written.
        for key in sorted(files, key=lambda key: (key.startswith("tuf/metadata/"), key.endswith(TIMESTAMP))):
            self.ledger.written(key, files[key])
        self.injector = Injector(schedule, self.time.monotonic, lambda: self.ledger.is_in_flight, tell)
        self.cloud = self._make_cloud(template, root / "cloud", files)
        self.devices = self._make_devices(template, root)
        self._nodes: dict[str, Node] = {self.cloud.name: self.cloud, **self.devices}
        self.outside = Outside(self.time, self.broker, self.injector, self.ledger, self.cloud, self.devices)

    # ---- the history -------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Plays it to its end, or to the first thing that must not be."""
        with self._mounted(), suppress(ViolationError):
            self._play()
        return self._outcome()

    def install(self, seconds: float) -> dict[str, bytes]:
        """Lets the fleet take up its release in peace; returns the files of the first device's slots."""
        with self._mounted():
            self._start()
            while self.time.monotonic() < seconds:
                self._settle()
                self.time.advance_to(self._next_moment())
            node = next(iter(self.devices.values()))
            place = node.disk.folder / SLOTS_FOLDER
            return {
                str(path.relative_to(place)): path.read_bytes()
                for path in sorted(place.rglob("*"))
                if path.is_file()
            }

    @contextmanager
    def _mounted(self) -> Iterator[None]:
        nodes = {name: node.disk for name, node in self._nodes.items()}
        try:
            with mounted(nodes):
                yield
        finally:
            self.cloud.end_apps()
            self.ledger.close()
            for disk in nodes.values():
                disk.come_back()
            self._folder.cleanup()

    def _start(self) -> None:
        for node in self._nodes.values():
            node.start()

    def _play(self) -> None:
        self._start()
        while not self._is_stormy_over():
            self._turn()
        self._calm_down()
        self._check_liveness()

    def _is_stormy_over(self) -> bool:
        made = len(self.ledger.made)
        if self.time.monotonic() > LONGEST_SECONDS:
            self.ledger.violated("fleet", f"made {made} updates in {LONGEST_SECONDS:.0f} s: stands still")
        return made >= self._target and (
            self.injector.is_done or made >= self._target + OVERTIME_UPDATES or not self._schedule
        )

    def _turn(self) -> None:
        self.injector.arm(len(self.ledger.made))
        self.outside.strike()
        self._settle()
        self.time.advance_to(self._next_moment())

    def _calm_down(self) -> None:
        """The last fault has struck: networks and clocks are well again, and what is down comes back by itself."""
        self.injector.calm()
        for node in self._nodes.values():
            node.clock.jump_seconds = 0.0
        for device in self.devices.values():
            device.is_slow_until = 0.0
        self.injector.note("fleet", "calm")

    def _check_liveness(self) -> None:
        owed, moved, stated = self.ledger.open_ids, self.ledger.moved, self.ledger.models.newest
        end = max(self.time.monotonic(), self.outside.hindered_until) + DRAIN_SECONDS
        while True:
            left, rounds = owed & self.ledger.open_ids, self.ledger.moved - moved
            behind = self._behind(stated)
            if not left and not behind and rounds >= CALM_ROUNDS:
                return
            if self.time.monotonic() > end:
                self._tell_what_is_left(left)
                self.ledger.violated(
                    "fleet",
                    f"{len(left)} updates are owed, {rounds} rounds ended and {len(behind)} devices are behind their"
                    f" ring after {DRAIN_SECONDS:.0f} s",
                )
            self._settle()
            self.time.advance_to(self._next_moment())

    def _behind(self, stated: Statement | None) -> list[str]:
        trusted = sorted(set(self.devices) - self.ledger.revoked_devices)
        return [] if stated is None else self.ledger.models.behind(stated, trusted)

    def _tell_what_is_left(self, left: set[str]) -> None:
        for update in sorted(left):
            self.injector.note(self.ledger.made[update], f"owes {update}, {self.ledger.in_cloud.get(update)}")

    def _settle(self) -> None:
        """Everything that happens at this moment."""
        while True:
            busy = self.broker.pump() + self.time.run_due()
            while self._ready.names:
                name = self._ready.take()
                self._nodes[name].pump()
                busy += 1
            now = self.time.monotonic()
            for node in self._nodes.values():
                if node.wake_at <= now:
                    node.tick()
                    busy += node is not self.cloud
            if not busy:
                return

    def _next_moment(self) -> float:
        offset = self.time.now() - self.time.monotonic()
        moments = [node.wake_at + offset for node in self._nodes.values()]
        if (planned := self.time.next_due()) is not None:
            moments.append(planned)
        if (due := self.broker.next_due()) is not None:
            moments.append(due + offset)
        return max(min(moments), self.time.now() + 1e-3)

    # ---- setting up ----------------------------------------------------------------------------------------------

    def _make_cloud(self, template: Template, folder: Path, files: dict[str, bytes]) -> CloudNode:
        folder.mkdir()
        (folder / DATABASE_NAME).write_bytes(template.database)
        operator = make_split(self.seed, "operator")
        setup = CloudSetup(
            bundle=template.bundle,
            config=self.play.config(self._private_run),
            keys=template.keys,
            holdout=Holdout(operator.val_x, operator.val_y),
            seed=self.seed,
            helper=None if self.helper is None else FaultyHelper(self.helper, self.injector, self.time.later),
            has_app=self.play.has_app,
        )
        return CloudNode(
            setup,
            folder,
            files,
            time=self.time,
            broker=self.broker,
            injector=self.injector,
            ledger=self.ledger,
            ready=self._ready.add,
            ring_signed=lambda: self.outside.ring_signed(),
            updates_heard=lambda devices: self.outside.updates_heard(devices),
        )

    def _make_ledger(self, template: Template, files: dict[str, bytes]) -> Ledger:
        plan = self.play.privacy
        privacy = None
        ledger: Ledger

        def violated(who: str, what: str) -> NoReturn:
            ledger.violated(who, what)

        if plan is not None:
            privacy = PrivacyLedger(violated)
        step = step_of(self.play, template.bundle.manifest, privacy)
        ledger = Ledger(
            self.time.monotonic,
            lambda name: self._device_now(name),
            FoldCheck(lambda sha256: files[f"blobs/{sha256[:2]}/{sha256}"], step),
            agent_settings().storage,
            privacy,
            Heads(MAX_STALENESS if self.play.is_buffered else 0),
            lambda name: refused_in(self.devices[name].disk.folder / SLOTS_FOLDER),
        )
        return ledger

    def _private_run(self, plan: PrivacyPlan) -> PrivateRun:
        """With secrets that follow from the seed and are another each time, as they are where they are drawn."""
        books, count = self.ledger.privacy, itertools.count()
        if books is None:
            raise RuntimeError("a private run has no books")

        def draw(number: int) -> bytes:
            secret = hashlib.sha256(f"secret {self.seed} {number} {next(count)}".encode()).digest()
            books.drew(secret)
            return secret

        keys = LedgerKeys((SigningKey.from_bytes(hashlib.sha256(b"chaos ledger").digest()),))
        return PrivateRun(plan, lambda: keys, draw)

    def _make_devices(self, template: Template, root: Path) -> dict[str, DeviceNode]:
        engine = RememberingEngine(Runtime(kept=16))
        around = Surroundings(
            time=self.time,
            broker=self.broker,
            injector=self.injector,
            ledger=self.ledger,
            engine=engine,
            selftest=InlineSelfTest(engine),
            settings=agent_settings(self.helper),
            read=self.cloud.read,
            ready=self._ready.add,
        )
        devices = {}
        for identity in template.identities:
            folder = root / identity.device
            folder.mkdir()
            for name, data in template.slots.items():
                place = folder / SLOTS_FOLDER / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)
            if template.release_sha256:
                self.ledger.models.passed_selftest(identity.device, template.release_sha256)
            split = make_split(self.seed, identity.device)
            devices[identity.device] = DeviceNode(identity, folder, around, split, self.seed)
        return devices

    def _device_now(self, name: str) -> float:
        node = self.devices[name]
        return node.agent.parts.clock.now() if node.agent is not None else node.clock.now()

    def _outcome(self) -> Outcome:
        return Outcome(
            seed=self.seed,
            made=len(self.ledger.made),
            struck=tuple(self.injector.struck),
            visits=self.injector.visits,
            standings=self.ledger.standings(),
            violations=tuple(self.ledger.violations),
            virtual_seconds=self.time.monotonic(),
            rounds=self.ledger.moved,
        )


def open_helper(play: Play, seed: int, template: Template, time: VirtualTime) -> LocalHelper | None:
    """The other party of a run with two servers; None where there is none."""
    if play.masks != "two_server":
        return None
    keys = {each.device: each.update_key.verify_key.public_bytes for each in template.identities}
    return open_local_helper(seed, keys, tenant=TENANT, fleet=FLEET, min_devices=FEWEST_SUMMED, clock=time)


def agent_settings(helper: LocalHelper | None = None) -> EdgeSettings:
    """An agent's own, with waits that suit short rounds."""
    pinned = "" if helper is None else helper.key.public_bytes.hex()
    return EdgeSettings(
        training=TrainingSettings(helper_key=pinned),
        network=NetworkSettings(receipt_seconds=3.0, ask_seconds=1.0, late_seconds=600.0),
        release=ReleaseSettings(check_seconds=120.0, probation_seconds=20.0),
        report=ReportSettings(telemetry_seconds=60.0, inference_seconds=3600.0),
        storage=StorageSettings(database_bytes=2**23, outbox_bytes=2**20, sample_bytes=2**20),
    )


def memory_folder() -> str | None:
    """Where files cost no disk, if this machine has such a place."""
    place = Path("/dev/shm")
    return str(place) if place.is_dir() else None
