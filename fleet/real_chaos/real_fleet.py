"""A broker, an aggregator and agents as real processes on this machine, each of which can be broken alone.

Laws of the file: every process is the product's own command (an agent with its witness in front); between agents and
aggregator stands nothing but what `links` puts there; whatever happens, leaving the fleet ends all that it started,
stopped processes and orphans too. It waits for states and never for times.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

import msgspec

from cloud_server.broker import broker_tls
from cloud_server.settings import (
    BrokerSettings,
    CloudSettings,
    GateSettings,
    ListenSettings,
    RunSettings,
    ScreeningSettings,
    TrainSettings,
)
from edge_agent.enrolment.enrol import enrol
from edge_agent.settings import (
    EdgeSettings,
    InferenceSettings,
    NetworkSettings,
    ReleaseSettings,
    ReportSettings,
)
from fleet.chaos.template import make_split
from fleet.launch import CLOUD, Launch
from fleet.local_agent import LocalAgent
from fleet.local_cloud import LocalCloud, steady_port
from fleet.real_chaos.ledger import DeviceFiles, Ledger
from fleet.real_chaos.proxy import FaultProxy
from fleet.real_chaos.scenario import Task
from models.data.federation import Federation, Split
from models.thirds import FEATURES, LABELS
from process.clock import SystemClock
from process.options import render_toml
from wire.errors import RoundError
from wire.transport.broker import RunningBroker, start_broker

RUN = "chaos"
AGENTS, HTTPS, AGGREGATOR = "agents", "https", "aggregator"
LIMIT_SECONDS = 240.0
"""For whatever is waited for: a loaded machine is slow, and a fleet that hangs is a finding."""
BACKOFF_CAP_SECONDS = 1.0
POLL_SECONDS = 0.05
_RATE_HZ = 4.0
_PAUSED = b"event=run_paused"
_WITNESS = "fleet.real_chaos.witness"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """How a fleet differs from the usual one.

    Attributes:
        edge: settings of its agents.
        agent: how a device's agent is started, from what it would be started with.
        cloud: how the aggregator is started.
        home: where a device's state folder is; None for one beside the others.
        is_linked: whether a fault proxy stands between agents and broker, agents and HTTPS, aggregator and broker.
    """

    edge: EdgeSettings = field(default_factory=lambda: edge_settings())
    agent: Callable[[str, Launch], Launch] = lambda device, launch: launch
    cloud: Launch = field(default_factory=lambda: replace(CLOUD, is_apart=True))
    home: Callable[[str], Path] | None = None
    is_linked: bool = False


def edge_settings() -> EdgeSettings:
    """Of agents whose rounds are short and whose patience is."""
    return EdgeSettings(
        inference=InferenceSettings(variant="int8"),
        network=NetworkSettings(
            keepalive_seconds=2,
            retry_first_seconds=0.25,
            retry_cap_seconds=BACKOFF_CAP_SECONDS,
            receipt_seconds=1.0,
            ask_seconds=0.5,
        ),
        release=ReleaseSettings(spread_seconds=0.2, probation_seconds=5.0),
        report=ReportSettings(telemetry_seconds=5.0),
    )


class RealAgent:
    """One device through the lives of its agent."""

    def __init__(self, device: str, state: Path, settings: Path, split: Split, launch: Launch) -> None:
        self.device = device
        self.state = state
        self.files = DeviceFiles(state / "agent.db", state.with_suffix(".witness"))
        self._settings = settings
        self._split = split
        self._launch = launch
        self._life: LocalAgent | None = None
        self._errors = 0
        self._answered = 0

    @property
    def process_id(self) -> int:
        """Of the living agent; 0 when there is none. With a prefix in front, the prefix's."""
        return 0 if self._life is None else self._life.process_id

    @property
    def launch(self) -> Launch:
        """How its agent is started."""
        return self._launch

    @property
    def log_file(self) -> Path:
        """Of all its lives."""
        return self.state.with_suffix(".log")

    @property
    def errors(self) -> int:
        """Inference requests that were answered with an error, in all lives."""
        return self._errors + (0 if self._life is None else self._life.errors)

    @property
    def answered(self) -> int:
        """Inference requests that a model answered, in all lives."""
        return self._answered + (0 if self._life is None else self._life.answered)

    @property
    def is_up(self) -> bool:
        """Whether its living agent has answered a window."""
        return self._life is not None and self._life.answered > 0

    @property
    def is_taught(self) -> bool:
        """Whether it has kept its labelled windows (in its first life)."""
        return self._life is not None and self._life.is_taught

    def start(self, *, launch: Launch | None = None) -> None:
        """Starts an agent on the state folder; the labelled windows come in its first life only.

        Args:
            launch: for this life alone.
        """
        if self._life is not None:
            raise RoundError(f"{self.device} has an agent already")
        split = self._split
        if self.files.database.exists():
            nothing = (split.train_x[:0], split.train_y[:0])
            split = Split(*nothing, *nothing, split.test_x, split.test_y)
        chosen = launch or self._launch
        self._life = LocalAgent(
            self.device, self.state, self._settings, "", split, rate_hz=_RATE_HZ, launch=chosen
        )

    def kill(self) -> None:
        """Ends it as a crash would; what it was starting goes on without it."""
        self._end(LocalAgent.kill)

    def stop(self) -> None:
        """Ends it politely."""
        self._end(LocalAgent.stop)

    def end_for_good(self) -> None:
        """Ends it and all that it started."""
        life = self._life
        self.kill()
        if life is not None:
            life.end_children()

    def check(self) -> None:
        """Raises `RoundError` when it ended by itself."""
        if self._life is not None:
            self._life.check()

    def has_ended(self) -> bool:
        """Whether its process ended by itself (where a scenario makes it)."""
        try:
            self.check()
        except RoundError:
            return True
        return False

    def _end(self, how: Callable[[LocalAgent], object]) -> None:
        life, self._life = self._life, None
        if life is None:
            return
        how(life)
        self._errors += life.errors
        self._answered += life.answered


class RealFleet:
    """One fleet, from its first process to its last. A context manager.

    Attributes:
        cloud, broker, agents: what there is to break.
        proxy: its links (`AGENTS`, `HTTPS`, `AGGREGATOR`), where the plan asks for some.
        ledger: the books.
    """

    def __init__(self, task: Task, plan: FleetPlan | None = None) -> None:
        self.task = task
        self.plan = plan or FleetPlan()
        self.agents: dict[str, RealAgent] = {}
        self.proxy: FaultProxy | None = None
        self._stack = ExitStack()
        names = [f"device-{number}" for number in range(task.devices)]
        self._federation = Federation(
            "thirds",
            LABELS,
            (FEATURES,),
            make_split(task.seed, "operator"),
            {name: make_split(task.seed, name) for name in names},
        )

    def __enter__(self) -> RealFleet:
        try:
            self._start(self._stack)
        except BaseException:  # an interrupt too: what was started so far must end
            with _undisturbed():
                self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _undisturbed():
            self._stack.close()

    # ---- waiting -----------------------------------------------------------------------------------------------

    def wait(self, is_done: Callable[[], bool], what: str, *, limit_seconds: float = LIMIT_SECONDS) -> float:
        """Waits until it is done; returns the seconds that it took.

        Raises:
            RoundError: it took too long, or a process ended by itself.
        """
        started = time.monotonic()
        while not is_done():
            self.check()
            if time.monotonic() - started > limit_seconds:
                raise RoundError(f"waited too long for {what}", hint=f"see the logs in {self.task.folder}")
            time.sleep(POLL_SECONDS)
        return time.monotonic() - started

    def check(self) -> None:
        """Raises `RoundError` when a process ended by itself."""
        self.cloud.check()
        for agent in self.agents.values():
            agent.check()

    def wait_until_up(self) -> None:
        """Waits until everybody answers: aggregator, broker and every agent.

        Raises:
            RoundError: as `wait`.
        """
        self.wait(self.cloud.answers, "the aggregator")
        self.wait(self.broker.answers, "the broker")
        for agent in self.agents.values():
            self.wait(lambda agent=agent: agent.is_up, f"an answer of {agent.device}")  # type: ignore[misc]

    def drain(self) -> float:
        """Waits until every update that is owed now has ended; returns the seconds that it took.

        Raises:
            RoundError: as `wait`.
        """
        owed = self.ledger.open_updates()
        return self.wait(lambda: not owed & self.ledger.open_updates(), f"{len(owed)} updates that are owed")

    def calm(self, rounds: int) -> float:
        """Waits until so many rounds more have moved the head; returns the seconds that it took.

        Raises:
            RoundError: as `wait`.
        """
        wanted = self.ledger.rounds_done() + rounds
        return self.wait(lambda: self.ledger.rounds_done() >= wanted, f"{rounds} rounds after the last fault")

    def rest(self) -> float:
        """Lets no further round begin and waits until nothing moves; returns the seconds that it took.

        Raises:
            RoundError: as `wait`.
        """
        started, said = time.monotonic(), self.cloud.log_file.stat().st_size
        self.cloud.set_paused(True)
        # Between its last look at the run and the next the aggregator may open one round more.
        self.wait(lambda: _PAUSED in self.cloud.log_file.read_bytes()[said:], "the aggregator's pause")
        self.wait(self.ledger.is_at_rest, "rest")
        return time.monotonic() - started

    # ---- starting ----------------------------------------------------------------------------------------------

    def _start(self, stack: ExitStack) -> None:
        folder = self.task.folder
        folder.mkdir(parents=True)
        broker_port, device_port = steady_port(), steady_port()
        if self.plan.is_linked:
            targets = {AGENTS: broker_port, HTTPS: device_port, AGGREGATOR: broker_port}
            self.proxy = stack.enter_context(FaultProxy(targets, self.task.seed))
        settings = self._cloud_settings(broker_port, device_port)
        self.cloud = stack.enter_context(
            LocalCloud(folder / "cloud", settings, self._federation, launch=self.plan.cloud)
        )
        stack.callback(self.cloud.kill)
        tls = broker_tls(self.cloud.deployment) if settings.broker.tls else None
        self.broker: RunningBroker = stack.enter_context(
            start_broker(self.task.broker, folder=folder / "broker", port=broker_port, tls=tls)
        )
        stack.callback(_continue, lambda: self.broker.process_id)
        self.cloud.import_model(self.task.bundle)
        self.cloud.launch()
        self.wait(self.cloud.answers, "the aggregator")
        self.ledger = Ledger(
            folder / "cloud" / "cloud.db",
            {},
            self.cloud.deployment.artefacts.get_blob,
        )
        self._start_agents(stack)
        self.wait(
            lambda: self.cloud.has_run and all(agent.is_taught for agent in self.agents.values()),
            "agents that answer",
        )
        self.cloud.set_paused(False)

    def _start_agents(self, stack: ExitStack) -> None:
        settings = self.task.folder / "agent.toml"
        settings.write_text(render_toml(self.plan.edge), encoding="utf-8")
        for device, split in self._federation.devices.items():
            state = self.plan.home(device) if self.plan.home else self.task.folder / device
            enrol(self.cloud.token(device), state, clock=SystemClock())
            if self.proxy is not None:
                links = {"broker_url": self.proxy.port(AGENTS), "url_api": self.proxy.port(HTTPS)}
                _reroute(state / "identity" / "enrolment.json", links)
            witness = (self.task.folder / device).with_suffix(".witness")
            program = (sys.executable, "-m", _WITNESS, str(witness))
            launch = self.plan.agent(device, Launch(program, is_apart=True))
            agent = RealAgent(device, state, settings, split, launch)
            agent.files = DeviceFiles(state / "agent.db", witness)
            stack.callback(agent.end_for_good)
            self.agents[device] = agent
            self.ledger.watch(device, agent.files)
            agent.start()

    def _cloud_settings(self, broker_port: int, device_port: int) -> CloudSettings:
        is_guarded = self.task.broker == "mosquitto"
        port = broker_port if self.proxy is None else self.proxy.port(AGGREGATOR)
        return CloudSettings(
            tenant="shoal",
            fleet="chaos",
            listen=ListenSettings(public_port=steady_port(), device_port=device_port),
            broker=BrokerSettings(kind="external", port=port, tls=is_guarded),
            run=RunSettings(
                name=RUN,
                strategy="FedAvg",
                seed=self.task.seed + 1,
                quorum=1,
                # Who is slow is late, and a round does not wait for the last of them.
                goal=max(1, self.task.devices - 1),
                deadline_seconds=20.0,
                evaluate_seconds=10.0,
                evaluate_every=20,
                paused=True,
            ),
            train=TrainSettings(epochs=1, batch_size=8, learning_rate=0.05),
            screening=ScreeningSettings(norm_factor=0.0),
            gate=GateSettings(max_operator_drop=1.0),
        )


def _reroute(path: Path, ports: Mapping[str, int]) -> None:
    """Writes other ports into what a device was told when it was let in."""
    plain = msgspec.json.decode(path.read_bytes())
    for key, port in ports.items():
        plain[key] = f"{plain[key].rpartition(':')[0]}:{port}"
    path.write_bytes(msgspec.json.encode(plain))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Nobody's second Ctrl-C leaves half of a fleet behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _continue(process_id: Callable[[], int]) -> None:
    """A stopped process does not hear that it shall end."""
    with suppress(ProcessLookupError):
        os.kill(process_id(), signal.SIGCONT)
