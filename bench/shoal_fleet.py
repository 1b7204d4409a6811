"""Shoal's own side of a measurement: broker, aggregator and agents as the processes that a user starts.

Laws of the file: nothing of the product is left out (enrolment, signatures, sealing, receipts, the database); what a
figure is taken over begins at `resume` and ends when the aggregator's books say so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from cloud_server.settings import (
    BrokerSettings,
    CloudSettings,
    ListenSettings,
    RunSettings,
    TrainSettings,
)
from edge_agent.settings import EdgeSettings, InferenceSettings, ReleaseSettings
from fleet.local_agent import LocalAgent
from fleet.local_cloud import LocalCloud, free_port
from fleet.processes import children
from models.bundle import Bundle
from models.data.federation import Federation, Split
from process.options import render_toml
from wire.errors import RoundError

POLL_SECONDS = 0.05
LIMIT_SECONDS = 300.0
# Windows come rarely: the figures are about learning and about rest.
_RATE_HZ = 0.1


class ShoalFleet:
    """A running aggregator that is paused, and one agent for each device of the federation, all on loopback."""

    def __init__(self, folder: Path, federation: Federation, run: RunSettings, train: TrainSettings) -> None:
        self._stack = ExitStack()
        self._folder = folder
        self._settings = folder / "agent.toml"
        self._federation = federation
        self.agents: list[LocalAgent] = []
        settings = CloudSettings(
            tenant="shoal",
            fleet="bench",
            listen=ListenSettings(public_port=free_port(), device_port=0),
            broker=BrokerSettings(kind="auto", port=0),
            run=run,
            train=train,
        )
        with ExitStack() as stack:
            self.cloud = stack.enter_context(LocalCloud(folder / "cloud", settings, federation))
            self.cloud.start()
            self._start_agents(stack)
            self._stack = stack.pop_all()

    def import_model(self, bundle: Bundle) -> None:
        """Gives the fleet its model and waits until every agent serves it and has its labelled windows."""
        self.cloud.import_model(bundle)
        self.wait(lambda: self.cloud.has_run and all(agent.is_taught for agent in self.agents))

    def resume(self) -> None:
        """Lets rounds begin."""
        self.cloud.set_paused(False)

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Waits until it is done.

        Raises:
            RoundError: a process ended by itself, or it took too long.
        """
        until = time.monotonic() + LIMIT_SECONDS
        while not is_done():
            self.cloud.check()
            for agent in self.agents:
                agent.check()
            if time.monotonic() > until:
                raise RoundError("the fleet took too long", hint=f"see the logs in {self._folder}")
            time.sleep(POLL_SECONDS)

    def restart_agent(self, number: int) -> LocalAgent:
        """Stops an agent and starts it anew on its state folder, with no window but the live ones."""
        old = self.agents[number]
        old.stop()
        split = self._federation.devices[old.device]
        nothing = (split.train_x[:0], split.train_y[:0])
        quiet = Split(*nothing, *nothing, split.test_x, split.test_y)
        (old.state / "status.json").unlink(missing_ok=True)
        agent = LocalAgent(old.device, old.state, self._settings, "", quiet, rate_hz=_RATE_HZ)
        self._stack.callback(agent.stop)
        self.agents[number] = agent
        return agent

    def process_ids(self) -> list[int]:
        """Of the broker, the aggregator and the agents: all that this process has started."""
        return children(os.getpid())

    def __enter__(self) -> ShoalFleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start_agents(self, stack: ExitStack) -> None:
        agent_settings = EdgeSettings(
            inference=InferenceSettings(variant="int8"), release=ReleaseSettings(spread_seconds=0.0)
        )
        self._settings.write_text(render_toml(agent_settings), encoding="utf-8")
        for device, split in self._federation.devices.items():
            state = self._folder / "agents" / device
            token = self.cloud.token(device)
            agent = LocalAgent(device, state, self._settings, token, split, rate_hz=_RATE_HZ)
            stack.callback(agent.stop)
            self.agents.append(agent)
