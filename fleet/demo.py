"""The demo: real processes on this machine make one whole loop on real data, and a report says what came of it.

An MQTT broker, the aggregator and one agent for each device of the data set; the first bundle is trained on the
operator's own data alone. Laws of the file: the reported windows are read only at the end, by a model that was
released already; nothing is tuned on them; every agent is a `shoal-edge run` as any user would start it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cloud_server.settings import (
    BrokerSettings,
    CloudSettings,
    GateSettings,
    ListenSettings,
    RunSettings,
    TrainSettings,
)
from edge_agent.settings import (
    EdgeSettings,
    InferenceSettings,
    NetworkSettings,
    ReleaseSettings,
    ReportSettings,
)
from fleet.demo_report import make_report
from fleet.local_agent import LocalAgent
from fleet.local_cloud import HOLDOUT, LocalCloud, free_port
from fleet.out_folder import make_empty
from fleet.report import FleetReport
from fleet.workloads import workload
from models.data import fashion_mnist, smartwatch
from models.data.federation import Federation
from models.first_bundle import make_first_bundle
from process.options import render_toml
from process.progress import Progress
from wire.errors import ConfigurationError, RoundError

MIN_GAIN = 0.01
"""A point on the devices' own windows is worth a release."""
MAX_OPERATOR_DROP = 0.5
"""The operator's people are not in the fleet: their windows only guard against collapse."""
MARKER = ".shoal-demo"
"""Says that a folder may be emptied by the next demo."""
_POLL_SECONDS = 0.25
_SETTLE_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPlan:
    """What a demo does.

    Attributes:
        dataset: a key of `DATASETS`.
        rate_hz: inference requests a second of each device.
        limit_seconds: after this the demo gives up.
    """

    dataset: str = "smartwatch"
    rounds: int = 20
    seed: int = 1
    broker: str = "embedded"
    rate_hz: float = 4.0
    limit_seconds: float = 900.0


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set with a model of the zoo that suits it."""

    model: str
    load: Callable[[int], Federation]

    @property
    def train(self) -> TrainSettings:
        """What devices are asked to do."""
        return workload(self.model).train


DATASETS: dict[str, Dataset] = {
    "smartwatch": Dataset(
        "watch_cnn1d",
        lambda seed: smartwatch.federation(),
    ),
    "fashion-mnist": Dataset(
        "fashion_cnn",
        lambda seed: fashion_mnist.federation(devices=20, alpha=0.3, seed=seed),
    ),
}


def run_demo(plan: DemoPlan, out: Path) -> FleetReport:
    """Runs a demo; everything it makes is in `out`, which is emptied first.

    Raises:
        ConfigurationError: (operator) an unknown data set.
        DataError: (operator) the data set is not on this machine.
        RoundError: a process ended by itself, or the demo took too long.
    """
    dataset = DATASETS.get(plan.dataset)
    if dataset is None:
        raise ConfigurationError(
            f"no data set is called {plan.dataset!r}", hint=f"there are {', '.join(DATASETS)}"
        )
    federation = dataset.load(plan.seed)
    make_empty(out, MARKER, "demo")
    with Progress("first model", 1) as progress:
        bundle = make_first_bundle(federation, dataset.model, out / "bundle", seed=plan.seed)
        progress.advance()
    deadline = time.monotonic() + plan.limit_seconds
    settings = _cloud_settings(plan, dataset, len(federation.devices))
    with ExitStack() as stack:
        cloud = stack.enter_context(LocalCloud(out / "cloud", settings, federation))
        cloud.import_model(bundle)
        cloud.start()
        agents = _start_agents(plan, out, cloud, federation, stack)
        _teach(cloud, agents, deadline)
        cloud.set_paused(False)
        _watch_rounds(plan, cloud, agents, deadline)
        _settle(cloud, agents)
        for agent in agents:
            agent.stop_feeding()
        _drain(agents)
        for agent in agents:
            agent.stop()
        return make_report(plan.dataset, plan.seed, federation, bundle, cloud, agents)


def _cloud_settings(plan: DemoPlan, dataset: Dataset, devices: int) -> CloudSettings:
    return CloudSettings(
        tenant="shoal",
        fleet=plan.dataset,
        listen=ListenSettings(public_port=free_port(), device_port=free_port()),
        broker=msgspec.convert(
            {"kind": plan.broker, "port": free_port(), "tls": plan.broker == "mosquitto"}, BrokerSettings
        ),
        run=RunSettings(
            name="demo",
            seed=plan.seed,
            rounds=plan.rounds,
            quorum=max(1, devices // 2),
            deadline_seconds=60.0,
            evaluate_seconds=30.0,
            paused=True,
        ),
        train=dataset.train,
        gate=GateSettings(min_gain=MIN_GAIN, max_operator_drop=MAX_OPERATOR_DROP, holdout=HOLDOUT),
    )


def _agent_settings() -> EdgeSettings:
    return EdgeSettings(
        # The report is about the int8 file, so it is what serves.
        inference=InferenceSettings(variant="int8"),
        release=ReleaseSettings(spread_seconds=0.2, probation_seconds=5.0),
        report=ReportSettings(telemetry_seconds=10.0, inference_seconds=30.0),
        network=NetworkSettings(receipt_seconds=5.0),
    )


def _start_agents(
    plan: DemoPlan, out: Path, cloud: LocalCloud, federation: Federation, stack: ExitStack
) -> list[LocalAgent]:
    settings = out / "agent.toml"
    settings.write_text(render_toml(_agent_settings()), encoding="utf-8")
    agents = []
    for device, split in federation.devices.items():
        agent = LocalAgent(
            device, out / "agents" / device, settings, cloud.token(device), split, rate_hz=plan.rate_hz
        )
        stack.callback(agent.stop)
        agents.append(agent)
    return agents


def _teach(cloud: LocalCloud, agents: list[LocalAgent], deadline: float) -> None:
    """Waits until every agent has enrolled, serves the first bundle and has its labelled windows."""
    with Progress("agents ready", len(agents)) as progress:
        while not (cloud.has_run and all(agent.is_taught for agent in agents)):
            _pause(cloud, agents, deadline)
            progress.advance(sum(agent.is_taught for agent in agents) - progress.done)


def _watch_rounds(plan: DemoPlan, cloud: LocalCloud, agents: list[LocalAgent], deadline: float) -> None:
    with Progress("rounds", plan.rounds) as progress:
        while not cloud.is_finished:
            _pause(cloud, agents, deadline)
            done = [row for row in cloud.rounds() if row.state == "done"]
            accuracy = done[-1].metrics.get("accuracy") if done else None
            note = "" if accuracy is None else f"validation accuracy {accuracy:.3f}"
            progress.advance(len(done) - progress.done, note)


def _settle(cloud: LocalCloud, agents: list[LocalAgent]) -> None:
    """Gives agents the time to take up the last release; one that does not is in the report as it is."""
    version = cloud.deployment.publisher.current_version()
    until = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < until and any(agent.release < version for agent in agents):
        _pause(cloud, agents, until + _SETTLE_SECONDS)


def _drain(agents: list[LocalAgent]) -> None:
    """Waits until every window that was sent has its answer."""
    until = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < until and any(agent.answered + agent.errors < agent.sent for agent in agents):
        time.sleep(_POLL_SECONDS)


def _pause(cloud: LocalCloud, agents: list[LocalAgent], deadline: float) -> None:
    cloud.check()
    for agent in agents:
        agent.check()
    if time.monotonic() > deadline:
        raise RoundError("the demo took too long", hint=f"see the logs beside {cloud.root}")
    time.sleep(_POLL_SECONDS)
