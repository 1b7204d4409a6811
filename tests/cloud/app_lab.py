"""The lab with a stock ServerApp in place of a strategy: Flower's own loop, our devices, restarts at will."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy

from cloud_server.db.grid_steps import GridStep, load_steps
from cloud_server.flower.serverapp import make_serverapp_runner
from cloud_server.flower.tape import Tape
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.runner import RoundRunner
from cloud_server.rounds.state import Phase
from tests.cloud.round_lab import RUN, Lab, make_manifest

MANIFEST = make_manifest()
PATIENCE_SECONDS = 60.0
Main = Callable[[Grid, Context], Any]


class AppLab(Lab):
    """The lab with an app in place of a strategy."""

    def __init__(self, devices: int, main: Main, **options: Any) -> None:
        self.main = main
        self.results: list[Any] = []
        self.woken = threading.Event()
        self.stops: list[Callable[[], None]] = []
        super().__init__(devices, make_runner=self._make_app_runner, **options)

    def _make_app_runner(self, plan: RunPlan, ports: RunPorts) -> RoundRunner:
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            self.results.append(self.main(grid, context))

        runner, stop = make_serverapp_runner(
            plan, ports, app, config={"num-rounds": 2}, quorum_seconds=PATIENCE_SECONDS, wake=self.woken.set
        )
        self.stops.append(stop)
        return runner

    def step(self) -> None:
        self.woken.clear()
        self.runner.tick()
        if self.inbox:
            self.deliver_one()
        elif self.runner.phase is Phase.EVALUATING:
            self.clock.time = max(self.clock.time, self.runner.next_tick)
        elif not self.runner.is_finished and not self.woken.wait(PATIENCE_SECONDS):
            raise AssertionError("the app asks for nothing")

    def stop(self) -> None:
        for stop in self.stops:
            stop()

    def crash(self) -> None:
        """A new process; what the old one's app had not in the books is lost."""
        self.stops[-1]()
        for thread in threading.enumerate():
            if thread.name == "serverapp":
                thread.join(PATIENCE_SECONDS)
        self.restart()

    def steps(self) -> list[GridStep]:
        """The app's record."""
        with self.database.read() as connection:
            return load_steps(connection, RUN)


@contextmanager
def app_labs() -> Iterator[Callable[..., AppLab]]:
    """Makes labs, whose apps are stopped at the end."""
    labs: list[AppLab] = []

    def make(devices: int, main: Main, **options: Any) -> AppLab:
        labs.append(AppLab(devices, main, **options))
        return labs[-1]

    yield make
    for lab in labs:
        lab.stop()


def empty_tape() -> Tape:
    """Of an app that did nothing yet, kept nowhere."""
    return Tape(lambda step: None, patience_seconds=PATIENCE_SECONDS, monotonic=time.monotonic)


def initial_arrays(lab_params: np.ndarray[Any, Any]) -> ArrayRecord:
    return ArrayRecord(
        {
            slot.name: Array(lab_params[slot.offset : slot.offset + slot.size].reshape(slot.shape))
            for slot in MANIFEST.params
        }
    )


def start_params() -> np.ndarray[Any, Any]:
    return np.random.default_rng(4).normal(0, 0.1, MANIFEST.params_size).astype(np.float32)


def flat(record: ArrayRecord) -> np.ndarray[Any, Any]:
    return np.concatenate([record[slot.name].numpy().ravel() for slot in MANIFEST.params])


def training(strategy: Callable[[], Strategy], rounds: int = 2, timeout: float = 3600) -> Main:
    """Flower's own loop."""

    def main(grid: Grid, context: Context) -> Any:
        return strategy().start(
            grid,
            initial_arrays(start_params()),
            num_rounds=rounds,
            timeout=timeout,
            train_config=ConfigRecord({"lr": 0.25, "local-epochs": 3}),
        )

    return main


def fed_avg(**options: Any) -> Callable[[], Strategy]:
    return lambda: FedAvg(min_train_nodes=3, min_evaluate_nodes=3, min_available_nodes=3, **options)
