"""A whole fleet in one process: the real aggregator and real agents, an in-memory broker, virtual time, one seed.

Laws of the file: the same scenario and seed give the same final parameters and the same report, byte for byte;
time moves only when nothing is left to do; nothing of the product is replaced but its outside (network, disk, clock,
child process). Source: docs/architecture.md, law 8.
"""

from __future__ import annotations

import hashlib
import heapq
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from cloud_server.artefacts import Artefacts
from cloud_server.assembly import Assembled, Base, RunConfig, assemble, make_run_parts, open_base
from cloud_server.db.engine import open_database
from cloud_server.keys import CloudKeys
from cloud_server.refine.refinement import Refinery
from cloud_server.registry import add_device
from cloud_server.release.releaser import Holdout
from cloud_server.rounds.runner import RoundRunner
from cloud_server.secure.opening import make_runner
from edge_agent.agent import Agent
from edge_agent.ports import JobResult
from edge_agent.release.fetcher import MemoryFetcher
from edge_agent.release.install import SharedTufReleases, TufReleases
from edge_agent.release.memory_slots import SharedReleases
from edge_agent.release.selftest import InlineSelfTest
from edge_agent.runtime import Runtime
from edge_agent.settings import EdgeSettings
from fleet.attackers import Conspiracy
from fleet.local_helper import LocalHelper, open_local_helper
from fleet.simulated_device import FLEET, TENANT, Shared, device_key, make_agent, make_identity
from fleet.virtual import VirtualTime
from models.bundle import Bundle
from models.data.federation import Federation, Floats, Labels, Split
from wire.errors import RoundError
from wire.helper import helper_json
from wire.transport.memory import MemoryBroker, MemoryTransport

KEPT_SESSIONS = 16
MOST_FAILURES = 20
"""Rounds in a row; on virtual time nobody would come to see to it."""
SETTLE_SECONDS = 180.0
"""Virtual time after the last round in which devices take up the last release and send what they still owe."""


class Simulation:
    """One simulated fleet.

    Args:
        federation: the data; one device for each entry.
        bundle: the first release.
        config: the run; it must name how many rounds it has.
        cost: virtual seconds of a job on a device, by the device's name.
        conspiracy: who of the devices attacks, and how; None where all are honest.
        trusted: for FLTrust.
        helper_devices: fewest devices in a sum that the helper of a run with two servers tells.
    """

    def __init__(
        self,
        federation: Federation,
        bundle: Bundle,
        config: RunConfig,
        *,
        seed: int,
        settings: EdgeSettings | None = None,
        cost: Callable[[str, JobResult], float] = lambda device, result: 1.0,
        conspiracy: Conspiracy | None = None,
        trusted: Refinery | None = None,
        helper_devices: int = 3,
    ) -> None:
        if config.policy.rounds < 1:
            raise RoundError("a simulated run needs a number of rounds", hint="set policy.rounds")
        self.federation = federation
        self.bundle = bundle
        self.time = VirtualTime()
        self.broker = MemoryBroker(self.time, session_queue_packets=100_000)
        self._seed = seed
        self._cost = cost
        self._conspiracy = conspiracy
        self._trusted = trusted
        self._ready: deque[Agent] = deque()
        self._waiting: set[str] = set()
        # (when, device): an entry counts only while `_wakes` still says the same.
        self._wake_heap: list[tuple[float, str]] = []
        self._wakes: dict[str, float] = {}
        self.base = self._open_base()
        self.helper: LocalHelper | None = None
        if config.masking is not None and config.masking.policy == "two_server":
            self.helper = self._open_helper(helper_devices)
        self.cloud = self._open_cloud()
        self.runner = self._make_runner(config)
        self._staging = tempfile.TemporaryDirectory(prefix="shoal-simulation-")
        self.agents: dict[str, Agent] = {}
        self._shared = self._share(settings or EdgeSettings())
        for device, split in federation.devices.items():
            self.agents[device] = self._add(device, split)

    # ---- running -----------------------------------------------------------------------------------------------

    def run(self, on_round: Callable[[int], None] = lambda number: None) -> None:
        """Plays until the run is finished and the last release has settled.

        Raises:
            RoundError: nothing is planned any more although the run is not finished, or round after round fails.
        """
        self.cloud.aggregator.start(self.cloud.aggregator.handle)
        for agent in self.agents.values():
            agent.start()
            self._note_wake(agent)
        seen, runner = 0, self.runner
        self.cloud.aggregator.begin(runner)
        while not runner.is_finished:
            self._settle()
            view = runner.view()
            moved = view.moved
            if view.failures >= MOST_FAILURES:
                raise RoundError(
                    f"{view.failures} rounds in a row have failed",
                    hint="the log says why; attackers under a rule that does not stand them do this",
                )
            if moved != seen:
                seen = moved
                on_round(moved)
            if not runner.is_finished:
                self.time.advance_to(self._next_moment())
        end = self.time.now() + SETTLE_SECONDS
        while self.time.now() < end:
            self._settle()
            self.time.advance_to(min(self._next_moment(), end))

    def close(self) -> None:
        """Ends every agent and frees what they share."""
        for agent in self.agents.values():
            agent.stop()
        if self.helper is not None:
            self.helper.store.close()
        self.base.database.close()
        self._staging.cleanup()

    def _settle(self) -> None:
        """Everything that happens at this moment."""
        while True:
            busy = self.broker.pump() + self.time.run_due()
            while self._ready:
                agent = self._ready.popleft()
                self._waiting.discard(agent.identity.device)
                agent.pump()
                self._note_wake(agent)
                busy += 1
            self._next_tick = self.cloud.aggregator.tick()
            while (wake := self._next_wake()) is not None and wake <= self.time.monotonic():
                agent = self.agents[heapq.heappop(self._wake_heap)[1]]
                agent.tick()
                self._note_wake(agent)
                busy += 1
            if not busy:
                return

    def _note_wake(self, agent: Agent) -> None:
        """An agent's timers change only when it handles something, so they are read only then."""
        device, wake = agent.identity.device, agent.wake_at
        if self._wakes.get(device) != wake or wake <= self.time.monotonic():
            self._wakes[device] = wake
            heapq.heappush(self._wake_heap, (wake, device))

    def _next_wake(self) -> float | None:
        """The earliest timer of any agent, on the monotonic clock."""
        while self._wake_heap:
            wake, device = self._wake_heap[0]
            if self._wakes.get(device) == wake:
                return wake
            heapq.heappop(self._wake_heap)
        return None

    def _next_moment(self) -> float:
        """When something is planned next, by anybody."""
        moments = [self._next_tick]
        planned = self.time.next_due()
        if planned is not None:
            moments.append(planned)
        offset = self.time.now() - self.time.monotonic()
        wake = self._next_wake()
        if wake is not None:
            moments.append(wake + offset)
        due = self.broker.next_due()
        if due is not None:
            moments.append(due + offset)
        moment = min(moments)
        if moment == float("inf"):
            raise RoundError("the simulated fleet stands still")
        return max(moment, self.time.now() + 1e-3)

    # ---- setting up --------------------------------------------------------------------------------------------

    def _open_base(self) -> Base:
        digest = hashlib.sha256(f"simulation {self._seed}".encode()).digest()
        return open_base(
            open_database("sqlite://"),
            Artefacts.in_memory(),
            CloudKeys.from_seed(digest),
            self.time,
            tenant=TENANT,
            fleet=FLEET,
        )

    def _open_cloud(self) -> Assembled:
        publisher = self.base.publisher
        publisher.import_model(self.bundle)
        publisher.publish(publisher.propose_bundle(self.bundle).version)
        transport = MemoryTransport(self.broker, "aggregator", queue_packets=100_000)
        return assemble(self.base, transport, tenant=TENANT, fleet=FLEET)

    def _open_helper(self, min_devices: int) -> LocalHelper:
        """Whose roster is that of the simulated devices, and whose key they know from the signed metadata."""
        keys = {device: device_key(self._seed, device).public_bytes for device in self.federation.devices}
        helper = open_local_helper(
            self._seed, keys, tenant=TENANT, fleet=FLEET, min_devices=min_devices, clock=self.time
        )
        self.base.repository.set_helper(helper_json(TENANT, FLEET, helper.key))
        return helper

    def _make_runner(self, config: RunConfig) -> RoundRunner:
        operator = self.federation.operator
        holdout = Holdout(operator.val_x, operator.val_y)
        plan, ports = make_run_parts(
            self.base, self.cloud, self.bundle, config, holdout, trusted=self._trusted
        )
        runner = make_runner(
            plan,
            ports,
            config.masking,
            registry=self.base.registry,
            downlink=self.cloud.downlink,
            helper=self.helper,
        )
        runner.resume(self.bundle.checkpoint(), self._seed)
        return runner

    def _share(self, settings: EdgeSettings) -> Shared:
        engine = Runtime(kept=KEPT_SESSIONS)
        repository = self.base.repository
        fetcher = MemoryFetcher(lambda path: repository.read(path.lstrip("/")))
        kem, orders = self.base.keys.online_keys()
        root = repository.first_root()
        staging = Path(self._staging.name)
        reader = make_identity("reader", device_key(self._seed, "reader"), root, kem, orders)
        return Shared(
            time=self.time,
            broker=self.broker,
            releases=SharedTufReleases(TufReleases(staging, reader, fetcher, self.time), fetcher),
            slots=SharedReleases(),
            engine=engine,
            selftest=InlineSelfTest(engine),
            settings=settings,
            tuf_root=root,
            kem=kem,
            orders=orders,
        )

    def _add(self, device: str, split: Split) -> Agent:
        key, conspiracy = device_key(self._seed, device), self._conspiracy
        with self.base.database.transaction() as connection:
            add_device(connection, device, key.verify_key, now=self.time.now())
        agent = make_agent(
            self._shared,
            device,
            seed=self._seed,
            cost=lambda result: self._cost(device, result),
            notify=lambda: self._wake(device),
            behind=lambda worker: worker if conspiracy is None else conspiracy.behind(device, worker),
        )
        x, y = split.train_x, split.train_y
        if conspiracy is not None:
            x, y = conspiracy.training_data(device, x, y)
        self._observe(agent, x, y, "train")
        self._observe(agent, split.val_x, split.val_y, "val")
        return agent

    def _observe(self, agent: Agent, x: Floats, y: Labels, part: Literal["train", "val"]) -> None:
        """What the device has seen before the run; nobody labels what a task without labels learns from."""
        has_labels = self.bundle.manifest.task.kind == "classification"
        for window, label in zip(x, y, strict=True):
            agent.observe(window, int(label) if has_labels else None, part)

    def _wake(self, device: str) -> None:
        agent = self.agents.get(device)
        if agent is not None and device not in self._waiting:
            self._waiting.add(device)
            self._ready.append(agent)
